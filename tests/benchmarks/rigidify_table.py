"""Make fields of four tools rigid in every vertebra, and measure them before and after.

python tests/benchmarks/rigidify_table.py data_samples/test/clinical_0 --weights out/train --ants 1Warp.nii.gz 0GenericAffine.mat
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from bench import measure_map

import spinereg
from spinereg.files.foreign import read_map
from spinereg.files.pairs import Pair, read_pair
from spinereg.files.transforms import SpineTransform
from spinereg.registration.scene import make_scene, working_grid


def measure(pair: Pair, transform: SpineTransform) -> dict:
    "What a field does to a pair."
    scene = make_scene(pair, transform.rigid, torch.device("cpu"))
    return measure_map(pair, transform, scene, working_grid(scene))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", type=Path, help="folder of a phantom case")
    parser.add_argument("--weights", help="of a trained network")
    parser.add_argument("--ants", nargs=2, help="warp and affine of ANTs, for this case")
    given = parser.parse_args()
    files = {"fixed": given.case / "mr_t1.nii.gz", "moving": given.case / "ct.nii.gz", "moving_labels": given.case / "ct_mask.nii.gz"}
    known = {"fixed_labels": given.case / "mr_mask.nii.gz", "landmarks": given.case / "landmarks.csv"}
    pair = read_pair(*files.values(), *known.values())
    found = {"ours": spinereg.register(**files, method="optimise").transform, "elastix": spinereg.register_elastix(**files, samples=16384).transform}
    if given.weights:
        found["network"] = spinereg.register(**files, method="network", weights=given.weights).transform
    if given.ants:
        found["ANTs"] = read_map(given.ants, pair.fixed.grid)
    rows = []
    for name, transform in found.items():
        rigid = spinereg.rigidify(transform, files["moving_labels"], fixed=files["fixed"])
        rows += [{"field": name, "": when, **measure(pair, field)} for when, field in (("given", transform), ("rigid", rigid))]
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
