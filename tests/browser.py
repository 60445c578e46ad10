"A real JupyterLab in headless Chromium: start both, open a notebook, run it, press its controls, look at its pictures."

import io
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
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
ELSEWHERE = re.compile(r"^(?!(https?|ws)://127\.0\.0\.1[:/]|data:|blob:|file:)")
NOTEBOOK = "window.jupyterapp?.shell?.currentWidget"
READY = f"['idle', 'busy'].includes({NOTEBOOK}?.sessionContext?.session?.kernel?.status)"
DONE = f"""() => {{
    const cells = {NOTEBOOK}.content.widgets.map(cell => cell.model).filter(cell => cell.type === 'code' && cell.sharedModel.source.trim());
    const failed = cells.flatMap(cell => cell.outputs.toJSON()).find(output => output.output_type === 'error');
    const ended = cells.every(cell => cell.executionCount && cell.executionState === 'idle');
    return failed ? failed.traceback.join('\\n') : ended && {NOTEBOOK}.sessionContext.session.kernel.status === 'idle' && 'done';
}}"""


class Server(NamedTuple):
    "A running JupyterLab."

    address: str
    token: str
    root: Path

    def url(self, path, page="lab/tree"):
        return f"{self.address}/{page}/{path}?token={self.token}&reset"


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
    "Serve `folder`/notebooks with settings, kernels and workspaces of its own; notebooks import this checkout's spinereg."
    address, token, root = f"http://127.0.0.1:{free_port()}", secrets.token_hex(16), folder / "notebooks"
    root.mkdir()
    own = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    env = os.environ | {name: str(folder / name.lower()) for name in own} | {"PYTHONPATH": str(ROOT)}
    options = ["--no-browser", "--allow-root", f"--ServerApp.root_dir={root}", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={address.split(':')[-1]}"]
    options += [f"--IdentityProvider.token={token}", "--ServerApp.port_retries=0", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url="]
    options += ["--LabApp.extension_manager=readonly", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    log = folder / "jupyterlab.log"
    with log.open("w") as stream:
        process = subprocess.Popen([python, "-m", "jupyterlab", *options], env=env, stdout=stream, stderr=stream, cwd=root)
    try:
        end = time.monotonic() + seconds
        while not answers(f"{address}/api/status?token={token}"):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"JupyterLab did not start within {seconds} s: {log.read_text()}")
            time.sleep(0.1)
        yield Server(address, token, root)
    finally:
        process.terminate()
        process.wait(30)


def offline(context):
    "Let no request of the browser leave 127.0.0.1; the list returned holds those that tried."
    tried = []
    context.route(ELSEWHERE, lambda route: (tried.append(route.request.url), route.abort()))
    context.route_web_socket(ELSEWHERE, lambda route: tried.append(route.url))
    return tried


def write_notebook(path, *sources):
    "A notebook of code cells, as a user would have typed them."
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def open_notebook(page, server, path):
    "Open `path` (below the server's root) in a fresh JupyterLab and wait for its kernel."
    page.goto(server.url(path))
    page.wait_for_function(READY)


def command(page, name, **args):
    "Execute a command of JupyterLab and wait for its end."
    page.evaluate("([name, args]) => window.jupyterapp.commands.execute(name, args).then(() => null)", [name, args])


def start_all(page):
    "Run all cells and return at once."
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")


def wait_idle(page, seconds=60):
    "Wait until every cell has run and the kernel is idle; an error in a cell is raised here."
    state = page.wait_for_function(DONE, timeout=1000 * seconds).json_value()
    if state != "done":
        raise RuntimeError(re.sub(r"\x1b\[[\d;]*m", "", state))


def run_all(page, seconds=60):
    start_all(page)
    wait_idle(page, seconds)


def outputs(page, cell):
    "What stands below a code cell, counted from 0."
    return page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell").nth(cell).locator(".jp-Cell-outputArea")


def pixels(locator):
    "What the reader sees of an element, as uint8[height, width, 3]."
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("RGB"))


def shutdown_kernels(page):
    page.evaluate("() => window.jupyterapp.serviceManager.sessions.shutdownAll()")


def close(page):
    "Save the notebook, end its kernel, leave JupyterLab."
    command(page, "docmanager:save")
    shutdown_kernels(page)
    page.goto("about:blank")
