"""JupyterLab in headless Chromium without a network: viewers answer to sliders, keys, wheel and mouse, Stop stops, pictures stay."""

import json
import re
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from browser import ROOT, pixels

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

SAMPLE = f"files = [f'{ROOT}/data_samples/test/easy_0/{{name}}.nii.gz' for name in ('mr_t1', 'ct', 'ct_mask')]\n"
STATE = """() => {
    const notebook = window.jupyterapp.shell.currentWidget.content
    const scrolled = document.querySelector('.jp-WindowedPanel-outer').scrollTop
    return {scrolled, cells: notebook.widgets.length, active: notebook.activeCellIndex, type: notebook.activeCell.model.type}
}"""


def jupyter(lab, *command):
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True, capture_output=True, cwd=lab.server.root)


def open_tutorial(lab, name):
    "A tutorial where its relative paths lead to the samples; it registers coarsely by the quicker method here, and as it stands in notebooks.py."
    folder = lab.server.root / "nbs/tutorials"
    folder.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(ROOT / f"nbs/tutorials/{name}.ipynb", 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("spacing_mm=1.5", "spacing_mm=3.0, prealign='header', method='optimise'")
    nbformat.write(notebook, folder / f"{name}.ipynb")
    if not (lab.server.root / "data_samples").exists():
        (lab.server.root / "data_samples").symlink_to(ROOT / "data_samples")
    lab.open(f"nbs/tutorials/{name}.ipynb")


def cell_with(name, words):
    "Number of the first code cell of a tutorial that holds these words."
    cells = nbformat.read(ROOT / f"nbs/tutorials/{name}.ipynb", 4).cells
    return next(number for number, cell in enumerate(cells) if cell.cell_type == "code" and words in cell.source)


class Live:
    "A live viewer below a cell."

    def __init__(self, lab, cell):
        self.page, self.outputs = lab.page, lab.outputs(cell)
        self.picture = self.outputs.locator("img.widget-image")
        self.outputs.scroll_into_view_if_needed()
        expect(self.picture).to_be_visible()

    def hover(self, x, y):
        "Point at a place of the picture, from 0 to 1: it has been drawn, stands still and listens to the wheel and to keys."
        box = self.picture.bounding_box()
        self.picture.hover(position={"x": x * box["width"], "y": y * box["height"]})
        expect(self.picture).to_have_class(re.compile("ipyevents-watched"))

    def changes(self, act):
        "What the picture shows after something was done to it; it must be something else."
        before, shown = pixels(self.picture), self.picture.get_attribute("src")
        act()
        expect(self.picture).not_to_have_attribute("src", shown)
        after = pixels(self.picture)
        assert before.shape != after.shape or (before != after).any()
        return before, after

    def unfold(self, title):
        self.outputs.get_by_text(title, exact=False).first.click()

    def slider(self, name):
        return self.outputs.locator(".widget-hslider").filter(has=self.page.get_by_text(name, exact=True)).get_by_role("slider").first

    def menu(self, name):
        return self.outputs.locator(".widget-dropdown").filter(has=self.page.get_by_text(name, exact=True)).locator("select")


def drag(page, box, start, end):
    "Move the mouse with its button down, from one place of a picture to another."
    (x0, y0), (x1, y1) = ((box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end))
    page.mouse.move(x0, y0)
    page.mouse.down()
    for part in (0.3, 0.6, 1.0):
        page.mouse.move(x0 + part * (x1 - x0), y0 + part * (y1 - y0))
        page.wait_for_timeout(60)
    page.mouse.up()


def test_the_quickstart_runs_and_its_viewers_answer(lab):
    """Run All; then wheel, keys, click, slider and menu each change the picture or the words, and JupyterLab keeps out of it."""
    open_tutorial(lab, "quickstart")
    lab.run_all(600)
    page, live = lab.page, Live(lab, cell_with("quickstart", "SliceViewer(result"))
    words = live.outputs.locator(".widget-html pre").first
    live.hover(0.2, 0.5)
    before = page.evaluate(STATE)
    live.changes(lambda: page.mouse.wheel(0, 100))
    for key in ("ArrowDown", "PageUp", "4", "ArrowLeft", "o", "c", "3"):
        live.changes(lambda key=key: page.keyboard.press(key))
    for key in ("d", "d", "m", "x", "a", "d", "d"):  # JupyterLab: delete the cell, to markdown, cut, insert above
        page.keyboard.press(key)
    said = words.inner_text()
    box = live.picture.bounding_box()
    live.changes(lambda: live.picture.click(position={"x": 0.25 * box["width"], "y": 0.3 * box["height"]}))
    assert words.inner_text() != said and page.evaluate(STATE) == before
    live.changes(lambda: page.keyboard.press("+"))
    said = words.inner_text()
    live.changes(lambda: drag(page, box, (0.2, 0.4), (0.2, 0.5)))
    assert words.inner_text() == said, "a drag moves the picture, not the crosshair"
    live.changes(lambda: page.keyboard.press("0"))
    page.keyboard.press("?")
    expect(live.outputs.get_by_text("next vertebra, the one before")).to_be_visible()
    live.changes(lambda: live.menu("vertebra").select_option("L3"))
    expect(words).to_contain_text(re.compile(r"L3: [\d.]+ mm and"))
    lab.shot("slices")
    live.changes(lambda: live.menu("show").select_option("blend"))
    live.changes(lambda: live.slider("fade").press("ArrowRight"))
    live.unfold("slices, outlines")
    live.changes(lambda: live.menu("CT window").select_option("soft tissue"))
    live.changes(lambda: live.outputs.get_by_role("button", name="axial").click())
    jacobian = Live(lab, cell_with("quickstart", "JacobianMap("))
    jacobian.unfold("slices, outlines")
    jacobian.changes(lambda: jacobian.slider("left - right").press("ArrowRight"))
    lab.shot("jacobian")


def test_the_rigidity_tutorial_bends_a_vertebra(lab):
    open_tutorial(lab, "rigidity")
    lab.run_all(120)
    live = Live(lab, cell_with("rigidity", "Interactive("))
    live.changes(lambda: live.slider("bend mm").press("PageUp"))
    live.changes(lambda: live.slider("turn deg").press("PageDown"))
    lab.shot("bent")


RUN = (
    SAMPLE
    + f"""
import json, tempfile
from concurrent.futures import ThreadPoolExecutor
import ipywidgets, spinereg
from spinereg.interactive.monitor import TrainingMonitor
from spinereg.registration.run import weights_changed

monitor, number, pressed = TrainingMonitor(), ipywidgets.Label(), []
display(number, monitor)
monitor.controls.stop.on_click(lambda _: pressed.append(monitor.log.steps))

def watch(step):
    monitor(step)
    number.value = str(monitor.log.steps)

def register():
    return spinereg.register(*files, method="optimise", prealign="header", spacing_mm=3.0, levels=(1,), steps=(2000,), on_step=watch).history

def fit():
    small = dict(spacing_mm=4.0, crop=(16, 24, 40), crops_per_case=1, prealign="header", similarity="lncc", logger="none", device="cpu")
    return spinereg.fit({str(ROOT / "data_samples")!r}, tempfile.mkdtemp(), epochs_similarity=1000, epochs_rigidity=0, on_step=watch, **small).steps

def run(job):
    steps = job()
    number.value = json.dumps([pressed[0], len(steps), [change._asdict() for change in weights_changed(steps)]])

"""
)


@pytest.mark.parametrize("start", ["run(register)", "ThreadPoolExecutor(1).submit(run, fit);"])
def test_d3_a_running_loop_follows_stop_pause_and_weights(lab, start):
    """D3: in the cell itself and in a background thread; Stop takes effect within a step, a weight from the next one on."""
    lab.write("stop.ipynb", RUN + start)
    lab.open("stop.ipynb")
    lab.start_all()
    outputs = lab.outputs(0)
    number, live = outputs.locator(".widget-label").filter(has_text=re.compile(r"^[\d\[]")).last, outputs.locator("img.widget-image")
    expect(number).to_have_text(re.compile(r"^\d+$"), timeout=120_000)
    shown = live.get_attribute("src")
    expect(live).not_to_have_attribute("src", shown)
    outputs.locator(".widget-hslider").filter(has=lab.page.get_by_text("diffusion", exact=True)).get_by_role("slider").press("ArrowLeft")
    pause = outputs.get_by_role("button", name="Pause")
    pause.click()
    expect(outputs.get_by_text("paused", exact=True)).to_be_visible()
    held = number.inner_text()
    lab.page.wait_for_timeout(1000)
    assert number.inner_text() == held
    lab.shot("paused")
    outputs.get_by_role("button", name="Go on").click()
    expect(number).not_to_have_text(held)
    outputs.get_by_role("button", name="Stop").click()
    expect(number).to_have_text(re.compile(r"^\["), timeout=60_000)
    pressed, ended, changes = json.loads(number.inner_text())
    assert pressed <= ended <= pressed + 1
    assert [change["term"] for change in changes] == ["diffusion"] and changes[0]["after"] < changes[0]["before"]
    expect(outputs.get_by_role("button", name="Stop")).to_be_disabled()
    lab.wait()
    lab.shot("stopped")


EVERY = [
    SAMPLE
    + """
import spinereg
from spinereg.interactive.monitor import TrainingMonitor
from spinereg.interactive.view3d import view3d
from spinereg.interactive.display import Interactive
from spinereg.interactive.viewers import DeformedGrid, JacobianMap, Quiver, SliceViewer
from spinereg.measure.pictures import Picture

def draw(cycles):
    fig = Picture(figsize=(3, 1))
    fig.add_axes((0, 0, 1, 1)).plot([n % cycles for n in range(20)])
    return fig
""",
    "result = spinereg.register(*files, method='optimise', prealign='header', spacing_mm=4.0, levels=(1,), steps=(10,), on_step=TrainingMonitor())",
    "SliceViewer(result, 'sagittal')",
    "JacobianMap(result)",
    "DeformedGrid(result, 'sagittal')",
    "Quiver(result, 'sagittal')",
    "spinereg.VertebraMotion(result)",
    "view3d(result)",
    "view3d(result, engine='itkwidgets')",
    "Interactive(draw, cycles=(1, 5, 2))",
]


def test_a_hand_moves_a_vertebra_and_its_pose_is_there(lab):
    """A menu, a slider and a button of VertebraMotion each change the picture and the table; the next cell has the pose."""
    lab.write("motion.ipynb", *EVERY[:2], "viewer = spinereg.VertebraMotion(result)\nviewer", "print(list(viewer.poses))")
    lab.open("motion.ipynb")
    lab.run_all(120)
    live = Live(lab, 2)
    live.changes(lambda: live.menu("move").select_option("L3"))
    live.changes(lambda: live.slider("superior, mm").press("PageUp"))
    live.changes(lambda: live.slider("flexion, deg").press("ArrowRight"))
    expect(live.outputs.locator(".spinereg-figures")).to_contain_text("L3 *")
    lab.shot("moved")
    lab.page.locator(".jp-Notebook .jp-Cell").nth(3).click()
    lab.command("notebook:run-cell")
    expect(lab.outputs(3)).to_contain_text("['L3']")
    live.changes(lambda: live.outputs.get_by_role("button", name="put it back").click())
    expect(live.outputs.locator(".spinereg-figures")).not_to_contain_text("*")


def check_still(lab, cell):
    "Below this cell a picture is seen, and no control, no message in place of one."
    outputs = lab.outputs(cell)
    outputs.scroll_into_view_if_needed()
    expect(outputs.locator("img").filter(visible=True)).to_have_count(1)
    assert len(np.unique(pixels(outputs.locator("img").filter(visible=True)))) > 10
    expect(outputs.get_by_role("slider").filter(visible=True)).to_have_count(0)
    expect(outputs.get_by_text(re.compile("widget", re.I)).filter(visible=True)).to_have_count(0)


def test_d1_d2_every_viewer_works_offline_and_leaves_its_picture(lab):
    """D1, D2: live without a network; saved, kernel ended, reopened: the picture of each, and no `Error displaying widget`."""
    lab.write("every.ipynb", *EVERY)
    lab.open("every.ipynb")
    lab.run_all(120)
    for cell in range(1, len(EVERY)):
        outputs = lab.outputs(cell)
        outputs.scroll_into_view_if_needed()
        expect(outputs.locator(".jupyter-widgets").filter(visible=True).first).to_be_visible()
        expect(outputs.locator(".jp-RenderedImage").filter(visible=True)).to_have_count(0)
        lab.shot(f"cell-{cell}")
    lab.save()
    lab.close()
    lab.open_without_kernel("every.ipynb")
    for cell in range(1, len(EVERY)):
        check_still(lab, cell)
    lab.shot("reopened")


def test_d1_what_papermill_and_nbconvert_leave_is_seen(lab):
    """D1: executed by papermill, opened without a kernel, and made a page by nbconvert."""
    path = lab.write("batch.ipynb", *EVERY)
    jupyter(lab, "papermill", path, path)
    jupyter(lab, "nbconvert", "--to", "html", path)
    lab.open_without_kernel(path.name)
    for cell in range(1, len(EVERY)):
        check_still(lab, cell)
    lab.page.goto(path.with_suffix(".html").as_uri())
    expect(lab.page.locator(".jp-Cell-outputArea img").filter(visible=True)).to_have_count(len(EVERY) - 1)
    expect(lab.page.get_by_text("Error displaying widget").filter(visible=True)).to_have_count(0)
    lab.shot("page")
    assert all("cdnjs" in url or "unpkg" in url for url in lab.tried)  # what nbconvert's own template asks for
    lab.tried.clear()


def test_no_request_leaves_this_machine(lab):
    """D2: the block that all tests here rely on: pages, pictures and sockets outside 127.0.0.1 fail and are noticed."""
    lab.page.goto(lab.server.url())
    asks = "url => fetch(url, {mode: 'no-cors'}).then(() => 'answered', () => 'refused')"
    assert lab.page.evaluate(asks, "https://example.org/a.js") == "refused"
    assert lab.page.evaluate(asks, f"{lab.server.address}/api") == "answered"
    lab.page.evaluate("() => { new WebSocket('wss://example.org/b') }")
    assert lab.tried == ["https://example.org/a.js", "wss://example.org/b"]
    lab.tried.clear()
