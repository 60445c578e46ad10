"Label maps that cannot be of a spine, made of ones that are."

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from spinereg.files.anatomy import anatomy_faults, bones_of
from spinereg.files.problems import InputError
from spinereg.files.volumes import read_labels

ROOT = Path(__file__).parent.parent
SAMPLES = sorted((ROOT / "data_samples").glob("*/*/*_mask.nii.gz"))
REAL = ROOT.parent / "shared/data"
REAL_MAPS = {"lumbar_ct/ct_mask.nii.gz": "verse", "trunk_ct/ct_mask_totalseg_v2.nii.gz": "totalseg_v2"}
REAL_MAPS |= {f"lumbar_{pair}_pair/{side}_labels.nii.gz": "verse" for pair in ("mr", "tirm") for side in ("fixed", "moving")}


@pytest.fixture(scope="module")
def case():
    file = nib.load(ROOT / "data_samples/test/easy_0/ct_mask.nii.gz")
    return np.asarray(file.dataobj).astype(np.int32), file.affine  # T11 to L5 are 18 to 24


def called(values, changes):
    "A map under other values."
    return np.select([values == old for old in changes], list(changes.values()), values)


def read(folder, values, affine):
    path = folder / "mask.nii.gz"
    nib.save(nib.Nifti1Image(values.astype(np.int16), affine), path)
    return read_labels(path)


WRONG = {
    "L2 also called L3": (lambda v: called(v, {21: 22}), "L3 is two bones, 3[0-9] mm apart"),
    "L2 and L3 swapped": (lambda v: called(v, {21: 22, 22: 21}), "do not follow each other along the spine: .*L2 and L3"),
    "L2 and L4 swapped": (lambda v: called(v, {21: 23, 23: 21}), "do not follow each other along the spine: .*L2 and L3"),
    "intercept 1": (lambda v: v + 1, "C1 holds [0-9]+ cm³, more than a vertebra"),
    "noise of 24 labels": (lambda v: np.random.default_rng(0).integers(1, 25, v.shape), "in parts that do not touch"),
}


@pytest.mark.parametrize("what", WRONG)
def test_f3_labels_that_no_spine_has_are_refused(case, tmp_path, what):
    """F3: order along the spine, size, one bone under each name; the message says which vertebrae."""
    change, said = WRONG[what]
    with pytest.raises(InputError, match=said) as refused:
        read(tmp_path, change(case[0]), case[1])
    assert "labels " in str(refused.value) and "mask.nii.gz" in str(refused.value) and "one value for each vertebra" in str(refused.value)


@pytest.mark.parametrize("path", SAMPLES, ids=[f"{path.parent.name}-{path.name[:2]}" for path in SAMPLES])
def test_f3_samples_are_not_refused(path):
    assert read_labels(path).names


@pytest.mark.skipif(not REAL.is_dir(), reason="the real volumes are not here")
@pytest.mark.parametrize("name", REAL_MAPS)
def test_f3_real_maps_are_not_refused_and_one_bone_called_its_neighbour_is(name):
    labels = read_labels(REAL / name, REAL_MAPS[name])
    middle = len(labels.names) // 2
    merged = torch.where(labels.data >= middle + 1, labels.data - 1, labels.data)
    names = labels.names[: middle - 1] + labels.names[middle:]
    faults = anatomy_faults(bones_of(merged, labels.grid, len(names)), names)
    assert "is two bones" in " ".join(faults) or name.startswith("lumbar_ct")  # where L2 is a sliver


@pytest.mark.parametrize(
    "cut", [(slice(None), slice(None), slice(40, 120)), (slice(0, 30), slice(None), slice(None)), (slice(25, 40), slice(30, 70), slice(20, 90))]
)
def test_f3_what_a_field_of_view_leaves_of_a_spine_is_not_refused(case, tmp_path, cut):
    values, affine = case[0][cut], case[1].copy()
    affine[:3, 3] += case[1][:3, :3] @ [edge.start or 0 for edge in cut]
    assert read(tmp_path, values, affine).names


def test_f3_the_way_a_map_is_stored_does_not_matter(case, tmp_path):
    """Turned, flipped and oblique headers: the same verdict."""
    values, affine = called(case[0], {21: 22, 22: 21}), case[1]
    turn = np.eye(4)
    turn[:3, :3] = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = len(values) - 1
    for data, header in (
        (values, affine),
        (values[::-1], affine @ flip),
        (values.transpose(2, 0, 1), affine[:, [2, 0, 1, 3]]),
        (values, turn @ affine),
    ):
        with pytest.raises(InputError, match="do not follow each other"):
            read(tmp_path, data, header)


def half_called(values, affine, old, new):
    "The front half of a vertebra under another value."
    behind = np.arange(values.shape[1])[:, None] < np.argwhere(values == old)[:, 1].mean()
    return np.where((values == old) & (~behind if affine[1, 1] > 0 else behind), new, values)


def few_voxels(values, affine, old, count):
    "A vertebra of which only some voxels are left, anywhere in it."
    place = np.argwhere(values == old)
    lost = np.random.default_rng(0).permutation(place)[count:]
    values = values.copy()
    values[tuple(lost.T)] = 0
    return values


@pytest.mark.parametrize(
    ("change", "left_out"), [((half_called, 20, 22), {"L1", "L3"}), ((few_voxels, 22, 93), {"L3"})]
)
def test_f3a_a_label_that_is_no_whole_bone_is_doubted_and_left_out(case, tmp_path, change, left_out):
    """F3a: named as a doubt, and bends as soft tissue does, unless the user keeps it."""
    make, old, new = change
    labels = read(tmp_path, make(*case, old, new), case[1])
    assert set(labels.names) == {"T11", "T12", "L1", "L2", "L3", "L4", "L5"} - left_out
    assert labels.data.max() == len(labels.names) == len(labels.values)
    assert {notice.text.split()[0] for notice in labels.notices if notice.doubt} == left_out and "keep_doubtful=True" in labels.notices[0].text
    assert not any(notice.doubt for notice in read(tmp_path, half_called(*case, 21, 0), case[1]).notices), "crushed, or cut: no doubt"
    read(tmp_path, make(*case, old, new), case[1])
    kept = read_labels(tmp_path / "mask.nii.gz", keep_doubtful=True)
    assert len(kept.names) == 7 and {notice.text.split()[0] for notice in kept.notices if notice.doubt} == left_out


@pytest.mark.skipif(not REAL.is_dir(), reason="the real volumes are not here")
@pytest.mark.parametrize("name", REAL_MAPS)
def test_f3a_no_bone_of_a_real_map_is_doubted(name):
    assert not any(notice.doubt for notice in read_labels(REAL / name, REAL_MAPS[name]).notices)


def test_f3a_a_registration_says_so_and_does_not_hold_that_bone(case, tmp_path):
    """F3a: in the doubts of the result; the map is not rigid there."""
    from spinereg import register

    folder = ROOT / "data_samples/test/easy_0"
    nib.save(nib.Nifti1Image(few_voxels(*case, 22, 93).astype(np.int16), case[1]), tmp_path / "mask.nii.gz")
    quick = {"spacing_mm": 4.0, "method": "rigid", "prealign": "header", "device": "cpu"}
    result = register(folder / "mr_t1.nii.gz", folder / "ct.nii.gz", tmp_path / "mask.nii.gz", **quick)
    assert "L3" not in result.metrics.vertebrae.index and len(result.metrics.vertebrae) == 6
    assert "L3 is in parts that do not touch" in " ".join(result.metrics.as_dict()["doubts"])
    assert "NOT TO BE TRUSTED" in result.summary() and result.metrics.parameters["keep_doubtful"] is False
