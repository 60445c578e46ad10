"""Files that are good by themselves and do not belong together, on the phantom that comes with the package: refused, or doubted in the result."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from spinereg.files.pairs import read_pair
from spinereg.files.problems import InputError

CASE, THICK = (Path(__file__).parents[1] / "data_samples" / "test" / name for name in ("easy_0", "clinical_0"))  # the MR of THICK has other voxels
GOOD = {"fixed": CASE / "mr_t1.nii.gz", "moving": CASE / "ct.nii.gz", "moving_labels": CASE / "ct_mask.nii.gz", "landmarks": CASE / "landmarks.csv"}
FIXED, MOVING = (["fixed_x_mm", "fixed_y_mm", "fixed_z_mm"], ["moving_x_mm", "moving_y_mm", "moving_z_mm"])


@pytest.fixture(scope="module")
def voxels():
    "The arrays of the sample as they are stored, and their affines."
    return {name: (np.asanyarray((file := nib.load(GOOD[name])).dataobj), file.affine) for name in ("fixed", "moving", "moving_labels")}


def write(folder, name, array, affine):
    nib.save(nib.Nifti1Image(array, affine), folder / f"{name}.nii.gz")
    return folder / f"{name}.nii.gz"


def refused(**change):
    with pytest.raises(InputError) as caught:
        read_pair(**GOOD | change)
    return str(caught.value)


def upwards(affine):
    "The stored axis that runs along the body."
    return int(np.abs(affine[2, :3]).argmax())


def test_good_pair_is_neither_refused_nor_doubted():
    assert not any(notice.doubt for notice in read_pair(**GOOD).notices)


def test_F2_empty_slices_are_not_measured(tmp_path, voxels):
    image, affine = voxels["fixed"]
    image, axis = image.copy(), upwards(affine)
    np.moveaxis(image, axis, 0)[:20] = 0
    pair = read_pair(**GOOD | {"fixed": write(tmp_path, "mr", image, affine)})
    assert "of one single value; they count as not measured" in " ".join(map(str, pair.notices))
    assert np.isclose((~pair.fixed.measured).double().mean(), 20 / image.shape[axis])


@pytest.mark.parametrize("filling", [np.nan, -1024, 0])
def test_F2b_labelled_bone_without_an_image(tmp_path, voxels, filling):
    image, affine = voxels["moving"]
    image, axis = image.astype("float32"), upwards(affine)
    np.moveaxis(image, axis, 0)[: image.shape[axis] * 4 // 10] = filling
    assert "shows nothing where there is labelled bone" in refused(moving=write(tmp_path, "ct", image, affine))


def test_F3b_label_map_as_image():
    assert "are those of a label map" in refused(moving=GOOD["moving_labels"])


def test_F3b_S10_binary_mask_and_subregions(tmp_path, voxels):
    labels, affine = voxels["moving_labels"]
    assert "C1: in parts that do not touch" in refused(moving_labels=write(tmp_path, "binary", (labels > 0).astype("uint8"), affine))
    parts = np.where(labels > 0, 41 + np.indices(labels.shape)[0] % 10, 0).astype("uint8")
    text = refused(moving_labels=write(tmp_path, "parts", parts, affine))
    assert "parts of vertebrae" in text
    assert "totalspineseg" not in text


def test_S5_one_value_for_all_vertebrae_is_refused(tmp_path, voxels):
    """S5: TotalSegmentator's task `total_mr` calls every vertebra 19; under any scheme that is one vertebra in many parts."""
    labels, affine = voxels["moving_labels"]
    path = write(tmp_path, "total_mr", np.where(labels > 0, 19, 0).astype("uint8"), affine)
    assert "T12: in parts that do not touch" in refused(moving_labels=path)
    assert "C7: in parts that do not touch" in refused(moving_labels=path, moving_scheme="totalseg_mr")


def test_F3c_labels_of_another_scheme_without_a_vertebra():
    assert "it holds no vertebra of the scheme 'totalseg_v2'" in refused(moving_scheme="totalseg_v2")


def test_F4_images_swapped_and_labels_kept():
    files = {"fixed": THICK / "ct.nii.gz", "moving": THICK / "mr_t1.nii.gz", "moving_labels": THICK / "ct_mask.nii.gz"}
    assert "voxels of the other image" in refused(**files, landmarks=None)


def test_F4_labels_of_the_fixed_image_given_as_the_moving_ones(tmp_path):
    file = nib.load(THICK / "mr_t1.nii.gz")
    image, affine = np.asanyarray(file.dataobj), file.affine
    blocks, axis = np.zeros(image.shape, "uint8"), upwards(affine)
    middle = [slice(n // 3, 2 * n // 3) for n in image.shape]
    for k, value in enumerate((22, 21, 20) if affine[2, axis] > 0 else (20, 21, 22)):
        third = image.shape[axis] // 3
        middle[axis] = slice(third * k + 3, third * k + third - 3)
        blocks[tuple(middle)] = value
    files = {"fixed": THICK / "mr_t1.nii.gz", "moving": THICK / "ct.nii.gz", "moving_labels": write(tmp_path, "mr_mask", blocks, affine)}
    assert "voxels of the other image" in refused(**files, landmarks=None)


def test_F4_a_ct_that_stays_is_noticed():
    said = " ".join(map(str, read_pair(GOOD["moving"], GOOD["fixed"]).notices))
    assert "is a CT, and the moving image an MR" in said


MISTAKES = {
    "LPS": lambda table: table * ([-1, -1, 1] * 2),
    "metres": lambda table: table / 1000,
    "micrometres": lambda table: table * 1000,
    "elsewhere": lambda table: table + 900,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_F6_landmarks_that_are_not_ras_mm(tmp_path, mistake):
    table = pd.read_csv(GOOD["landmarks"])
    table[FIXED + MOVING] = MISTAKES[mistake](table[FIXED + MOVING])
    table.to_csv(tmp_path / "points.csv", index=False)
    text = refused(landmarks=tmp_path / "points.csv")
    assert "points lie outside" in text
    assert mistake == "elsewhere" or f"read as {mistake}" in text


def test_F6_voxel_numbers_for_millimetres(tmp_path, voxels):
    table = pd.read_csv(GOOD["landmarks"])
    for columns, image in ((FIXED, "fixed"), (MOVING, "moving")):
        table[columns] = nib.affines.apply_affine(np.linalg.inv(voxels[image][1]), table[columns])
    table.to_csv(tmp_path / "points.csv", index=False)
    assert "points lie outside" in refused(landmarks=tmp_path / "points.csv")


def test_F6_decimal_commas(tmp_path):
    lines = GOOD["landmarks"].read_text().splitlines()
    (tmp_path / "points.csv").write_text("\n".join([lines[0], *(line.replace(".", ",") for line in lines[1:])]))
    assert "Write decimal points" in refused(landmarks=tmp_path / "points.csv")


def test_C8_mr_with_negative_values_beside_a_ct_is_an_mr(tmp_path, voxels):
    image, affine = voxels["fixed"]
    shifted = image.astype("float32") - 300
    assert read_pair(**GOOD | {"fixed": write(tmp_path, "mr", shifted, affine)}).fixed_modality == "mr"


def test_B2_labels_that_run_upwards_are_a_doubt(tmp_path, voxels):
    labels, affine = voxels["moving_labels"]
    there = np.unique(labels)[1:]
    turned = np.zeros_like(labels)
    for value, other in zip(there, there[::-1]):
        turned[labels == value] = other
    pair = read_pair(**GOOD | {"moving_labels": write(tmp_path, "up", turned, affine), "landmarks": None})
    assert any(notice.doubt and "UPWARDS" in notice.text for notice in pair.notices)
