"""Break one line in each of some exported functions, drawn at random, and see whether its notebook or a test notices.

    python tests/benchmarks/broken_lines.py --count 20 --seed 0
    python tests/benchmarks/broken_lines.py --count 5 --seed 1 --modules space files losses measure

Every break is made in a temporary copy of the project: in the notebook, which is then exported again. The notebook runs first, its stored outputs
compared; if it notices nothing, so do the tests that import the module, those that name the function before the others. The answers are
kept in a file of JSON lines (`--out`), and a second call goes on where the first was stopped. The project itself must be green beforehand.
"""

import argparse
import ast
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from os import environ
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SIGNS = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "**": "*", "%": "*", "@": "+", "&": "|", "|": "&"}
SIGNS |= {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "==", "in": "not in", "not in": "in", "is": "is not", "is not": "is"}
SIGNS |= {"and": "or", "or": "and"}


class Break(NamedTuple):
    "One line of one function, as it is and broken."

    notebook: str  # its file name
    function: str  # such as `Grid.inverse`
    cell: int  # in the notebook
    line: int  # in the cell, from 0
    before: str
    after: str


def replaced(lines: list[str], start: tuple[int, int], end: tuple[int, int], text: str) -> tuple[int, str] | None:
    "The number of a line and the line with a part replaced; None where the part spans lines."
    if start[0] != end[0]:
        return None
    line = lines[start[0] - 1].encode()  # columns are counted in bytes
    return start[0] - 1, (line[: start[1]] + text.encode() + line[end[1] :]).decode()


def flip(lines: list[str], left: ast.expr, right: ast.expr) -> tuple[int, str] | None:
    "The operator between two operands, turned into another."
    if left.end_lineno != right.lineno:
        return None
    between = lines[right.lineno - 1].encode()[left.end_col_offset : right.col_offset].decode()
    sign = between.strip("() ")
    start = left.end_col_offset + between.find(sign)
    return replaced(lines, (right.lineno, start), (right.lineno, start + len(sign)), SIGNS[sign]) if sign in SIGNS else None


def changed(value: complex | bool) -> str:
    "Another constant of the same kind."
    return str(not value) if isinstance(value, bool) else repr(value + 1 if isinstance(value, int) else 2 * value + 1)


def broken(lines: list[str], node: ast.AST) -> Iterator[tuple[int, str] | None]:
    "All that can be broken at one node: a sign or comparison flipped, a term dropped, a constant changed."
    start, end = (getattr(node, "lineno", 0), getattr(node, "col_offset", 0)), (getattr(node, "end_lineno", 0), getattr(node, "end_col_offset", 0))
    match node:
        case ast.BinOp(left=left, right=right):
            yield flip(lines, left, right)
            if isinstance(node.op, ast.Add | ast.Sub):
                yield replaced(lines, (left.end_lineno, left.end_col_offset), end, "")
        case ast.Compare(left=left, comparators=[right]):
            yield flip(lines, left, right)
        case ast.BoolOp(values=[left, right, *_]):
            yield flip(lines, left, right)
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield replaced(lines, start, (operand.lineno, operand.col_offset), "")
        case ast.Constant(value=bool() | int() | float()):
            yield replaced(lines, start, end, changed(node.value))


def breaks_of(source: str, function: ast.FunctionDef) -> list[tuple[int, str]]:
    "Every way to break one line in the body of a function, so that it is still Python."
    lines = source.splitlines()
    texts = [node for node in ast.walk(function) if isinstance(node, ast.JoinedStr)]  # inside an f-string, columns are not told
    inside = [node for text in texts for node in ast.walk(text)]
    nodes = [node for part in function.body for node in ast.walk(part) if node not in inside]
    found = [way for node in nodes for way in broken(lines, node) if way is not None and way[1] != lines[way[0]]]
    return [(line, text) for line, text in found if parses("\n".join([*lines[:line], text, *lines[line + 1 :]]))]


def parses(source: str) -> bool:
    try:
        return bool(ast.parse(source))
    except SyntaxError:
        return False


def functions_of(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    "Public functions and methods by name."
    for node in tree.body:
        for name, inner in [("", node)] if isinstance(node, ast.FunctionDef) else [(f"{node.name}.", i) for i in getattr(node, "body", ())]:
            if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_") | name.startswith("_"):
                yield name + inner.name, inner


def draw(count: int, seed: int, wanted: list[str]) -> list[Break]:
    "Functions drawn at random, and in each of them one line and one way to break it."
    choice, functions = random.Random(seed), []
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        if wanted and not any(re.search(rf"[_.]{name}\.", path.name) for name in wanted):
            continue
        for number, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and re.match(r"#\|\s*export", source):
                functions += [(path.name, name, number, source, function) for name, function in functions_of(ast.parse(source))]
    choice.shuffle(functions)
    drawn = []
    for notebook, name, number, source, function in functions:
        ways = breaks_of(source, function)
        if ways and len(drawn) < count:
            line = choice.choice(sorted({line for line, _ in ways}))
            after = choice.choice([text for at, text in ways if at == line])
            drawn.append(Break(notebook, name, number, line, source.splitlines()[line], after))
    return drawn


def copy_project(top: Path) -> None:
    "All that is needed to export, to run a notebook and to test; the samples are linked."
    for name in ("nbs", "spinereg", "tests"):
        shutil.copytree(ROOT / name, top / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, top)
    (top / "data_samples").symlink_to(ROOT / "data_samples")


def tests_of(item: Break) -> list[str]:
    "The test files that import the module, those that name the function first."
    floor, module = re.fullmatch(r"\d+_(\w+)\.(\w+)\.ipynb", item.notebook).groups()
    imports = re.compile(rf"(?:from|import) spinereg\.{floor}(?:\.{module}\b| import .*\b{module}\b)")
    tests = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if path.stem not in ("test_project", "test_browser")]
    texts = {path: path.read_text("utf-8") for path in tests}
    used = [path for path in tests if imports.search(texts[path])]
    name = item.function.split(".")[-1]
    return [str(path.relative_to(ROOT)) for path in sorted(used, key=lambda path: not re.search(rf"\b{name}\b", texts[path]))]


def fails(command: list[str], top: Path, timeout_s: float) -> str | None:
    "The last words of a command that fails, or that does not end; None where it succeeds."
    where = environ | {"PYTHONPATH": str(top), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run([sys.executable, *command], cwd=top, env=where, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return f"no end after {timeout_s:.0f} s"
    said = re.findall(r"(?m)^(?:E  |\w*(?:Error|Exception|Warning)\b|  stored|  fresh).*", done.stdout + done.stderr)
    return (said or [(done.stdout + done.stderr)[-200:]])[-1].strip()[:200] if done.returncode else None


def try_out(item: Break, timeout_s: float) -> dict:
    "Where a break is noticed first, and with what words."
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        copy_project(top)
        path = top / "nbs" / item.notebook
        notebook = json.loads(path.read_text("utf-8"))
        lines = "".join(notebook["cells"][item.cell]["source"]).splitlines(keepends=True)
        lines[item.line] = item.after + "\n" * lines[item.line].endswith("\n")
        notebook["cells"][item.cell]["source"] = lines
        path.write_text(json.dumps(notebook), "utf-8")
        subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=top, check=True, capture_output=True)
        steps = {item.notebook: ["tests/notebooks.py", "--path", f"nbs/{item.notebook}", "--n_workers", "0"]}
        steps |= {test: ["-m", "pytest", "-q", "-x", test] for test in tests_of(item)}
        for step, command in steps.items():
            if said := fails(command, top, timeout_s):
                return {"noticed_by": step, "said": said}
    return {"noticed_by": None, "said": ""}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="*", default=[], help="floors or modules to draw from; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "out/broken_lines.jsonl")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for a notebook or a test file")
    parser.add_argument("--list", action="store_true", help="only say what would be broken")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in given.out.read_text("utf-8").splitlines()] if given.out.exists() else []
    answers = {Break(**{name: row[name] for name in Break._fields}): row for row in known}
    drawn = draw(given.count, given.seed, given.modules)
    for item in drawn:
        print(f"\n{item.notebook}: {item.function}\n  - {item.before.strip()}\n  + {item.after.strip()}", flush=True)
        if given.list:
            continue
        if item not in answers:
            start = time.perf_counter()
            answers[item] = item._asdict() | try_out(item, given.timeout) | {"seconds": round(time.perf_counter() - start)}
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(answers[item]) + "\n")
        print(f"  {answers[item]['noticed_by'] or 'NOT NOTICED'}: {answers[item]['said']}", flush=True)
    print(f"\n{sum(bool(answers[item]['noticed_by']) for item in drawn if item in answers)} of {len(drawn)} breaks were noticed")


if __name__ == "__main__":
    main()
