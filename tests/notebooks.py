"""Runs the notebooks as nbdev_test does, with its arguments, and compares the text they print with what is stored in them.

    python tests/notebooks.py --n_workers 2
    python tests/notebooks.py --path nbs/00_space.geometry.ipynb

A text is stale where its words differ, or a number by more than one step in the last place shown, a thousandth, and 1e-4, whichever is
largest (whole numbers: by more than a thousandth). Pictures, progress bars, addresses and temporary folders are not compared, nor is a cell
with a comment `# output varies: why`. Another system or other versions than those of constraints.txt may print otherwise: there, nothing is compared.
"""

import json
import re
import sys
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

import nbdev.test
import pandas
from execnb.shell import CaptureShell

ROOT = Path(__file__).resolve().parent.parent
VARIES = re.compile(r"(?m)^# output varies: (.+)")
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?(?!\w)")
FLEETING = re.compile(r"(?m)^.*\d+ ?% ?\|.*$|^<\w+ size \d+x\d+ with \d+ Axes>$")
PASSING = re.compile(r"0x[0-9a-f]{6,}|(?:[\w:]|\\\\?|/)*[/\\]tmp\w{6,}")


def texts(outputs):
    "What a cell printed and displayed as text: first the stream, then one text per displayed value."
    stream = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream" and output["name"] == "stdout")
    shown = [output["data"] for output in outputs if "data" in output]
    shown = [data for data in shown if not any(kind.startswith(("image/", "application/")) for kind in data)]
    found = [stream, *("".join(data.get("text/markdown") or data.get("text/plain", "")) for data in shown)]
    found = [" ".join(PASSING.sub("...", FLEETING.sub("", text.replace("\r", "\n"))).split()) for text in found]
    return [found[0], *filter(None, found[1:])]


def close(stored, fresh):
    "Whether two numbers, as printed, mean the same."
    difference = abs(float(stored) - float(fresh))
    allowed = 1e-3 * max(abs(float(stored)), abs(float(fresh)))
    if "." in stored + fresh or "e" in stored + fresh:
        allowed = max(allowed, 1e-4, *(last_place(text) for text in (stored, fresh)))
    return difference <= allowed


def last_place(number):
    "One step in the last place shown: 0.01 for 3.14, with a little room for binary fractions."
    mantissa, _, exponent = number.partition("e")
    return 1.001 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def alike(stored, fresh):
    "Whether two texts have the same words, and numbers that mean the same."
    pairs = zip(NUMBER.findall(stored), NUMBER.findall(fresh))
    return NUMBER.sub("#", stored) == NUMBER.sub("#", fresh) and all(close(*pair) for pair in pairs)


def difference(stored, fresh):
    "The two texts from shortly before the first word that differs."
    one, two = stored.split(), fresh.split()
    first = next((number for number, pair in enumerate(zip(one, two)) if not alike(*pair)), min(len(one), len(two)))
    return "\n".join(f"  {name}: {' '.join(words[max(first - 5, 0) : first + 25])}" for name, words in (("stored", one), ("fresh ", two)))


class StaleOutput(Exception):
    "Stored outputs are not those of this run."


class ComparingShell(CaptureShell):
    "The shell of nbdev_test, which says what came out differently after a notebook has run."

    def run_all(self, nb, **kwargs):
        stored = {cell.idx_: cell.get("outputs", []) for cell in nb.cells if cell.cell_type == "code"}
        for cell in nb.cells:
            cell.outputs = []
        pandas.set_option("display.max_columns", 20)  # as in a kernel: without one, tables are made to fit the terminal
        executed = []
        super().run_all(nb, postproc=executed.append, **kwargs)
        compared = [cell for cell in executed if cell.cell_type == "code" and not VARIES.search(cell.source)]
        pairs = [(cell.idx_, *pair) for cell in compared for pair in zip_longest(texts(stored[cell.idx_]), texts(cell.outputs), fillvalue="")]
        stale = [f"\ncell {number}\n{difference(one, two)}" for number, one, two in pairs if not alike(one, two)]
        if stale:
            self.exc = StaleOutput("".join(stale))
            raise self.exc

    def prettytb(self, fname=None):
        return f"\n{fname}: stale outputs{self.exc}\n" if isinstance(self.exc, StaleOutput) else super().prettytb(fname)


def left_out():
    "Every cell that is not compared, and why."
    for path in sorted([*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs/tutorials").glob("*.ipynb")]):
        for number, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
            if why := VARIES.search("".join(cell["source"])):
                yield f"{path.relative_to(ROOT / 'nbs')}, cell {number}: {why.group(1)}"


def as_stored():
    "Whether this is a system with the versions that the stored outputs were made with."
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line)
    return sys.platform == "linux" and all(version(name).split("+")[0] == pins[name] for name in ("numpy", "pandas", "torch"))


if __name__ == "__main__":
    if as_stored():
        nbdev.test.CaptureShell = ComparingShell
        print("Not compared:", *left_out(), sep="\n  ")
    else:
        print("Stored outputs are not compared: they were made on Linux with the versions of constraints.txt.")
    nbdev.test.nbdev_test()
