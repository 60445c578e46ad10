"Label maps that do not lie on the bone of their CT, that lie on half of it, or that leave a vertebra out."

from pathlib import Path

import jaxtyping
import nibabel as nib
import numpy as np
import pytest

from spinereg.files.pairs import COARSE_MM, read_pair
from spinereg.files.problems import InputError
from spinereg.files.volumes import read_labels
from spinereg.phantom.appearance import oriented_grid
from spinereg.phantom.spine import build_spine
from spinereg.phantom.tissues import build_anatomy, ct_scan, render

ROOT = Path(__file__).resolve().parent.parent
CASE = ROOT / "data_samples/test/easy_0"  # T11 to L5 are 18 to 24; both images have the same voxels
MR, CT, MASK, MR_MASK = (CASE / f"{name}.nii.gz" for name in ("mr_t1", "ct", "ct_mask", "mr_mask"))
REAL = ROOT.parent / "shared/data"
REAL_CTS = {"lumbar_ct": ("ct_mask", "verse"), "trunk_ct": ("ct_mask_totalseg_v2", "totalseg_v2")}


@pytest.fixture(scope="module")
def case():
    file = nib.load(MASK)
    return np.asarray(file.dataobj).astype(np.uint8), file.affine


def doubts(pair):
    return [notice.text for notice in pair.notices if notice.doubt]


def called(values, changes):
    "A map under other values."
    table = np.arange(values.max() + 1, dtype=values.dtype)
    table[list(changes)] = list(changes.values())
    return table[values]


def half(values, value, axis):
    "A label map without the half of a vertebra."
    middle = np.argwhere(values == value)[:, axis].mean()
    return np.where((values == value) & (np.indices(values.shape)[axis] > middle), 0, values).astype(np.uint8)


@pytest.mark.parametrize("name", ["test/easy_0", "train/clinical_6", "val/easy_5"])
def test_f3e_f4b_good_pairs_are_not_doubted(name):
    """F3e, F4b: labels on their own images."""
    assert not doubts(read_pair(*(ROOT / "data_samples" / name / f"{file}.nii.gz" for file in ("mr_t1", "ct", "ct_mask", "mr_mask"))))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real volumes are not here")
@pytest.mark.parametrize("name", REAL_CTS)
def test_f3e_f4b_real_labels_are_not_doubted_and_a_shift_is(name):
    """F3e, F4b: real CTs of 1.5 and 3 mm; of the coarser one only its voxels are doubted."""
    mask, scheme = REAL_CTS[name]
    ct, file = REAL / name / "ct.nii.gz", nib.load(REAL / name / f"{mask}.nii.gz")
    values = np.asarray(file.dataobj)
    coarse = min(file.header.get_zooms()) >= COARSE_MM
    said = doubts(read_pair(ct, ct, file, moving_scheme=scheme))
    assert len(said) == coarse and all("its voxels have 3 x 3 x 3 mm" in text for text in said)
    axis = nib.aff2axcodes(file.affine).index("A" if "A" in nib.aff2axcodes(file.affine) else "P")
    moved = np.roll(values, round(9 / nib.affines.voxel_sizes(file.affine)[axis]), axis), file.affine
    assert any("do not lie on the bone" in text for text in doubts(read_pair(ct, ct, moved, moving_scheme=scheme)))


def test_f4b_labels_of_the_other_image_on_the_same_voxels(case):
    """F4b: the labels of the MR, and those of the CT 9 mm to the back, do not lie on the bone of the CT; those that are 1 mm off do."""
    (text,) = doubts(read_pair(MR, CT, MR_MASK))
    assert "do not lie on the bone of ct.nii.gz" in text and " HU" in text and "look at the map" in text
    said = [doubts(read_pair(MR, CT, (np.roll(case[0], front, 1), case[1]))) for front in (-9, 1)]
    assert "do not lie on the bone" in said[0][0] and not said[1]


def test_f4b_images_swapped_where_both_have_the_same_voxels():
    """F4b: the labels lie on the bone of the CT, which is given as the fixed image."""
    (text,) = doubts(read_pair(CT, MR, MASK))
    assert "lie on the bone of ct.nii.gz, and not on that of mr_t1.nii.gz" in text and "swap the images" in text
    assert not doubts(read_pair(CT, MR, MR_MASK))


@pytest.mark.parametrize(("axis", "value"), [(1, 20), (0, 21)])
def test_f3e_half_of_a_vertebra_without_a_label_is_named(case, axis, value):
    """F3e: the CT shows bone where the neighbours say that there should be a label."""
    (text,) = doubts(read_pair(MR, CT, (half(case[0], value, axis), case[1])))
    assert text.startswith(f"L{value - 19} is labelled in part") and "ct.nii.gz shows bone" in text


def test_f3e_a_crushed_vertebra_is_not_half_a_label(case):
    """F3e: disc in its place; and half-dark bone, thick slices and noise give no doubt."""
    file = nib.load(CT)
    hu = np.asarray(file.dataobj).astype(np.float32)
    lower = half(case[0], 21, 2)
    flat = np.where(lower != case[0], 80, hu).astype(np.int16), file.affine
    assert not doubts(read_pair(MR, flat, (lower, case[1]))) and doubts(read_pair(MR, CT, (lower, case[1])))
    faint = np.where((case[0] > 0) & (hu > 40), 40 + (hu - 40) * 0.4, hu) + np.random.default_rng(0).normal(0, 40, hu.shape)
    assert not doubts(read_pair(MR, (faint.astype(np.int16), file.affine), MASK))
    slabs, thick = faint.reshape(*faint.shape[:2], -1, 4).mean(-1).astype(np.int16), file.affine @ np.diag([1, 1, 4, 1.0])
    thick[:3, 3] += file.affine[:3, 2] * 1.5
    assert not doubts(read_pair(MR, (slabs, thick), (case[0][:, :, 1::4], thick)))


@pytest.mark.parametrize(("first", "last"), [("C3", "T3"), ("T4", "T10")])
def test_f3e_f4b_necks_and_chests_are_not_doubted(first, last):
    """F3e, F4b: other levels have other shapes."""
    spine = build_spine(first, last, 5)
    centre = np.mean([np.asarray(v.pose)[:3, 3] for v in spine], 0)
    grid = oriented_grid("RAS", (40, 48, 100), (2.0, 2.0, 2.0), np.zeros(3), centre + [0, -15, 0])
    image, number = render(build_anatomy(spine, 5, 0.6), grid, ("ct",))
    scheme = {k + 1: v.name for k, v in enumerate(spine)}
    ct = ct_scan(image[0], 5), grid.affine
    assert not doubts(read_pair(ct, ct, (number.numpy().astype(np.uint8), grid.affine), moving_scheme=scheme))


GAPS = {"L2 between L1 and L3 has no label; what": [21], "L2 and L3 between L1 and L4 have no label; what": [21, 22]}


@pytest.mark.parametrize("said", GAPS)
def test_f3d_a_level_without_a_label_between_others(case, said):
    """F3d: named as a doubt; in the fixed image, where labels only measure, as a notice."""
    values = np.where(np.isin(case[0], GAPS[said]), 0, case[0]).astype(np.uint8)
    assert [text.startswith(said) for text in doubts(read_pair(MR, CT, (values, case[1])))] == [True]
    pair = read_pair(MR, CT, MASK, (values, case[1]))
    assert any(notice.text.startswith(said) and notice.name == "fixed_labels" for notice in pair.notices)


def test_f3d_names_that_leave_one_out_and_people_that_have_it_not(case):
    """F3d: vertebrae a level apart are neighbours: their names are doubted, except for an absent T12 or L5."""
    no_t12 = called(case[0], {18: 17, 19: 18}), case[1]  # T12 called T11
    assert not any(notice.doubt for notice in read_labels(no_t12).notices)
    no_l2 = called(case[0], {18: 16, 19: 17, 20: 18, 21: 19, 22: 20, 23: 22, 24: 23}), case[1]
    (notice,) = [notice for notice in read_labels(no_l2).notices if notice.doubt]
    assert notice.text.startswith("L2 between L1 and L3 has no label, and these two are one level apart: are the names right?")


def test_f11_arguments_that_are_none_or_masks_or_turned_arrays(case, monkeypatch):
    """F11: one sentence each, which names the argument and what to do."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests
    turned, mask = np.ascontiguousarray(case[0].T), case[0] > 0
    wrong = {
        "fixed .*: no image was given": {"fixed": None},
        "moving .*: no image was given": {"moving": None},
        "there is no label scheme None. Give as moving_scheme one of": {"moving_scheme": None},
        "the other way round. SimpleITK's GetArrayFromImage gives": {"moving_labels": (turned, case[1])},
        "holds the one value 1, as a mask does. Give a map with one value for each vertebra": {"moving_labels": (mask, case[1])},
    }
    for said, given in wrong.items():
        with pytest.raises(InputError, match=said):
            read_pair(**{"fixed": MR, "moving": CT, "moving_labels": MASK} | given)
    one = read_labels((case[0] == 22, case[1]))
    assert one.names == ("C1",) and "if it is a mask" in one.notices[0].text and one.notices[0].doubt
    assert read_labels((case[0] == 22, case[1]), {1: "L3"}).notices == ()
