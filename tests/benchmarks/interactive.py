"""How fast viewers and monitor are: python tests/benchmarks/interactive.py [slices | motion | browser | monitor | long]; all without an argument.

Ratios within one run, since machines are noisy: ways that are compared take turns.
"""

import json
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import browser

from spinereg.interactive.monitor import TrainingMonitor
from spinereg.interactive.motion import VertebraMotion
from spinereg.interactive.slices import SlicePicture, first_view
from spinereg.interactive.stack import Layer, Stack, layers_on
from spinereg.learning.fit import fit
from spinereg.measure.pictures import SAGITTAL
from spinereg.registration.register import register
from spinereg.space.geometry import Grid

SAMPLES = browser.ROOT / "data_samples"


def large_stack():
    "256 x 256 x 128 voxels with soft noise and eight vertebrae, labelled twice."
    grid, maker = Grid((128, 256, 256), np.diag([2.0, 1.0, 1.0, 1.0])), torch.Generator().manual_seed(0)
    image = torch.nn.functional.interpolate(torch.rand(1, 1, 32, 64, 64, generator=maker), grid.shape, mode="trilinear")[0, 0]
    labels, x = torch.zeros(grid.shape, dtype=torch.int32), grid.points_mm(torch.zeros(1))
    for number in range(8):
        labels[(x - torch.tensor([128.0, 120.0 + 3 * number, 28.0 + 28 * number])).norm(dim=-1) < 14 + number / 3] = number + 1
    image = image + (labels > 0)
    images = layers_on(grid, {"fixed": 100 * image, "moving": 500 * image, "moved": 500 * image.roll(2, 1)})
    modalities = {"fixed": "mr", "moving": "ct", "moved": "ct"}
    both, names = layers_on(grid, {"moved": labels, "fixed": labels.roll(2, 1)}), tuple(f"T{n}" for n in range(1, 9))
    return Stack(grid, images, modalities, both, names, pd.DataFrame(), Layer(image, grid), (Layer(image, grid),) * 3)


def whole(picture):
    "Draw all of a figure with Agg, and encode it the same way."
    picture.canvas.draw()
    with BytesIO() as png:
        Image.fromarray(np.asarray(picture.canvas.buffer_rgba())[..., :3]).save(png, "png", compress_level=1)


def slices(count=60):
    "From one slice to the next picture, in the kernel."
    stack = large_stack()
    live, plain, still = (SlicePicture(stack, first_view(stack), (SAGITTAL,), words=False) for _ in range(3))
    live.png()
    still.settle()
    ways = {"live": (live, live.png), "whole figure": (plain, lambda: whole(plain)), "whole figure, laid out once": (still, lambda: whole(still))}
    seconds = {name: [] for name in ways}
    for n in range(count):
        for name, (picture, draw) in ways.items():
            began = time.perf_counter()
            picture.turn(replace(picture.view, at=(34 + n, *picture.view.at[1:])))
            draw()
            seconds[name].append(time.perf_counter() - began)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    return {name: f"{1000 * value:.0f} ms, live is {median['live'] / value:.2f} of it" for name, value in median.items()}


def larger(path, mode, shape=(128, 256, 256)):
    "An image of the samples on more voxels, the same box: values and affine."
    image = nib.load(path)
    data = torch.from_numpy(image.get_fdata(dtype=np.float32))[None, None]
    parts = np.array(shape) / data.shape[2:]
    affine = image.affine @ np.diag([*(1 / parts), 1])
    affine[:3, 3] += image.affine[:3, :3] @ (0.5 / parts - 0.5)
    return torch.nn.functional.interpolate(data, shape, mode=mode)[0, 0].numpy(), affine


def motion(count=60):
    "From a slider of VertebraMotion to the new picture, table and controls, in the kernel: three planes of 256 x 256 x 128 voxels."
    fixed, moving, labels = (
        larger(SAMPLES / f"test/easy_0/{name}.nii.gz", mode) for name, mode in (("mr_t1", "trilinear"), ("ct", "trilinear"), ("ct_mask", "nearest"))
    )
    labels = labels[0].astype(np.int16), labels[1]
    with redirect_stdout(sys.stderr):
        viewer = VertebraMotion(register(fixed, moving, labels, method="rigid", prealign="header", spacing_mm=2.0))
    viewer.box  # noqa: B018  as a notebook would ask for it
    slider, seconds = viewer.editing.controls[6].widget, []
    for n in range(count):
        began = time.perf_counter()
        slider.value = 0.5 * (n % 20 + 1)
        seconds.append(time.perf_counter() - began)
    return f"{1000 * np.median(seconds):.0f} ms median, {1000 * np.quantile(seconds, 0.9):.0f} ms at 90 %"


CELL = f"""import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from interactive import large_stack
from spinereg.interactive.viewers import SliceViewer
SliceViewer(large_stack(), "sagittal")"""


def in_browser(count=40):
    "From a key press to the new picture on the page, one plane."
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, browser.jupyterlab(Path(folder)) as server, sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=browser.CHROMIUM, args=browser.FLAGS).new_page(viewport={"width": 1280, "height": 1100})
        lab, seconds = browser.Lab(page, server, None, []), []
        lab.write("one.ipynb", CELL)
        lab.open("one.ipynb")
        lab.run_all()
        picture = lab.outputs(0).locator("img.widget-image")
        picture.hover()
        for _ in range(count):
            shown = picture.get_attribute("src")
            began = time.perf_counter()
            page.keyboard.press("ArrowUp")
            page.wait_for_function("shown => document.querySelector('img.widget-image').src !== shown", arg=shown, polling=2)
            seconds.append(time.perf_counter() - began)
        lab.close()
    return f"{1000 * np.median(seconds):.0f} ms median, {1000 * np.quantile(seconds, 0.9):.0f} ms at 90 %"


def train(folder, watch, steps, data_dir=SAMPLES, **more):
    "Seconds of some training steps with a callback and other settings, the first step left out."
    settings = {"spacing_mm": 2.0, "crop": (32, 64, 64), "crops_per_case": 1, "prealign": "header", "similarity": "lncc", "logger": "none"}
    settings |= {"cache_dir": Path(folder) / "prepared", "epochs_similarity": steps, "epochs_rigidity": 0, "validate_every": steps + 1} | more
    times = []

    def step(told):
        if watch is not None:
            watch(told)
        times.append(time.perf_counter())
        told.stop = len(times) == steps

    fit(data_dir, Path(folder) / str(time.time()), on_step=step, **settings)
    return times[-1] - times[0]


def monitor(steps=60, rounds=2):
    "How much longer training takes with a monitor at its default rate."
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        train(folder, None, 3)
        for _ in range(rounds):
            monitor = TrainingMonitor()
            alone, watched = train(folder, None, steps), train(folder, monitor, steps)
            ratios.append((watched / alone - 1, (monitor.draws.spent + monitor.looks.spent) / watched, alone))
    said = "{:.0f} s alone, {:+.1f} % with it; drawing took {:.1f} % by its own clock"
    return [said.format(alone, 100 * slower, 100 * drawn) for slower, drawn, alone in ratios]


LONG = f"""import json, psutil
import matplotlib.pyplot as plt
import spinereg
from spinereg.interactive.monitor import TrainingMonitor
files = [f"{SAMPLES}/test/easy_0/{{name}}.nii.gz" for name in ("mr_t1", "ct", "ct_mask")]
monitor, seen, figures = TrainingMonitor(), [], []

def watch(step):
    monitor(step)
    seen.append(psutil.Process().memory_info().rss / 1e6)
    figures.append(len(plt.get_fignums()))

result = spinereg.register(*files, method="optimise", spacing_mm=2.5, levels=(1,), steps=(500,), on_step=watch)
said = {{"grown_mb": round(max(seen[50:]) - max(seen[:50]), 1), "open_figures": max(figures)}}
print(json.dumps(said | {{"drawing_s": round(monitor.draws.spent + monitor.looks.spent, 1)}}))"""


def long():
    "A run of 500 steps under papermill: size of the notebook, open figures, growth of memory after the first 50 steps."
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.ipynb"
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(LONG)], metadata={"kernelspec": kernel}), path)
        subprocess.run([sys.executable, "-m", "papermill", path, path, "--kernel", "python3", "--no-progress-bar"], check=True, capture_output=True)
        printed = "".join(output.get("text", "") for output in nbformat.read(path, 4).cells[-1].outputs)
        return {"notebook_mb": round(path.stat().st_size / 1e6, 2)} | json.loads(printed.strip().splitlines()[-1])


if __name__ == "__main__":
    for name, measure in {"slices": slices, "motion": motion, "browser": in_browser, "monitor": monitor, "long": long}.items():
        if name in (sys.argv[1:] or [name]):
            print(name, measure.__doc__, measure(), sep="\n  ")
