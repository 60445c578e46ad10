"""Measure the largest resident memory of a registration at six sizes, each in a process of its own, against what the headers foretell.

OMP_NUM_THREADS=1 python tests/benchmarks/memory.py out/memory
OMP_NUM_THREADS=1 python tests/benchmarks/memory.py out/memory --fast
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
from bench import keep_rows, markdown, phantom_case, read_rows
from large_case import make_large

import spinereg
from spinereg.registration.memory import LOADED_GB, header_grid, memory_gb

IMAGES = "mr_t1", "ct", "ct_mask"
CASES = "easy", "clinical", "64 x 128 x 64", "120 x 140 x 180", "200 x 200 x 350", "clinical, CT of 0.5 mm"
FAST = {True: (5, 5, 3), False: (3, 3, 2)}  # steps of a fast run, with labels and without


def cut_case(source: Path, folder: Path, size_mm: tuple[int, int, int]) -> None:
    "The images of a case, cut to a box around the middle of its bones."
    folder.mkdir(exist_ok=True)
    images = {name: nib.as_closest_canonical(nib.load(source / f"{name}.nii.gz")) for name in IMAGES}
    bone = np.argwhere(np.asarray(images["ct_mask"].dataobj) > 0)
    middle_mm = nib.affines.apply_affine(images["ct_mask"].affine, (bone.min(0) + bone.max(0)) / 2)
    for name, image in images.items():
        middle = nib.affines.apply_affine(np.linalg.inv(image.affine), middle_mm)
        half = np.array(size_mm) / image.header.get_zooms() / 2
        low, high = np.maximum(np.round(middle - half), 0).astype(int), np.minimum(np.round(middle + half), image.shape).astype(int)
        nib.save(image.slicer[tuple(map(slice, low, high))], folder / f"{name}.nii.gz")


def divide_ct(source: Path, folder: Path) -> None:
    "A case whose CT and labels have every voxel divided into eight."
    folder.mkdir(exist_ok=True)
    (folder / "mr_t1.nii.gz").write_bytes((source / "mr_t1.nii.gz").read_bytes())
    for name in ("ct", "ct_mask"):
        image = nib.load(source / f"{name}.nii.gz")
        affine = image.affine @ np.diag([0.5, 0.5, 0.5, 1])
        affine[:3, 3] -= affine[:3, :3].sum(1) / 2  # the first of eight lies half of its size before the middle
        fine = np.kron(np.asarray(image.dataobj).astype("int16"), np.ones((2, 2, 2), "int16"))
        nib.save(nib.Nifti1Image(fine, affine), folder / f"{name}.nii.gz")


def case_folder(out: Path, case: str) -> Path:
    "The folder of a case, which is made unless it is there."
    if case in ("easy", "clinical"):
        return phantom_case(out / case, case, 0)
    folder, large, name = out / case.replace(" ", "_"), out / "200_x_200_x_350", "ct_mask.nii.gz"
    if not (large / name).exists():
        make_large(large, 100)
    if not (folder / name).exists():
        if case.startswith("clinical"):
            divide_ct(phantom_case(out / "clinical", "clinical", 0), folder)
        else:
            cut_case(large, folder, tuple(map(int, case.split(" x "))))
    return folder


def measured_gb(case: Path, labelled: bool, settings: dict) -> float:
    "Peak of a process that does nothing but one registration."
    files = [case / f"{name}.nii.gz" for name in IMAGES[: 2 + labelled]]
    return spinereg.register(*files, **settings).metrics.environment.peak_memory_gb


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the cases, and rows.jsonl; what is there already is kept")
    parser.add_argument("--fast", action="store_true", help="a few steps only, which take up to a quarter less memory")
    parser.add_argument("--spacing-mm", type=float, default=1.0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    kept = given.out / "rows.jsonl"
    rows = read_rows(kept)
    for case, labelled in ((case, labelled) for case in CASES for labelled in (True, False)):
        what = {"case": case, "labels": labelled, "spacing_mm": given.spacing_mm, "fast": given.fast}
        if any(what.items() <= row.items() for row in rows):
            continue
        folder, steps = case_folder(given.out, case), {"steps": FAST[labelled]} if given.fast else {}
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            gb = pool.submit(measured_gb, folder, labelled, {"spacing_mm": given.spacing_mm} | steps).result()
        grids = (header_grid(folder / f"{name}.nii.gz") for name in IMAGES[:2])
        foretold = LOADED_GB + memory_gb(*grids, given.spacing_mm, labelled)
        rows.append(what | {"measured, GB": gb, "by the headers, GB": foretold, "off, %": 100 * (foretold / gb - 1)})
        keep_rows(kept, rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
