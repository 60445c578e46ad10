"""Register phantoms and half-real cases by several methods, all from the same rigid start, one JSON line per case and method, and print a table.

python tests/benchmarks/rivals.py out/rivals --seeds 0 1 2                      # phantoms, three levels, drawn on the way
python tests/benchmarks/rivals.py out/rivals --levels --cases out/half/*/       # half-real cases, as write_halfreal leaves them

A second call does what is missing. ANTs is asked for in a Python that has antspyx (--ants-python), ConvexAdam in this one (pip install convexAdam);
where one of them is not installed, its rows are left out, and the table says so. Seconds are those of finding the field, without reading,
pre-alignment and measuring.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch
from bench import keep_rows, markdown, measure_map, phantom_case, read_rows
from polyrigid_table import blended, everywhere
from torch import Tensor

import spinereg
from spinereg.compare.elastix import own_frame, read_disp, write_inputs
from spinereg.files.foreign import whole_transform
from spinereg.files.transforms import SpineTransform, itk_image, write_motions
from spinereg.learning.cases import find_case
from spinereg.losses.objective import Batch
from spinereg.registration.register import Inputs, Prepared, prepare
from spinereg.registration.scene import make_batch
from spinereg.space.fields import along_axes, warp_labels
from spinereg.space.geometry import transform_points
from spinereg.space.polyrigid import Polyrigid, distance_map, fine_labels


class Leave(Exception):
    "A method that is not installed here."


@dataclass(frozen=True)
class Start:
    "A case with the rigid start that all methods share."

    files: dict[str, str]  # images and moving labels, as `register` takes them
    prealign: Path  # the start as a transform file
    prepared: Prepared
    truth: dict  # truth.json
    ants_python: str

    @property
    def batch(self) -> Batch:  # both images on the working grid
        return make_batch(self.prepared.scene, self.prepared.grid, float(self.prepared.grid.spacing_mm[0]))


class Found(NamedTuple):
    "What a method found."

    transform: SpineTransform
    seconds: float


def begin(case: Path, folder: Path, given: argparse.Namespace) -> Start:
    "Read a case and find its rigid start."
    files = {name: path for name, path in find_case(case)[0].files().items() if path}
    modalities = {"moving_modality": "ct", "fixed_modality": "mr"}
    prepared = prepare(Inputs(**files, **modalities, device="cpu", spacing_mm=given.spacing_mm))
    folder.mkdir(parents=True, exist_ok=True)
    write_motions(folder, {"start": prepared.start.rigid})
    asked = {name: files[name] for name in ("fixed", "moving", "moving_labels")} | modalities | {"spacing_mm": given.spacing_mm}
    truth = json.loads((case / "truth.json").read_text("utf-8"))
    return Start(asked, folder / "vertebrae/start.tfm", prepared, truth, given.ants_python)


# the methods


def asked(function: Callable, start: Start, **more) -> Found:
    "One of our own functions, which measures as well."
    result = function(**start.files, prealign=start.prealign, **more)
    return Found(result.transform, sum(time for stage, time in result.metrics.seconds.items() if stage not in ("read", "prealign", "measure")))


def timed(find: Callable[[Start], Tensor], start: Start) -> Found:
    "A method that gives a displacement on the working grid, mm along its axes."
    began = time.perf_counter()
    disp = find(start)
    return Found(whole_transform(disp, start.prepared.grid, start.prepared.start.rigid), time.perf_counter() - began)


def vertebra_motion(fixed: sitk.Image, moving: sitk.Image, bone: sitk.Image) -> np.ndarray:  # (4, 4), fixed -> moving
    "The rigid motion of one bone of the moving image: mutual information within 3 mm of it, three levels."
    box = sitk.LabelShapeStatisticsImageFilter()
    box.Execute(bone)
    corner, size = np.array(box.GetBoundingBox(1)[:3]), np.array(box.GetBoundingBox(1)[3:])
    low = np.maximum(corner - 15 / np.array(fixed.GetSpacing()), 0).astype(int)
    high = np.minimum(corner + size + 15 / np.array(fixed.GetSpacing()), fixed.GetSize()).astype(int)
    part = sitk.RegionOfInterest(fixed, (high - low).tolist(), low.tolist())
    turn = sitk.Euler3DTransform()
    turn.SetCenter(box.GetCentroid(1))
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricMovingMask(sitk.BinaryDilate(bone, [round(3 / s) for s in fixed.GetSpacing()]))
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(learningRate=1.0, minStep=1e-3, numberOfIterations=150)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([2, 1, 0])
    method.SetInitialTransform(turn, inPlace=True)
    method.Execute(part, moving)
    motion, centre = np.eye(4), np.array(turn.GetCenter())
    motion[:3, :3] = np.array(turn.GetMatrix()).reshape(3, 3)
    motion[:3, 3] = centre + turn.GetTranslation() - motion[:3, :3] @ centre
    return motion


def one_by_one(start: Start) -> Tensor:
    "Every vertebra registered by itself with SimpleITK, and the displacements blended between them."
    grid, rigid, labels, batch = start.prepared.grid, start.prepared.start.rigid, start.prepared.scene.labels, start.batch
    here = warp_labels(labels.data[None], labels.grid, grid, world=rigid)[0][0]
    fixed, moving = (itk_image(image[0, 0].numpy(), own_frame(grid)) for image in (batch.fixed, batch.moving))
    seen = [k for k in range(1, len(labels.names) + 1) if (here == k).sum() * grid.spacing_mm.prod() > 1000]
    frame = np.eye(4)
    frame[:3, :3], frame[:3, 3] = grid.axes, grid.affine[:3, 3]
    poses = []
    for k in seen:
        motion = vertebra_motion(fixed, moving, itk_image((here == k).byte().numpy(), own_frame(grid)))
        poses.append(torch.from_numpy(rigid @ frame @ motion @ np.linalg.inv(frame)))
    whole, voxels = fine_labels(labels.data, labels.grid)
    poly = Polyrigid(tuple(distance_map(whole == k, voxels) for k in seen), torch.stack(poses), torch.from_numpy(rigid))
    points = grid.points_mm(torch.zeros(1, dtype=torch.float64))
    vectors = everywhere(blended, poly, grid)[0].movedim(0, -1).double() @ torch.from_numpy(grid.axes.T)
    return along_axes((transform_points(np.linalg.inv(rigid), points + vectors) - points)[None], grid).float()


SYN = """import ants
fixed, moving, mask = (ants.image_read(f"{name}.mha") for name in ("fixed", "moving", "mask"))
ants.registration(fixed, moving, "SyNOnly", initial_transform="identity", mask=mask, outprefix="syn", reg_iterations=(100, 70, 50, 20), random_seed=1)
"""


def syn(start: Start) -> Tensor:
    "Symmetric normalisation of ANTs (Avants et al. 2008): mutual information, four levels, the iterations of its own scripts."
    if subprocess.run([start.ants_python, "-c", "import ants"], capture_output=True, check=False).returncode:
        raise Leave(f"{start.ants_python} has no antspyx (--ants-python names one that has)")
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), start.batch, None, {})
        subprocess.run([start.ants_python, "-c", SYN], cwd=folder, check=True, capture_output=True)
        (warped,) = Path(folder).glob("syn*[0-9]Warp.nii.gz")
        sitk.WriteImage(sitk.ReadImage(str(warped)), f"{folder}/field.mha")
        return read_disp(Path(folder))


def convex_adam(start: Start) -> Tensor:
    "Convex optimisation with Adam (Siebert et al. 2021), MIND features, the package's own settings."
    if find_spec("convexAdam") is None:
        raise Leave("convexAdam is not installed here: pip install convexAdam")
    from convexAdam.convex_adam_MIND import convex_adam_pt

    voxels = convex_adam_pt(start.batch.fixed[0, 0], start.batch.moving[0, 0], dtype=torch.float32, device=torch.device("cpu"))
    return float(start.prepared.grid.spacing_mm[0]) * torch.from_numpy(voxels).float().movedim(-1, 0)[None]


RIVALS: dict[str, Callable[[Start], Found]] = {
    "ours, bones first": lambda start: asked(spinereg.register, start, method="polyrigid"),
    "ours, penalties": lambda start: asked(spinereg.register, start, method="optimise"),
    "ours, penalties, then rigidify": lambda start: asked(spinereg.register, start, method="optimise", rigidify=True),
    "one rigid motion": lambda start: asked(spinereg.register, start, method="rigid"),
    "vertebra by vertebra": lambda start: timed(one_by_one, start),
    "elastix, conditions": lambda start: asked(spinereg.register_elastix, start),
    "elastix, distances": lambda start: asked(spinereg.register_elastix, start, penalty="distances"),
    "ANTs SyN": lambda start: timed(syn, start),
    "ConvexAdam": lambda start: timed(convex_adam, start),
}


# the table


def measure(start: Start, rival: str) -> dict:
    "One method on one case."
    try:
        found = RIVALS[rival](start)
    except Leave as reason:
        return {"left out": str(reason)}
    except Exception as error:  # a method that fails has a row that says so
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    pair, _, scene, grid, _ = start.prepared
    return measure_map(pair, found.transform, scene, grid, start.truth) | {"seconds": found.seconds}


COLUMNS = {
    "bone_tre_mm": "bone, mm",
    "bone_p95_mm": "95 %",
    "rotation_deg": "rotation, degrees",
    "soft_tre_mm": "soft tissue, mm",
    "residual_mm": "residual, worst, mm",
    "volume_percent": "volume, worst, %",
    "folds": "folds",
    "ndv": "NDV",
    "seconds": "s",
}


def table(rows: list[dict]) -> str:
    "Means over the cases of a group; the worst residual and volume; sums of folds."
    frame, lines = pd.DataFrame(rows), []
    for (group, rival), part in frame.groupby(["group", "rival"], sort=False):
        done = part[part.bone_tre_mm.notna()] if "bone_tre_mm" in part else part[:0]
        ways = {"residual_mm": "max", "volume_percent": "max", "folds": "sum", "ndv": "sum"}
        figures = {said: float(done[name].agg(ways.get(name, "mean"))) for name, said in COLUMNS.items() if name in done}
        lines.append({"cases": group, "method": rival, "n": len(done), "failed": len(part) - len(done), **figures})
    return markdown(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for drawn cases, starts and rows.jsonl")
    parser.add_argument("--levels", nargs="*", default=["easy", "clinical", "hard"], choices=["easy", "clinical", "hard"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cases", type=Path, nargs="*", default=[], help="folders of half-real cases")
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=list(RIVALS))
    parser.add_argument("--spacing-mm", type=float, default=1.0)
    parser.add_argument("--ants-python", default=sys.executable, help="a Python that has antspyx")
    given = parser.parse_args()
    path = given.out / "rows.jsonl"
    rows = [row for row in read_rows(path) if "left out" not in row]
    work = [(level, seed, given.out / f"{level}_{seed}") for level in given.levels for seed in given.seeds]
    cases = [(level, lambda folder=folder, level=level, seed=seed: phantom_case(folder, level, seed)) for level, seed, folder in work]
    cases += [("half-real", lambda case=case: case) for case in given.cases]
    left_out = {}
    for group, draw in cases:
        case = draw()
        missing = [rival for rival in given.rivals if not any(row["case"] == case.name and row["rival"] == rival for row in rows)]
        if not missing:
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            start = begin(case, given.out / f"start_{case.name}", given)
        for rival in missing:
            with contextlib.redirect_stdout(io.StringIO()):
                row = {"group": group, "case": case.name, "rival": rival} | measure(start, rival)
            print(", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()), flush=True)
            if "left out" in row:
                left_out[rival] = row["left out"]
            else:
                rows.append(row)
                keep_rows(path, rows)
    if rows:
        print("", table(rows), *(f"{rival}: left out: {why}" for rival, why in left_out.items()), sep="\n")


if __name__ == "__main__":
    main()
