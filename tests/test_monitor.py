"The monitor: what it draws, what it costs, what it asks of a run, what it leaves."

import json
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import spinereg
from spinereg.interactive.monitor import Budget, TrainingMonitor, time_text
from spinereg.interactive.steering import Controls, Requests, add_run
from spinereg.losses.objective import TERMS, Weights
from spinereg.measure.curves import grow, known_curves, make_curves, new_log, thin
from spinereg.measure.pictures import Overview, Picture
from spinereg.registration.run import Step
from spinereg.space.geometry import Grid

ROOT = Path(__file__).parent.parent
WEIGHTS = Weights(diffusion=0.02, oc=1.0)


def pixels(png):
    return np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int)


def view(shade=0.5):
    "Pictures' data of two boxes."
    grid = Grid((12, 20, 24), np.diag([2.0, 2.0, 2.0, 1.0]))
    labels = torch.zeros(grid.shape, dtype=torch.int32)
    labels[3:9, 5:15, 3:9], labels[3:9, 5:15, 14:20] = 2, 1
    image = (labels > 0).float() * shade
    return Overview(grid, image, image, image.roll(1, 1), labels, labels, ("L1", "L2"), torch.ones(grid.shape))


def step_of(number, of=10, stage="similarity", weights=None, cases=("a", "b"), **row):
    asked = []

    def look(case=0):
        asked.append(case)
        return view(0.3 + 0.5 * case), {"dice_before": 0.5, "dice_after": 0.6 + 0.3 * number / of, "folding_percent": 0.0, "residual_median_mm": 0.2}

    values = {"epoch": 1, "stage": stage, "step": number, "loss": 2 / number, "similarity": 1 / number}
    values |= {"diffusion": 0.1 * number, "gradient_norm": 1.0}
    step = Step(values | row, number / of, replace(WEIGHTS) if weights is None else weights, look, cases)
    step.asked = asked
    return step


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=400), st.integers(1, 50))
def test_a_thinned_curve_keeps_its_mean_and_its_ends(values, points):
    steps, means = thin(values, points)
    assert len(steps) <= max(points, 1) and steps[0] >= 1 and (np.diff(steps) > 0).all()
    stretch = -(-len(values) // points)
    counts = [len(values[start : start + stretch]) for start in range(0, len(values), stretch)]
    assert np.average(means, weights=counts) == pytest.approx(np.mean(values), abs=1e-6)


@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=20), st.booleans())
def test_limits_hold_all_values_and_then_stay(values, log):
    limits = grow((0.9, 1.1), np.array(values), log)
    assert limits[0] <= min(values) and max(values) <= limits[1]
    spread = np.log(max(values) / min(values)) / np.log(limits[1] / limits[0]) if log else np.ptp(values) / (limits[1] - limits[0])
    assert grow(limits, np.array(values), log) == limits or spread <= 0.15


def test_axes_are_drawn_anew_only_now_and_then():
    """A curve that grows slowly, on a logarithmic scale, changes its limits a few times in a hundred steps."""
    limits, changes = (0.9, 1.1), 0
    for n in range(1, 101):
        values = np.exp(np.linspace(0, n / 25, n + 1))
        changes += limits != (limits := grow(limits, values, True))
    assert changes < 20


def test_a_curve_keeps_its_colour_when_another_joins_its_panel():
    log = new_log()
    colours = []
    for told in ({"pc": 1.0}, {"pc": 1.0, "diffusion": 0.1}):
        log.note(told | {"level_mm": 2.0})
        [panel] = known_curves(log)
        colours.append({name: line.get_color() for name, line in make_curves(Picture().subplots(), *panel).lines.items()})
    assert len(colours[0]) == 1 and len(set(colours[1].values())) == 2 and colours[1]["pc"] == colours[0]["pc"]


def test_the_curves_and_the_slices_of_a_run_are_drawn():
    monitor = TrainingMonitor(fraction=1.0)
    monitor(step_of(1))
    first = pixels(monitor.png())
    for number in range(2, 8):
        monitor(step_of(number, stage="similarity" if number < 5 else "rigidity"))
    monitor(step_of(10))
    assert monitor.log.begins == [5, 8] and monitor.log.steps == 8
    lines = {name: line for curves in monitor.live.curves for name, line in curves.lines.items()}
    np.testing.assert_allclose(lines["loss"].get_xydata(), [[n, 2 / k] for n, k in zip(range(1, 9), (1, 2, 3, 4, 5, 6, 7, 10))])
    assert lines["dice_after"].get_ydata()[-1] == pytest.approx(0.9)
    assert (pixels(monitor.png()) != first).any() and "done" in monitor.live.words.get_text()


def test_what_is_drawn_fast_is_what_the_whole_figure_looks_like():
    monitor = TrainingMonitor()
    for number in (1, 2, 10):
        monitor(step_of(number))
    fast, whole = pixels(monitor.png()), pixels(monitor.live._repr_png_())
    assert fast.shape == whole.shape and (np.abs(fast - whole).max(-1) > 30).mean() < 0.002


def test_d3_stop_and_weights_count_from_the_next_step_and_once():
    """D3: the step after which Stop was pressed is the last."""
    monitor, weights = TrainingMonitor(), replace(WEIGHTS)
    monitor(step_of(1, weights=weights))
    monitor.requests.weights |= {"diffusion": 0.5}
    monitor(step_of(2, weights=weights))
    assert weights == replace(WEIGHTS, diffusion=0.5) and monitor.changes == ["step 2: diffusion 0.02 to 0.5"]
    weights.diffusion = 0.7  # by another hand
    monitor.requests.stop = True
    last = step_of(3, weights=weights)
    monitor(last)
    assert last.stop and weights.diffusion == 0.7 and "stopped" in monitor.live.words.get_text()


@pytest.mark.parametrize("ends", ["stopped", "done", "failed"])
def test_a_monitor_can_watch_another_run(ends, monkeypatch):
    """It shows itself anew, and nothing of the first run is left: no request, no curve, no size."""
    shown = []
    monkeypatch.setattr("spinereg.interactive.monitor.display", shown.append)
    monitor, weights = TrainingMonitor(), replace(WEIGHTS)
    monitor(step_of(1))
    monitor.requests.stop = ends == "stopped"
    monitor(step_of(10 if ends == "done" else 4))
    monitor.requests.stop = True
    monitor.requests.weights["diffusion"] = 0.5
    first = step_of(3, of=30, weights=weights)
    monitor(first)
    assert not first.stop and weights == WEIGHTS and monitor.log.steps == 1 and len(shown) == 2
    assert monitor.log.first == 3, "a training that goes on keeps its count"
    monitor(step_of(4, of=30, weights=weights))
    assert monitor.live.curves[0].lines["loss"].get_xdata().tolist() in ([3], [3, 4]) and monitor.live.curves[0].ax.get_xlim()[0] == 2


def test_slices_keep_their_size_in_mm_when_the_case_or_the_level_changes():
    """The outline lies around the bright box, whatever the size of the first look."""
    monitor, sizes = TrainingMonitor(fraction=1.0), iter([(12, 20, 24), (12, 40, 80), (6, 20, 40)])

    def boxes(shape):
        grid = Grid(shape, np.diag([24 / shape[0]] * 3 + [1.0]))
        labels = torch.zeros(shape, dtype=torch.int32)
        labels[:, shape[1] // 4 : shape[1] // 2, shape[2] // 4 : shape[2] // 2] = 1
        return Overview(grid, *[(labels > 0).float()] * 3, labels, labels, ("L1",), torch.ones(shape))

    for number in (1, 2, 10):
        monitor.looks = Budget(1.0, every_s=0.0)
        step = step_of(number)
        shape = next(sizes)
        step.look = lambda case=0, shape=shape: (boxes(shape), {})
        monitor(step)
        if monitor.live.grid.shape != shape:
            monitor.look(step)
        panel, shown = monitor.live.panels[0], pixels(monitor.png())
        [outline] = [segment for segment in panel.solid.get_segments() if len(segment)]
        box, ends = panel.ax.bbox, panel.ax.transData.transform(outline)
        top, bottom, left, right = (int(n) for n in (monitor.live.bbox.height - box.y1, monitor.live.bbox.height - box.y0, box.x0, box.x1))
        rows, columns = np.nonzero(shown[top + 18 : bottom - 18, left + 18 : right - 18].min(-1) > 240)
        mm = box.height / monitor.live.grid.size_mm[2]
        assert abs(columns.mean() + left + 18 - ends[:, 0].mean()) < mm * 24 / shape[0] + 3
        assert abs(monitor.live.bbox.height - (rows.mean() + top + 18) - ends[:, 1].mean()) < mm * 24 / shape[0] + 3
        assert box.height / box.width == pytest.approx(shape[2] / shape[1], rel=0.01)


def test_a_case_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"case=2: expected a number from 0 to 1 \(a, b\)"):
        TrainingMonitor(case=2)(step_of(1))


def test_pause_holds_the_run_until_it_is_released():
    requests, ended = Requests(pause=True), threading.Event()
    thread = threading.Thread(target=lambda: (requests.apply_to(step_of(1)), ended.set()))
    thread.start()
    assert not ended.wait(0.3)
    requests.pause = False
    assert ended.wait(5)
    thread.join()


@pytest.mark.parametrize("name", [*TERMS])
def test_a_slider_begins_where_the_browser_does_not_round_it_and_is_off_at_its_end(name):
    """A first value off the slider's steps would come back rounded, and change a weight that nobody touched."""
    requests, step = Requests(), step_of(1)
    controls = Controls(requests)
    add_run(controls, step, 0, choose=print)
    slider = controls.sliders[name]
    steps = (np.log10(slider.value) - slider.min) / slider.step
    assert steps == pytest.approx(round(steps), abs=1e-6) and requests.weights == {}
    slider.value = 10**slider.max
    assert requests.weights == {name: 10**slider.max}
    slider.value = 10**slider.min
    assert requests.weights == {name: 0.0}


def test_another_case_can_be_chosen():
    monitor = TrainingMonitor(fraction=1.0)
    monitor.box  # noqa: B018  as a notebook would ask for it
    monitor(step_of(1))
    monitor.controls.case.value = 1
    last = step_of(10)
    monitor(last)
    assert last.asked == [1] and "slices: b" in monitor.live.words.get_text()


def test_a_registration_has_one_case_and_no_menu():
    monitor = TrainingMonitor()
    monitor.box  # noqa: B018
    step = step_of(1, cases=())
    del step.row["stage"], step.row["epoch"]
    step.row["level_mm"] = 4.0
    monitor(step)
    assert monitor.controls.case is None and "4 mm" in monitor.live.words.get_text()


def test_dice_before_is_measured_once_and_not_on_the_grid_of_every_level():
    """One start, one figure: what it was before the registration does not depend on how coarse the level is."""
    files = [ROOT / "data_samples/test/easy_0" / f"{name}.nii.gz" for name in ("mr_t1", "ct", "ct_mask", "mr_mask")]
    monitor = TrainingMonitor(fraction=1.0)
    spinereg.register(*files, method="optimise", prealign="header", spacing_mm=4.0, levels=(4, 2, 1), steps=(2, 2, 2), on_step=monitor)
    before = np.array(monitor.log.traces["dice_before"])
    known = before[np.isfinite(before)]
    assert monitor.log.begins == [3, 5] and len(known) >= 3 and np.ptp(known) == 0


def test_drawing_keeps_to_its_fraction(monkeypatch):
    """D3: on a clock of our own: in a run of 1000 s, drawings of 1 and looks of 5 s take 3 % at most, and happen."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    budgets, done = {5.0: Budget(0.015, cost=5.0), 1.0: Budget(0.015, cost=1.0)}, {5.0: 0, 1.0: 0}
    while now[0] < 1000:
        now[0] += 0.5
        for cost, budget in budgets.items():
            if budget.allows():
                began = now[0]
                now[0] += cost
                budget.spend(began)
                done[cost] += 1
    assert sum(budget.spent for budget in budgets.values()) <= 0.03 * now[0] + 1e-9 and done == {5.0: 3, 1.0: 15}


def test_d4_ten_thousand_steps_do_not_fill_the_memory():
    """D4: a number per curve and step is kept, and no picture."""
    monitor = TrainingMonitor(fraction=0.0)
    monitor(step_of(1, of=20000))
    tracemalloc.start()
    for number in range(2, 10001):
        monitor(step_of(number, of=20000))
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 20e6 and monitor.log.steps == 10000
    monitor.live.show_curves(monitor.log)
    assert max(len(line.get_xdata()) for curves in monitor.live.curves for line in curves.lines.values()) <= 400


RUN = """import json, sys
sys.path.insert(0, {tests!r})
import matplotlib.pyplot as plt, psutil
from spinereg.interactive.monitor import TrainingMonitor
from test_monitor import step_of
monitor, seen = TrainingMonitor(fraction=1.0), []
for number in range(1, 501):
    monitor(step_of(number, of=500))
    monitor.draws.every_s = monitor.looks.every_s = 0.0
    seen.append(psutil.Process().memory_info().rss / 1e6)
print(json.dumps([max(seen[50:]) - max(seen[:50]), len(plt.get_fignums()), monitor.log.steps]))"""


def test_d4_five_hundred_drawings_leave_a_small_notebook_and_no_figure(tmp_path):
    """D4: under papermill, drawn after every step: one PNG in the end, no open figure, memory that does not grow."""
    path = tmp_path / "run.ipynb"
    cell = nbformat.v4.new_code_cell(RUN.format(tests=str(Path(__file__).parent)))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), path)
    command = [sys.executable, "-m", "papermill", path, path, "--kernel", "python3", "--no-progress-bar"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    outputs = nbformat.read(path, 4).cells[-1].outputs
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1 and path.stat().st_size < 5e6
    grown, figures, steps = json.loads("".join(output.text for output in outputs if output.output_type == "stream").strip().splitlines()[-1])
    assert grown < 50 and figures == 0 and steps == 500


def test_time_is_told_as_people_do():
    assert [time_text(s) for s in (5, 65, 3600, 90061)] == ["0:05", "1:05", "1:00:00", "25:01:01"]


@pytest.mark.parametrize("watch", [None, "monitor"])
def test_progress_is_told_once_and_ends_at_the_end_after_stop(watch, capsys):
    """A monitor tells it in its picture, so that there is no bar; a bar that is stopped is full, and says that it was stopped."""
    files = [Path(__file__).parent.parent / "data_samples/test/easy_0" / f"{name}.nii.gz" for name in ("mr_t1", "ct", "ct_mask")]
    taken = []

    def stop(step):
        taken.append(step.done)
        step.stop = len(taken) == 3

    class Stopping(TrainingMonitor):
        def __call__(self, step):
            self.requests.stop = self.log.steps == 2
            super().__call__(step)

    monitor = Stopping()
    spinereg.register(*files, method="optimise", prealign="header", spacing_mm=4.0, steps=(20, 20, 5), on_step=monitor if watch else stop)
    said = capsys.readouterr().out
    if watch:
        assert "% |" not in said and "stopped" in monitor.live.words.get_text()
    else:
        last = said.split("\r")[-1]
        assert "100 % |" in last and "stopped at 16 mm" in last and taken[-1] < 0.1
