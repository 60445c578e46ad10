"""JupyterLab in headless Chromium without a network: what the user presses reaches the kernel, and what the kernel draws is seen."""

import re
import subprocess
import sys

import ipykernel
import numpy as np
import pytest
from browser import pixels

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
NEWER = ipykernel.version_info >= (7, 4)

SLIDER = """
import io, ipywidgets, numpy
from PIL import Image
picture, slider = ipywidgets.Image(), ipywidgets.IntSlider(max=9, description="grey")

def draw(_=None):
    stream = io.BytesIO()
    Image.fromarray(numpy.full((100, 200, 3), 25 * slider.value, "uint8")).save(stream, "png")
    picture.value = stream.getvalue()

slider.observe(draw, "value")
draw()
ipywidgets.VBox([picture, slider])
"""

EVENTS = """
import io, ipyevents, ipywidgets
from PIL import Image
stream = io.BytesIO()
Image.new("RGB", (200, 100)).save(stream, "png")
picture, heard = ipywidgets.Image(value=stream.getvalue(), layout={"width": "200px"}), ipywidgets.Label()

def hear(event):
    heard.value += event["key"] + " " if event["type"] == "keydown" else f"{event['type']}{'+' if event['deltaY'] > 0 else '-'} "

events = ipyevents.Event(source=picture, watched_events=["wheel", "keydown"], prevent_default_action=True)
events.on_dom_event(hear)
ipywidgets.VBox([picture, heard])
"""

LOOP = """
import threading, time, ipywidgets
stop, label, heard_at = ipywidgets.Button(description="Stop"), ipywidgets.Label(), []
stop.on_click(lambda _: heard_at.append(int(label.value)))

def loop():
    for step in range(300):
        if heard_at:
            break
        label.value = str(step)
        time.sleep(0.1)
    label.value = f"{step} {heard_at}"

display(ipywidgets.HBox([stop, label]))
"""

# three outputs: a style, a still picture, the controls; the style hides the picture while the controls live, and them when they do not
STILL = '''
import io, ipywidgets
from PIL import Image
stream = io.BytesIO()
Image.new("RGB", (200, 100), (200, 30, 30)).save(stream, "png")
style = """<style class="still">
.jp-OutputArea-child:has(style.still):has(+ * + * .jp-OutputArea-output .jupyter-widgets) + * {display: none}
.jp-OutputArea-child:has(style.still) + * + *:not(:has(.jp-OutputArea-output .jupyter-widgets)) {display: none}
</style>"""
display({"text/html": style, "text/plain": ""}, raw=True)
display({"image/png": stream.getvalue(), "text/plain": ""}, raw=True)
display(ipywidgets.IntSlider()._repr_mimebundle_() | {"text/plain": ""}, raw=True)
'''

STATE = """() => {
    const notebook = window.jupyterapp.shell.currentWidget.content
    const scrolled = document.querySelector('.jp-WindowedPanel-outer').scrollTop
    return {scrolled, cells: notebook.widgets.length, active: notebook.activeCellIndex, type: notebook.activeCell.model.type}
}"""


def jupyter(lab, *command):
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True, capture_output=True, cwd=lab.server.root)


def test_slider_moved_by_the_keyboard_redraws_the_picture(lab):
    lab.write("slider.ipynb", SLIDER)
    lab.open("slider.ipynb")
    lab.run_all()
    picture = lab.outputs(0).locator("img")
    assert np.all(pixels(picture) == 0)
    lab.shot("before")
    shown = picture.get_attribute("src")
    lab.outputs(0).get_by_role("slider").press("ArrowRight")
    expect(picture).not_to_have_attribute("src", shown)
    assert np.all(pixels(picture) == 25)


def test_wheel_and_keys_over_a_picture_reach_the_kernel_only(lab):
    """The picture neither scrolls the notebook nor lets JupyterLab take a key for one of its shortcuts."""
    lab.write("events.ipynb", EVENTS, *["1 + 1"] * 30)
    lab.open("events.ipynb")
    lab.run_all()
    picture, heard = lab.outputs(0).locator("img"), lab.outputs(0).locator(".widget-label")
    keys = ["d", "d", "1", "m", "x", "a", "j", "ArrowDown", "ArrowUp"]  # delete, to heading, to markdown, cut, insert, next cell
    picture.scroll_into_view_if_needed()
    picture.hover()
    before = lab.page.evaluate(STATE)
    lab.page.mouse.wheel(0, 100)
    lab.page.mouse.wheel(0, -100)
    for key in keys:
        lab.page.keyboard.press(key)
    expect(heard).to_have_text(" ".join(["wheel+", "wheel-", *keys]))
    assert lab.page.evaluate(STATE) == before
    lab.shot("heard")
    # beside the picture the same is JupyterLab's again
    lab.page.locator(".jp-Cell .jp-InputPrompt").nth(1).click()
    lab.page.mouse.wheel(0, 100)
    lab.page.wait_for_function(f"({STATE})().scrolled !== {before['scrolled']}")
    lab.page.keyboard.press("d")
    lab.page.keyboard.press("d")
    lab.page.wait_for_function(f"({STATE})().cells === {before['cells'] - 1}")
    expect(heard).to_have_text(" ".join(["wheel+", "wheel-", *keys]))


@pytest.mark.parametrize(
    "start",
    [
        pytest.param("loop()", id="main", marks=pytest.mark.skipif(NEWER, reason="ipykernel 7.4 hears a press when the cell has ended")),
        pytest.param("threading.Thread(target=loop).start()", id="thread"),
    ],
)
def test_stop_ends_a_loop_within_one_step(lab, start):
    """A press on Stop is heard while the loop runs, in the cell itself and in a thread that outlives its cell."""
    lab.write("stop.ipynb", LOOP + start)
    lab.open("stop.ipynb")
    lab.start_all()
    label = lab.outputs(0).locator(".widget-label")
    expect(label).to_have_text(re.compile(r"^[1-9]\d*$"))
    pressed_at = int(label.inner_text())
    lab.outputs(0).get_by_role("button", name="Stop").click()
    expect(label).to_have_text(re.compile(r"\["))
    ended_at, heard_at = map(int, re.findall(r"\d+", label.inner_text()))
    assert pressed_at <= heard_at <= ended_at <= heard_at + 1
    lab.wait()


def check_still(outputs):
    "Only the picture is seen: no control, no message in place of one."
    expect(outputs.locator("img")).to_be_visible()
    assert pixels(outputs.locator("img")).shape == (100, 200, 3)
    expect(outputs.get_by_role("slider")).to_have_count(0)
    expect(outputs.get_by_text(re.compile("widget", re.I)).filter(visible=True)).to_have_count(0)


def test_saved_notebook_reopens_with_its_picture(lab):
    """Saved, kernel ended, opened again: the picture in place of `Error displaying widget`, with a new kernel and without one."""
    lab.write("still.ipynb", STILL)
    lab.open("still.ipynb")
    lab.run_all()
    expect(lab.outputs(0).get_by_role("slider")).to_be_visible()
    expect(lab.outputs(0).locator("img")).to_be_hidden()
    lab.save()
    lab.close()
    lab.open("still.ipynb")
    expect(lab.outputs(0)).to_contain_text("Error displaying widget")
    check_still(lab.outputs(0))
    lab.close()
    lab.open_without_kernel("still.ipynb")
    check_still(lab.outputs(0))


def test_executed_notebook_shows_its_picture_in_jupyterlab_and_as_a_page(lab):
    """Executed by papermill: JupyterLab without a kernel shows the picture, and so does the page that nbconvert makes of it."""
    path = lab.write("batch.ipynb", STILL)
    jupyter(lab, "papermill", path, path)
    jupyter(lab, "nbconvert", "--to", "html", path)
    lab.open_without_kernel(path.name)
    check_still(lab.outputs(0))
    lab.shot("jupyterlab")
    lab.page.goto(path.with_suffix(".html").as_uri())
    check_still(lab.page.locator(".jp-Cell-outputArea").first)
    assert all("cdnjs" in url or "unpkg" in url for url in lab.tried)  # what nbconvert's own template asks for
    lab.tried.clear()


def test_no_request_leaves_this_machine(lab):
    """The block that all tests here rely on: pages, pictures and sockets outside 127.0.0.1 fail and are noticed."""
    lab.page.goto(lab.server.url())
    asks = "url => fetch(url, {mode: 'no-cors'}).then(() => 'answered', () => 'refused')"
    assert lab.page.evaluate(asks, "https://example.org/a.js") == "refused"
    assert lab.page.evaluate(asks, f"{lab.server.address}/api") == "answered"
    lab.page.evaluate("() => { new WebSocket('wss://example.org/b') }")
    assert lab.tried == ["https://example.org/a.js", "wss://example.org/b"]
    lab.tried.clear()
