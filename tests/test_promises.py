"""The page of promises: every row is there once, says what is not kept and why, and is proven by tests that exist and carry its id."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "nbs/promises.md").read_text("utf-8")
RESULTS = ("kept", "kept in part", "not kept")
NUMBERED = {"A": 14, "B": 6, "C": 15, "D": 12, "E": 5, "X": 23, "S": 10}
OTHERS = ["F1", "F2", "F2b", "F3", "F3a", "F3b", "F3c", "F3d", "F3e", "F4", "F4b", "F5", "F6", "F7", "F8", "F10", "F11", "F14", "F16", "F17"]
OTHERS += ["F-hostile", "D-kill", "D-manifest", "D-full-disk"]


def rows():
    "The cells of every row: id, promise, result, tests, what is not kept."
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")]
    return [line for line in lines if line[0] != "id"]


ROWS = rows()
PROOFS = [(row[0], *test) for row in ROWS for test in re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[3])]


@cache
def words(file):
    "Name and docstring of every test of a file."
    tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
    return {node.name: f"{node.name} {ast.get_docstring(node) or ''}" for node in tree.body if isinstance(node, ast.FunctionDef)}


def carries(text, name):
    "Whether a text names an id: `test_d_kill_x` names D-kill, `test_A14_x` does not name A1."
    return re.search(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])".lower(), text.lower().replace("_", "-")) is not None


def test_every_row_is_there_once():
    expected = [f"{letter}{number}" for letter, last in NUMBERED.items() for number in range(1, last + 1)] + OTHERS
    assert Counter(row[0] for row in ROWS) == Counter(expected)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_row_is_a_promise_with_a_result_and_its_proof(row):
    """One sentence or more; what is kept has a test, and what is not fully kept says why and what to do."""
    assert len(row) == 5
    name, promise, result, proof, open_ = row
    assert promise.endswith(".") and result in RESULTS
    assert bool(proof) or result == "not kept"
    assert not re.sub(r"`test_\w+\.py::test_\w+`(, )?", "", proof), "tests are given as `file.py::name`"
    assert re.sub(r"<!--.*?-->", "", open_).strip().endswith(".") or (result == "kept" and not open_), name


def test_every_proof_exists_and_carries_the_id_of_its_row():
    """In its name, or in its docstring: `X4: ...`."""
    missing = [f"{file}::{test}" for _, file, test in PROOFS if test not in words(file)]
    assert not missing
    assert not [f"{name}: {file}::{test}" for name, file, test in PROOFS if not carries(words(file)[test], name)]


def test_ids_are_not_taken_for_one_another():
    assert carries("test_d_kill_a_save", "D-kill") and carries("test_x A1, F2b: both", "F2b")
    assert not carries("test_A14_header", "A1") and not carries("test_F2b_bone", "F2")


def test_the_counts_above_the_tables_are_right():
    count = Counter(row[2] for row in ROWS)
    said = f"Of {len(ROWS)} promises {count['kept']} are kept, {count['kept in part']} are kept in part, and {count['not kept']} are not kept."
    assert said in PAGE, said


def test_readers_are_led_to_the_page():
    for place, link in (("README.md", "nbs/promises.md"), ("nbs/index.ipynb", "promises.md")):
        assert f"]({link})" in (ROOT / place).read_text("utf-8")
