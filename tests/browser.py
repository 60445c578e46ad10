"A real JupyterLab in headless Chromium: open a notebook, run it, press its controls, look at its pictures. Fixture `lab` in conftest.py."

import base64
import io
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import nbformat
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
ELSEWHERE = re.compile(r"^(?!(https?|ws)://127\.0\.0\.1[:/]|data:|blob:|file:)")

# JavaScript: the notebook in front, whether its kernel answers in time, whether all of its cells have run
NOTEBOOK = "window.jupyterapp?.shell?.currentWidget"
ANSWERS = f"""async seconds => {{
    const pause = time => new Promise(resolve => setTimeout(resolve, time))
    const kernel = () => {NOTEBOOK}?.sessionContext?.session?.kernel
    const answer = async () => {{
        while (!['idle', 'busy'].includes(kernel()?.status)) await pause(50)
        await kernel().requestExecute({{code: '', silent: true}}).done
        return true
    }}
    return Promise.race([answer(), pause(1000 * seconds)])
}}"""
ENDED = f"""() => {{
    const cells = {NOTEBOOK}.content.widgets.map(cell => cell.model).filter(cell => cell.type === 'code' && cell.sharedModel.source.trim())
    const failed = cells.flatMap(cell => cell.outputs.toJSON()).find(output => output.output_type === 'error')
    if (failed) return failed.traceback.join('\\n')
    return cells.every(cell => cell.executionCount && cell.executionState === 'idle') && {NOTEBOOK}.sessionContext.session.kernel.status === 'idle'
}}"""
COMMAND = "async ([name, args]) => { await window.jupyterapp.commands.execute(name, args) }"
WITHOUT_KERNEL = """async path => {
    await window.jupyterapp.restored
    const notebook = await window.jupyterapp.commands.execute('docmanager:open', {path, kernelPreference: {shouldStart: false}})
    await notebook.context.ready
}"""
DECODED = """async image => {
    await image.decode()
    const canvas = Object.assign(document.createElement('canvas'), {width: image.naturalWidth, height: image.naturalHeight})
    canvas.getContext('2d').drawImage(image, 0, 0)
    return canvas.toDataURL('image/png')
}"""
SETTINGS = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}}


class Server(NamedTuple):
    "A running JupyterLab."

    address: str
    token: str
    root: Path
    log: Path

    def url(self, path=""):
        return f"{self.address}/lab{path}?token={self.token}&reset"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@contextmanager
def jupyterlab(folder, python=sys.executable, seconds=60):
    "Serve `folder`/notebooks with settings, workspaces and a log of its own; what a notebook imports is this checkout."
    port, token, root, log = free_port(), secrets.token_hex(16), folder / "notebooks", folder / "jupyterlab.log"
    server = Server(f"http://127.0.0.1:{port}", token, root, log)
    root.mkdir()
    own = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    env = os.environ | {name: str(folder / name.lower()) for name in own} | {"PYTHONPATH": str(ROOT)}
    for name, values in SETTINGS.items():
        path = folder / f"jupyterlab_settings_dir/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    options = [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={token}"]
    options += [f"--ServerApp.root_dir={root}", "--no-browser", "--allow-root", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url="]
    options += ["--LabApp.extension_manager=readonly", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with log.open("w") as stream:
        process = subprocess.Popen([python, "-m", "jupyterlab", *options], env=env, stdout=stream, stderr=stream, cwd=root)
    try:
        end = time.monotonic() + seconds
        while not answers(f"{server.address}/api/status?token={token}"):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"JupyterLab did not start within {seconds} s: {log.read_text()}")
            time.sleep(0.1)
        yield server
    finally:
        process.kill()  # its kernels end by themselves; a server that waits for one that does not answer would take a minute
        process.wait()


def offline(context):
    "Let no request of a browser leave 127.0.0.1; the list returned holds the addresses it tried."
    tried = []
    context.route(ELSEWHERE, lambda route: (tried.append(route.request.url), route.abort()))
    context.route_web_socket(ELSEWHERE, lambda socket: tried.append(socket.url))
    return tried


def pixels(picture):
    "What an <img> shows, as the browser decoded it: uint8[height, width, 3]."
    url = picture.evaluate(DECODED)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"))


class Lab:
    "A tab of the browser with JupyterLab; `tried` lists the addresses outside 127.0.0.1 that were asked for."

    def __init__(self, page, server, shots, tried):
        self.page, self.server, self.shots, self.tried = page, server, shots, tried

    def write(self, name, *sources):
        "Put a notebook of code cells on the server."
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        path = self.server.root / name
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
        return path

    def open(self, name, seconds=180):
        "Open a notebook of the server in a fresh JupyterLab, as a link does, and wait for its kernel."
        self.page.goto(self.server.url(f"/tree/{name}"))
        if not self.page.evaluate(ANSWERS, seconds):
            raise RuntimeError(f"no kernel answered within {seconds} s: {self.server.log.read_text()}")

    def open_without_kernel(self, name):
        "Open a notebook of the server to be read only: no kernel is started."
        self.page.goto(self.server.url())
        self.page.wait_for_function("window.jupyterapp")
        self.page.evaluate(WITHOUT_KERNEL, name)

    def command(self, name, **args):
        "Execute a command of JupyterLab to its end."
        self.page.evaluate(COMMAND, [name, args])

    def start_all(self):
        "Run all cells and return at once."
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")

    def wait(self, seconds=60):
        "Wait until all cells have run and the kernel is idle; an error in a cell is raised here."
        ended = self.page.wait_for_function(ENDED, timeout=1000 * seconds).json_value()
        if ended is not True:
            raise RuntimeError(re.sub(r"\x1b\[[\d;]*m", "", ended))

    def run_all(self, seconds=60):
        self.start_all()
        self.wait(seconds)

    def outputs(self, cell):
        "What stands below a cell, counted from 0."
        return self.page.locator(".jp-Notebook .jp-Cell").nth(cell).locator(".jp-Cell-outputArea")

    def shot(self, what):
        "Keep what the reader sees for the test report."
        return self.shots(self.page, what)

    def save(self):
        self.command("docmanager:save")

    def close(self):
        "Leave JupyterLab and end its kernels."
        if self.page.url.startswith(self.server.address):
            self.page.evaluate("() => window.jupyterapp?.serviceManager.sessions.shutdownAll()")
        self.page.goto("about:blank")
