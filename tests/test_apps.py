"""Every app notebook runs through papermill, on data_samples, into a temporary folder."""

import ast
import json
import shutil
from pathlib import Path

import papermill
import pytest

from spinereg.apps import command

ROOT = Path(__file__).resolve().parent.parent
APPS = sorted((ROOT / "nbs/apps").glob("*.ipynb"))
COARSE = {"method": "optimise", "spacing_mm": 4.0, "prealign": "header"}  # no search for a rigid start
QUICKER = {
    "samples": {"train": "easy_6", "val": "", "test": ""},
    "check": {"prealign": "header"},
    "register": {"spacing_mm": 2.0, "prealign": "header", "steps": [10, 10, 5]},
    "rigidify": {"spacing_mm": 2.0},
    "elastix": {"spacing_mm": 3.0, "prealign": "header", "iterations": 5, "samples": 1000},
    "evaluate": {"split": "val", "settings": {"pre-aligned": COARSE | {"method": "rigid"}, "optimised": COARSE | {"steps": [5, 5, 5]}}},
}


def run(path, executed, cwd=ROOT, **parameters):
    papermill.execute_notebook(path, executed, parameters=parameters, cwd=cwd, kernel_name="python3", progress_bar=False)


def checked_twice(notebook):
    "The notebook with its check of the parameters once more at the end, as for somebody who runs the upper cells again."
    trees = [ast.parse("".join(cell["source"])) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "given_parameters"]
    again = {"cell_type": "code", "id": "again", "metadata": {}, "execution_count": None, "outputs": [], "source": "\n".join(map(ast.unparse, calls))}
    return notebook | {"cells": [*notebook["cells"], again]}


@pytest.mark.parametrize("path", APPS, ids=[path.stem for path in APPS])
def test_app_runs_on_data_samples_and_leaves_a_small_notebook(path, tmp_path):
    """D4, D9: the executed notebook is at most 5 MB. What an app computes is the subject of the module tests."""
    app, executed = tmp_path / path.name, tmp_path / "executed.ipynb"
    app.write_text(json.dumps(checked_twice(json.loads(path.read_text("utf-8")))), "utf-8")
    run(app, executed, out_dir=str(tmp_path / "out"), **QUICKER.get(path.stem, {}))
    assert executed.stat().st_size <= 5_000_000
    assert any((tmp_path / "out").iterdir())


def test_an_app_opened_by_hand_writes_where_papermill_does(tmp_path):
    """In its own folder of a checkout, as JupyterLab runs it: to `out` at the top, and it prints where."""
    top, executed = tmp_path / "spinereg", tmp_path / "executed.ipynb"
    shutil.copytree(ROOT / "data_samples/val", top / "data_samples/val")
    (top / "nbs/apps").mkdir(parents=True)
    run(ROOT / "nbs/apps/check.ipynb", executed, cwd=top / "nbs/apps", splits=["val"], prealign="header")
    table = top / "out/check/check.csv"
    assert table.is_file() and not any((top / "nbs/apps").iterdir())
    assert json.dumps(str(table))[1:-1] in executed.read_text("utf-8")


def test_a_relative_out_dir_of_a_shell_begins_in_its_current_folder(tmp_path, monkeypatch):
    """The app is told so, as by itself it would begin at the top of the checkout."""
    jobs = []
    monkeypatch.setattr(command, "run_job", lambda job, listen: jobs.append(job) or {"status": "done"})
    (tmp_path / "data_samples").mkdir()
    monkeypatch.chdir(tmp_path / "data_samples")
    assert command.main(["check", "--out_dir", "mine"]) == command.main(["check"]) == 0
    here = Path.cwd()
    assert [job.parameters["out_dir"] for job in jobs] == [job.folder for job in jobs] == [str(here / "mine"), str(here / "out/check")]


def test_d6_an_app_refuses_a_parameter_it_does_not_have(tmp_path):
    """D6: a misspelt name stops the run before it has begun, and the message names those there are."""
    with pytest.raises(papermill.PapermillExecutionError, match=r"check: splitz is not a parameter \(splits\?\)\. Parameters: data_dir, .*splits"):
        run(ROOT / "nbs/apps/check.ipynb", tmp_path / "executed.ipynb", splitz=["train"], out_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
