"""Names that nobody would choose, and files that somebody else chose: shown as they are, written where they belong, never run."""

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from test_data import case_of, draw
from test_monitor import step_of, view
from test_training import QUICK
from test_viewers import make_stack

from spinereg.apps import batch
from spinereg.apps.job import inputs_of, write_record
from spinereg.apps.paths import app
from spinereg.apps.plan import Given, make_jobs, plan_jobs
from spinereg.compare.evaluation import compare_settings, draw_settings
from spinereg.compare.jobs import read_batch
from spinereg.files.manifest import write_result
from spinereg.files.problems import InputError
from spinereg.files.transforms import read_transform
from spinereg.interactive.bones import draw_bones
from spinereg.interactive.monitor import TrainingMonitor
from spinereg.interactive.slices import SlicePicture, draw_strip, first_view
from spinereg.interactive.view3d import niivue_widget
from spinereg.interactive.viewers import SliceViewer
from spinereg.learning.cases import PrepareCase, check
from spinereg.learning.crops import OnDisk
from spinereg.learning.fit import fit
from spinereg.measure.pictures import Picture, draw_overview
from spinereg.phantom import halfreal
from spinereg.phantom.cases import write_samples
from spinereg.registration.networks import load_network
from spinereg.registration.register import register

ROOT = Path(__file__).resolve().parent.parent
MARKUP = ("<img src=x onerror=window.ran=1>", "<svg onload=window.ran=1>", "<script>window.ran=1", '"><input autofocus onfocus=window.ran=1>')
MARKUP += ("'><b>", "&lt;i&gt; &amp;", "<style>*{display:none}")
FORMULAS = (r"$\frac{a}$", "$", "$a_b$", "$$x^{$$", r"\(x\)", r"\$", "_", "^_^", "\\")
NAMES = (*MARKUP, *FORMULAS, "%s {0} {x}", "two\nlines", "é 名前", "x" * 255)
CLIMBING = ("", ".", "..", "../climb", "a/../../climb", "/tmp/climb", "a/b", "a\0b", "x" * 256, "é" * 200, "\udcff")

pytestmark = pytest.mark.filterwarnings("ignore:Glyph", "ignore:constrained_layout not applied")


def tree(folder):
    "All that is in a folder and what the files hold."
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def one_line(text):
    "With single spaces; pandas writes the end of a line as two characters."
    return " ".join(text.replace("\\n", " ").split())


# shown as they are


class Tags(HTMLParser):
    "The kinds of elements of a page, and its text."

    def __init__(self, page):
        super().__init__()
        self.kinds, self.words = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.kinds.add(tag)

    def handle_data(self, data):
        self.words.append(data)


def tables(executed):
    "The tables that an executed notebook shows."
    cells = json.loads(executed.read_text("utf-8"))["cells"]
    shown = [output["data"] for cell in cells for output in cell.get("outputs", []) if "data" in output]
    return ["".join(data["text/html"]) for data in shown if "text/html" in data]


def page_of(executed):
    subprocess.run([sys.executable, "-m", "nbconvert", "--to", "html", executed.name], check=True, capture_output=True, cwd=executed.parent)
    return executed.with_suffix(".html")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A case of every name; the first one can be used, and holds a file that is not known."
    folder = tmp_path_factory.mktemp("data")
    for name in NAMES:
        (folder / "test" / name).mkdir(parents=True)
    (folder / "test" / NAMES[0]).rmdir()
    first = draw(folder / "test" / NAMES[0])
    shutil.copy(first / "ct_mask.nii.gz", first / f"{NAMES[0]}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def checked(data, tmp_path_factory):
    "The check app, executed on them."
    executed = tmp_path_factory.mktemp("checked") / "check.ipynb"
    wanted = {"data_dir": str(data), "splits": ["test"], "prealign": "header", "out_dir": str(executed.parent / "out")}
    papermill.execute_notebook(app("check"), executed, parameters=wanted, kernel_name="python3", progress_bar=False)
    return executed


@pytest.fixture(scope="module")
def results(data, tmp_path_factory):
    "The folder of a run in which all cases are there, and beside it their images."
    top = tmp_path_factory.mktemp("results")
    first = data / "test" / NAMES[0]
    register(
        first / "mr_t1.nii.gz", first / "ct.nii.gz", first / "ct_mask.nii.gz", out_dir=top / "one", method="rigid", spacing_mm=4.0, prealign="header"
    )
    for name in NAMES:
        with write_result(top / "run" / name) as aside:
            for file in ("metrics.json", "vertebrae.csv"):
                shutil.copy(top / "one" / file, aside / file)
        shutil.copytree(first, top / "data/test" / name)
    return top


def take(results, job):
    "Leave what a job leaves that is done."
    shutil.copytree(results / "run" / job.case, job.folder)
    inputs = inputs_of(job.parameters, job.cwd, Path(job.folder), hashed=True)
    record = {"format": "spinereg-job-1", **job._asdict(), "status": "done", "stage": "", "error": "", "hint": "", "inputs": inputs, "seconds": 1.0}
    write_record(Path(job.folder), record)
    return record


@pytest.fixture(scope="module")
def evaluated(results, tmp_path_factory):
    "The evaluation app with cases of every name that are done, in two settings; with more, pandas would leave rows out of its tables."
    executed = tmp_path_factory.mktemp("evaluated") / "evaluate.ipynb"
    settings = {name: {} for name in (MARKUP[0], FORMULAS[0])}
    for job in plan_jobs("register", results / "data/test", executed.parent / "out", settings):
        take(results, job)
    wanted = {"data_dir": str(results / "data"), "settings": settings, "out_dir": str(executed.parent / "out")}
    papermill.execute_notebook(app("evaluate"), executed, parameters=wanted, kernel_name="python3", progress_bar=False)
    return executed


def test_tables_of_the_apps_hold_text(checked, evaluated):
    """F-hostile: whatever a case, a file or a run is called, its table has the elements of a table; no name is taken for a formula."""
    for executed, prefix in ((checked, "test/"), (evaluated, "")):
        pages = tables(executed)
        assert len(pages) >= 3 and all("tex2jax_ignore" in page for page in pages)
        found = [Tags(page) for page in pages]
        assert set().union(*(page.kinds for page in found)) <= {"style", "div", "table", "thead", "tbody", "tr", "th", "td", "p"}
        words = {one_line(word) for page in found for word in page.words}
        assert {one_line(f"{prefix}{name}") for name in NAMES if len(name) < 50} <= words


def test_names_are_text_in_pages_that_a_browser_opens(checked, evaluated, lab):
    """F-hostile: nothing runs, and every name is read in a cell of a table, in the HTML that nbconvert makes of the apps."""
    for executed, prefix in ((checked, "test/"), (evaluated, "")):
        lab.page.goto(page_of(executed).as_uri())
        shown = {one_line(text) for text in lab.page.locator(".jp-OutputArea-output td, .jp-OutputArea-output th").all_text_contents()}
        assert {one_line(f"{prefix}{name}") for name in NAMES if len(name) < 50} <= shown
        assert lab.page.evaluate("window.ran") is None
        assert lab.page.locator(".jp-OutputArea-output").locator("img[src=x], svg[onload], input, script").count() == 0
        lab.shot(executed.stem)
    assert all("cdnjs" in url or "unpkg" in url for url in lab.tried)  # what nbconvert's own template asks for
    lab.tried.clear()


LIVE = (
    f"NAMES = {NAMES!r}\nimport sys; sys.path.insert(0, {str(ROOT / 'tests')!r})",
    """
from dataclasses import replace

import pandas as pd
from test_monitor import step_of
from test_viewers import make_stack
from spinereg.apps.paths import literal_tables
from spinereg.interactive.monitor import TrainingMonitor
from spinereg.interactive.view3d import niivue_widget
from spinereg.interactive.viewers import SliceViewer

stack = replace(make_stack(), names=NAMES[:3])
stack.labels["moving"].whole.mul_(2)
""",
    "SliceViewer(stack, show='fixed')",
    "niivue_widget(stack.images['fixed'], stack.labels['moving'], NAMES)",
    "monitor = TrainingMonitor()\nfor n in range(1, 4): monitor(step_of(n, of=3, cases=NAMES))",
    "literal_tables()\ntable = pd.DataFrame({'case': NAMES})\ndisplay(table, table.style)",
)


def test_names_are_text_in_live_viewers(lab):
    """F-hostile: words, menus and legends of the viewers and of the monitor in JupyterLab, and tables, where JupyterLab would write formulas."""
    lab.write("hostile.ipynb", *LIVE)
    lab.open("hostile.ipynb")
    lab.run_all(180)
    for cell, choices in ((2, ["-", *NAMES[:3]]), (4, list(NAMES))):
        menus = lab.outputs(cell).locator("select")
        found = [menus.nth(k).locator("option").all_text_contents() for k in range(menus.count())]
        assert list(map(one_line, choices)) in [list(map(one_line, texts)) for texts in found]
    assert MARKUP[1] in lab.outputs(2).locator(".widget-html pre").first.text_content()
    assert lab.outputs(3).locator(".widget-html b").all_text_contents() == list(NAMES)
    for table in lab.outputs(5).locator("table").all():
        shown = [one_line(text) for text in table.locator("td").all_text_contents()]
        assert shown[:-1] == [one_line(name) for name in NAMES[:-1]]  # pandas cuts the last one
    assert lab.page.evaluate("window.ran") is None
    lab.shot("live")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_picture_shows_a_name_as_it_is(name):
    """F-hostile: as a title, tick, legend and text."""
    fig = Picture(figsize=(4, 3))
    ax = fig.subplots()
    ax.plot([1, 2], label=f"run {name}")
    texts = [ax.set_title(name), ax.set_xlabel(name), fig.suptitle(name), fig.text(0, 0, name), *ax.legend().get_texts()]
    ax.set_yticks([1.5], [name])
    fig._repr_png_()
    assert not any(text.get_parse_math() for text in [*texts, *ax.get_yticklabels()])
    assert [text.get_text().removeprefix("run ") for text in [*texts, *ax.get_yticklabels()]] == [name] * 6


@pytest.mark.parametrize("name", FORMULAS[:4])
def test_the_pictures_of_the_package_show_a_name_as_it_is(name):
    """F-hostile: names of vertebrae, titles, and the case that a monitor looks at."""
    stack, overview = replace(make_stack(), names=(name,)), view()._replace(names=(name, name))
    SlicePicture(stack, first_view(stack, outlined=("moving",))).png()
    draw_overview(overview, name)._repr_png_()
    draw_bones(stack.labels["moving"].whole, stack.grid, (name,), name)._repr_png_()
    strip = Picture()
    draw_strip(list(strip.subplots(1, 2)), pd.DataFrame({"residual_rms_mm": [0.1]}, index=[name]))
    strip._repr_png_()
    monitor = TrainingMonitor()
    monitor(step_of(1, cases=(name,)))
    assert f"slices: {name}" in monitor.live.words.get_text()


def test_a_formula_is_no_wider_than_its_letters():
    """F-hostile: `$x$` is three letters and a tick of a logarithmic axis is a number, both without Matplotlib's mathematics."""
    fig = Picture(figsize=(4, 3))
    ax = fig.subplots()
    ax.loglog([0.001, 10], [1, 1e6])
    texts = [fig.text(0, 0, text) for text in ("$x$", "x")]
    fig._repr_png_()
    assert texts[0].get_window_extent().width > 2 * texts[1].get_window_extent().width
    assert not any("$" in label.get_text() for label in (*ax.get_xticklabels(), *ax.get_yticklabels("minor"), *ax.get_yticklabels()))


def test_words_and_legends_of_viewers_are_escaped():
    """F-hostile: without a browser."""
    stack = replace(make_stack(), names=MARKUP[:1])
    viewer = SliceViewer(stack)
    viewer.jump(MARKUP[0])
    legend = niivue_widget(stack.images["fixed"], stack.labels["moving"], MARKUP).children[0].value
    viewer.box  # noqa: B018  as a notebook would ask for it
    assert "&lt;img" in viewer.words.value and "<img" not in viewer.words.value
    assert Tags(legend).kinds == {"b"}


def test_a_training_comes_to_its_end(tmp_path):
    """F-hostile: cases of every name to learn and to validate on, with a monitor."""
    for seed, name in enumerate(NAMES):
        draw(tmp_path / "data/val" / name, seed)
    draw(tmp_path / "data/train/a", 99)
    monitor, shown = TrainingMonitor(fraction=1.0), []

    def watch(step):
        monitor(step)
        for case in range(len(step.cases)):
            monitor.case = case
            monitor.look(step)
            monitor.draw(step, False)
            shown.append(monitor.live.words.get_text())

    fitted = fit(tmp_path / "data", tmp_path / "out", epochs_similarity=1, epochs_rigidity=0, on_step=watch, **QUICK)
    assert set(fitted.validation.case) == set(pd.read_csv(tmp_path / "out/validation.csv").case) == {f"val/{name}" for name in NAMES}
    assert all(any(f"slices: val/{name}" in words for words in shown) for name in NAMES)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out"}


# written where they belong


def test_a_batch_comes_to_its_end(results, tmp_path, monkeypatch):
    """F-hostile: cases and settings of every name are registered into folders of their names, and are in tables and pictures under them."""
    monkeypatch.setattr(batch, "run_job", lambda job, limits, attempt: take(results, job))
    batch.run_batch("register", results / "data/test", tmp_path / "out", {name: {} for name in NAMES}, jobs=1)
    cases, vertebrae = read_batch(tmp_path / "out")
    for table in (cases, vertebrae):
        assert set(table.case) == set(table.setting) == set(NAMES)
    summary = compare_settings(cases, ["residual_rms_mean_mm"], NAMES[0])
    assert set(summary.index.get_level_values("setting")) == set(NAMES)
    draw_settings(cases, vertebrae).savefig(tmp_path / "settings.png")
    assert {path.parent.relative_to(tmp_path / "out").parts for path in tmp_path.rglob("metrics.json")} == {
        (setting, case) for setting in NAMES for case in NAMES
    }


@pytest.mark.parametrize("name", [*CLIMBING, "cases.csv", "report.html"], ids=ascii)
def test_a_setting_stays_in_its_folder(name, results, tmp_path, monkeypatch):
    """F-hostile: refused before anything is registered or written; the message says what was got and what is expected."""
    monkeypatch.setattr(batch, "run_job", lambda *_: pytest.fail("work had begun"))
    with pytest.raises(InputError) as refused:
        batch.run_batch("register", results / "data/test", tmp_path / "a/out", {"rigid": {}, name: {}}, jobs=1)
    assert repr(name[:80]).strip("'") in str(refused.value) and "Give" in str(refused.value)
    assert not tree(tmp_path)


@pytest.mark.parametrize("name", filter(None, CLIMBING), ids=ascii)
def test_a_case_stays_in_its_folder(name, results, tmp_path, monkeypatch):
    """F-hostile: from a table, refused before the work; a folder whose name is no UTF-8 is told, and the other cases are registered."""
    given = [Given("good", {}), Given(name, {})]
    with pytest.raises(InputError, match="case "):
        list(make_jobs("register", {}, "", given, tmp_path / "out"))
    assert not tree(tmp_path)


def test_a_case_of_a_table_has_a_name(tmp_path):
    """F-hostile: an empty field would be the folder of the batch itself."""
    (tmp_path / "cases.csv").write_text("case,seed\n,1\n")
    with pytest.raises(InputError, match="case ''"):
        batch.run_batch("register", tmp_path / "cases.csv", tmp_path / "out", jobs=1)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all names are Unicode")
def test_a_case_whose_name_is_no_text_does_not_end_a_batch(results, tmp_path, monkeypatch):
    """F-hostile: it has its row, which says why, and the others are done."""
    monkeypatch.setattr(batch, "run_job", lambda job, limits, attempt: take(results, job))
    shutil.copytree(results / "data/test" / NAMES[0], tmp_path / "data" / NAMES[0])
    shutil.copytree(results / "data/test" / NAMES[0], os.fsdecode(os.fsencode(tmp_path / "data") + b"/caf\xe9"))
    rows = batch.run_batch("register", tmp_path / "data", tmp_path / "out", jobs=1).set_index("case")
    assert rows.status[NAMES[0]] == "done" and rows.status["caf\\udce9"] == "failed" and "no UTF-8" in rows.error["caf\\udce9"]


@pytest.mark.parametrize("name", ["../climb", "../easy_1", "easy_../1", "/tmp/climb_0", "easy_1/../../climb_0", "clinical_\0"], ids=ascii)
def test_writers_of_cases_stay_in_their_folder(name, tmp_path, monkeypatch):
    """F-hostile: phantoms and half-real cases, whose folders are named after what is asked for."""
    with pytest.raises(ValueError, match="no case"):
        next(write_samples(tmp_path / "a/out", train=name))
    monkeypatch.setattr(halfreal, "read_spine", lambda *_: None)
    for wanted in ({"contrasts": [name]}, {"seeds": [name]}):
        with pytest.raises((ValueError, TypeError)):
            next(halfreal.write_halfreals(tmp_path / "a/out", **wanted))
    assert not tree(tmp_path)


# never run


class Bomb:
    "Makes a file where it is unpickled."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def pickled(path, place):
    "Write a bomb as PyTorch, pickle and NumPy do, one after the other."
    place.parent.mkdir(parents=True, exist_ok=True)
    yield torch.save({"format": Bomb(path)}, place)
    yield place.write_bytes(pickle.dumps(Bomb(path)))
    with place.open("wb") as file:
        np.savez(file, state=np.array([Bomb(path)], dtype=object))
    yield None


def test_a_pickle_is_never_run(tmp_path):
    """F-hostile: in place of a checkpoint, a prepared case, weights, an image, labels or a transform."""
    case, went_off = case_of(draw(tmp_path / "data/train/a")), tmp_path / "went off"
    draw(tmp_path / "data/val/b", 1)
    kept = OnDisk(PrepareCase(4.0, "header"), tmp_path / "kept")
    files = case.files()
    readers = {
        tmp_path / "out/last.pt": lambda: fit(tmp_path / "data", tmp_path / "out", resume=True, **QUICK),
        kept.path(case): lambda: kept(case),
        tmp_path / "weights/best.safetensors": lambda: load_network(tmp_path / "weights"),
        tmp_path / "weights.pt": lambda: load_network(tmp_path / "weights.pt"),
        tmp_path / "ct.nii.gz": lambda: register(files["fixed"], tmp_path / "ct.nii.gz"),
        tmp_path / "ct.npz": lambda: register(files["fixed"], tmp_path / "ct.npz"),
        tmp_path / "mask.nii": lambda: register(files["fixed"], files["moving"], tmp_path / "mask.nii"),
        tmp_path / "transform.h5": lambda: read_transform(tmp_path / "transform.h5"),
    }
    for place, read in readers.items():
        for _ in pickled(went_off, place):
            anew = place == kept.path(case)  # what was kept of a case is made again
            with contextlib.nullcontext() if anew else pytest.raises(Exception):  # noqa: B017, PT011 what each says is the subject of its own test
                read()
            assert not went_off.exists(), place
    pickle.loads(pickle.dumps(Bomb(went_off))).close()
    assert went_off.exists(), "it does go off where a pickle is run"


def test_nothing_in_the_package_reads_a_pickle():
    """F-hostile: PyTorch's files are read as weights only; no other reader of pickles is there."""
    text = "".join(path.read_text("utf-8") for path in (ROOT / "spinereg").rglob("*.py"))
    loads = re.findall(r"torch\.load\(.*", text)
    assert loads and all("weights_only=True" in line for line in loads)
    assert not re.search(
        r"\bpickle|np\.load\(|allow_pickle|read_pickle|joblib|\bdill\b|shelve|marshal|\beval\(|\bexec\(", text.replace(".eval()", "")
    )


def test_check_lists_cases_of_every_name(data, tmp_path):
    """F-hostile: in the table and in check.csv."""
    table = check(data, ["test"], prealign="header", out_dir=tmp_path)
    for found in (table, pd.read_csv(tmp_path / "check.csv")):
        assert {f"test/{name}" for name in NAMES} == set(found.case)
