"""Time the elastix program beside the elastix of Python, on the same images with the same parameters and one thread each.

python tests/benchmarks/elastix_program.py                       # a sample case; needs the program: apt-get install elastix
python tests/benchmarks/elastix_program.py --spacing-mm 1 --iterations 500 --samples 65536   # as published
"""

import argparse
import contextlib
import io
import re
import shutil
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import psutil
import SimpleITK as sitk

from spinereg.compare.elastix import ElastixError, ElastixSettings, bone_mask, need_elastix, parameter_map, run_child, write_inputs
from spinereg.learning.cases import find_case
from spinereg.registration.register import prepare
from spinereg.registration.scene import make_batch

ROOT = Path(__file__).resolve().parents[2]


def parameter_text(parameters: dict[str, list[str]]) -> str:
    "Parameters as the program reads them from a file."
    words = {name: " ".join(value if re.fullmatch(r"[-+.\de]+", value) else f'"{value}"' for value in values) for name, values in parameters.items()}
    return "".join(f"({name} {value})\n" for name, value in words.items())


def run_program(folder: Path, steps: int, timeout_s: float) -> None:
    "The program on a folder that `write_inputs` has filled."
    images = [word for flag, name in (("-f", "fixed"), ("-m", "moving"), ("-fMask", "mask")) for word in (flag, f"{name}.mha")]
    command = ["elastix", *images, "-p", "parameters.txt", "-out", ".", "-threads", "1"]
    subprocess.run(command, cwd=folder, timeout=timeout_s, check=True, stdout=subprocess.DEVNULL)
    field = ["transformix", "-def", "all", "-tp", "TransformParameters.0.txt", "-out", ".", "-threads", "1"]
    subprocess.run(field, cwd=folder, timeout=timeout_s, check=True, stdout=subprocess.DEVNULL)
    shutil.move(folder / "deformationField.mhd", folder / "field.mhd")


def measure(run, folder: Path, steps: int, timeout_s: float) -> dict:
    "Seconds of the clock and of the processor, milliseconds per step on each level, the similarity at the end."
    before, began = psutil.Process().cpu_times(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        run(folder, steps, timeout_s)
    seconds, after = time.perf_counter() - began, psutil.Process().cpu_times()
    tables = [pd.read_csv(folder / f"IterationInfo.0.R{n}.txt", sep=r"\t", engine="python") for n in range(3)]
    per_step = {f"ms per step, level {n + 1}": table["Time[ms]"].median() for n, table in enumerate(tables)}
    cpu = sum(getattr(after, kind) - getattr(before, kind) for kind in ("children_user", "children_system"))
    return {"s": seconds, "CPU s": cpu, **per_step, "similarity at the end": tables[-1]["2:Metric0"].iloc[-20:].mean()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", type=Path, nargs="?", default=ROOT / "data_samples/test/easy_0", help="folder of a case")
    parser.add_argument("--spacing-mm", type=float, default=2.0)
    parser.add_argument("--iterations", type=int, default=60, help="on each of the three levels")
    parser.add_argument("--samples", type=int, default=16384)
    given = parser.parse_args()
    if shutil.which("elastix") is None:
        return print("left out: there is no program `elastix` here (Debian has it: apt-get install elastix)")
    try:
        need_elastix()
    except ElastixError as error:
        return print(f"left out: {error}")
    files = find_case(given.case)[0].files()
    with contextlib.redirect_stdout(io.StringIO()):
        prepared = prepare(ElastixSettings(**files, prealign="labels", spacing_mm=given.spacing_mm, device="cpu"))
    batch, bone = make_batch(prepared.scene, prepared.grid, given.spacing_mm), bone_mask(prepared.scene, prepared.grid)
    said = subprocess.run(["elastix", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    ways = {f"program {said}": run_program, f"Python, itk-elastix {version('itk-elastix')}": run_child}
    rows, fields = {}, {}
    for penalty, weight in (("with the penalty", 0.5), ("without", 0.0)):
        parameters = parameter_map(iterations=given.iterations, samples=given.samples, weight_rigidity=weight)
        for name, run in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                write_inputs(Path(folder), batch, bone, parameters)
                (Path(folder) / "parameters.txt").write_text(parameter_text(parameters))
                rows[name, penalty] = measure(run, Path(folder), 3 * given.iterations, 3600.0)
                (file,) = Path(folder).glob("field.m[h][ad]")
                fields[name, penalty] = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    print(f"{given.case.name}, {prepared.grid}, {given.iterations} steps on each of three levels, {given.samples} samples, one thread")
    print(pd.DataFrame(rows).T.to_string(float_format="{:.4g}".format))
    for penalty in ("with the penalty", "without"):
        apart = ((fields[list(ways)[0], penalty] - fields[list(ways)[1], penalty]) ** 2).sum(-1) ** 0.5
        print(f"fields apart, {penalty}: {apart.mean():.3f} mm in the mean, {apart.max():.3f} at most")


if __name__ == "__main__":
    main()
