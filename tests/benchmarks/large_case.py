"""Register one phantom of 200 x 200 x 350 voxels of 1 mm, CT and MR, eleven vertebrae, whose joints bend by up to 2 degrees each.

python tests/benchmarks/large_case.py out/large
"""

import argparse
from pathlib import Path
from unittest.mock import patch

import numpy as np

import spinereg
from spinereg.phantom import cases as phantom


def large_grids(difficulty: str, centre_mm: np.ndarray, rng: np.random.Generator) -> tuple:
    "CT and MR of one size, tilted against each other."
    ct = phantom.oriented_grid("LPS", (200, 200, 350), (1.0, 1.0, 1.0), np.array([3.0, 0.0, 0.0]), centre_mm + [0, -22, 20])
    mr = phantom.oriented_grid("PSR", (200, 350, 200), (1.0, 1.0, 1.0), np.array([2.0, 2.0, -6.0]), centre_mm + [3, -26, 10])
    return ct, mr


def make_large(folder: Path, seed: int) -> None:
    "Write the case: the clinical phantom on other grids, from T7 down."
    build = phantom.build_spine
    gentle = {"clinical": phantom.DIFFICULTIES["clinical"]._replace(joint_deg=2.0)}
    with (
        patch.object(phantom, "DIFFICULTIES", gentle),
        patch.object(phantom, "scanner_grids", large_grids),
        patch.object(phantom, "build_spine", lambda first, *rest: build("T7", *rest)),
    ):
        phantom.write_case(folder, phantom.make_case("clinical", seed))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the case and the result")
    parser.add_argument("--seed", type=int, default=100)
    given = parser.parse_args()
    case = given.out / f"case_{given.seed}"
    if not (case / "truth.json").exists():
        make_large(case, given.seed)
    result = spinereg.register(
        case / "mr_t1.nii.gz", case / "ct.nii.gz", case / "ct_mask.nii.gz", landmarks=case / "landmarks.csv", out_dir=given.out / "result"
    )
    print(result.summary())
    print(result.metrics.seconds, result.metrics.environment.peak_memory_gb, "GB")


if __name__ == "__main__":
    main()
