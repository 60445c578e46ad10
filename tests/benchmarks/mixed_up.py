"""Label maps and pairs that cannot be, and good ones: `python tests/benchmarks/mixed_up.py [folder of cases ...]`.

Each folder is of a case with four vertebrae or more: ct.nii.gz, ct_mask.nii.gz, mr_t1.nii.gz or mr.nii.gz, and mr_mask.nii.gz,
numbered as VerSe does. Without one, the cases of data_samples are taken.
Of every case come mistakes that people make, which must be refused or doubted, and whole maps and crops, which must not.
"""

import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from spinereg.files.pairs import read_pair
from spinereg.files.problems import InputError
from spinereg.files.volumes import read_labels

ROOT = Path(__file__).resolve().parent.parent.parent


def called(values, names):
    return np.select([values == old for old in names], list(names.values()), values)


def mistakes(values, affine, draw):
    "Label maps with one mistake each, by what it is."
    present = [value for value in np.unique(values) if value]
    inner = present[1:-1]
    low = int(draw.integers(len(inner) - 1))
    here = np.argwhere(values == inner[low])
    front = (np.arange(values.shape[1])[:, None] > here[:, 1].mean()) == (affine[1, 1] > 0)
    yield "two bones under one name", called(values, {inner[low]: inner[low + 1]})
    yield "neighbours swapped", called(values, {inner[low]: inner[low + 1], inner[low + 1]: inner[low]})
    yield "background called C1", values + 1
    yield "all bone under one value", (values > 0).astype(values.dtype)
    yield "noise", draw.integers(1, 25, values.shape)
    yield "front half lost", np.where((values == inner[low]) & front, 0, values)
    yield "left or right half lost", np.where((values == inner[low]) & (np.arange(len(values))[:, None, None] > here[:, 0].mean()), 0, values)
    yield "a level without a label", np.where(values == inner[low], 0, values)
    yield "1 cm to the front or back", np.roll(values, round(10 / np.linalg.norm(affine[:3, 1])), 1)
    below = present[min(present.index(inner[low]) + 2, len(present) - 1)]
    yield "front half called two below", np.where((values == inner[low]) & front, below, values)
    crumbs = values.copy()
    crumbs[tuple(draw.permutation(here)[93:].T)] = 0
    yield "93 voxels", crumbs
    yield "counted from below", called(values, dict(zip(present, present[::-1])))


def verdict(read, *given):
    "refused, doubted or passed."
    try:
        found = read(*given)
    except InputError:
        return "refused"
    return "doubted" if any(notice.doubt for notice in found.notices) else "passed"


def labelled(mr, ct, path, values, affine):
    "The verdict on a pair with a label map, which is written to a path."
    nib.save(nib.Nifti1Image(values.astype(np.int16), affine), path)
    return verdict(read_pair, mr, ct, path)


def crops(values, draw, count):
    for _ in range(count):
        box = tuple(slice(int(draw.integers(0, n // 4)), n - int(draw.integers(0, n // 4))) for n in values.shape)
        yield values[box], [edge.start for edge in box]


def main(folders):
    draw, bad, good = np.random.default_rng(0), [], []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "mask.nii.gz"

        for folder in folders:
            ct, mask, its_mask = (folder / f"{name}.nii.gz" for name in ("ct", "ct_mask", "mr_mask"))
            mr = next(path for path in (folder / "mr_t1.nii.gz", folder / "mr.nii.gz") if path.is_file())
            image = nib.load(mask)
            values, affine = np.asarray(image.dataobj).astype(np.int32), image.affine
            bad += [(folder.name, what, labelled(mr, ct, path, wrong, affine)) for what, wrong in mistakes(values, affine, draw)]
            bad.append((folder.name, "images swapped, labels kept", verdict(read_pair, ct, mr, mask)))
            bad.append((folder.name, "the other image's labels", verdict(read_pair, mr, ct, its_mask)))
            bad.append((folder.name, "another scheme", verdict(read_labels, mask, "totalseg_v2")))
            good.append((folder.name, "pair", verdict(read_pair, mr, ct, mask, its_mask)))
            for part, start in crops(values, draw, 9):  # of the labels alone: the CT is whole
                moved = affine.copy()
                moved[:3, 3] += affine[:3, :3] @ start
                if part.any():
                    good.append((folder.name, "crop", labelled(mr, ct, path, part, moved)))
    for title, rows, fine in (("mixed up", bad, ("refused", "doubted")), ("good", good, ("passed",))):
        print(f"{title}: {len(rows)},", ", ".join(f"{sum(row[2] == kind for row in rows)} {kind}" for kind in ("refused", "doubted", "passed")))
        for row in rows:
            if row[2] not in fine:
                print("   ", *row)


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]] or sorted((ROOT / "data_samples").glob("*/*")))
