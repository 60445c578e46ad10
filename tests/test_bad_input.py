"""Every way in which a file of a pair can be wrong: one clear error that names input, file and remedy, or a notice.

Each test writes the bad file itself. Repairs are compared with what the good file would have given.
"""

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from spinereg.files.pairs import read_landmarks, read_pair
from spinereg.files.problems import InputError
from spinereg.files.volumes import read_image, read_labels
from spinereg.space.geometry import transform_points

SPACE = np.array([[-1.2, 0, 0, 20], [0, -1.2, 0, 10], [0, 0, 1.5, -40], [0, 0, 0, 1]])
SHAPE = (20, 22, 30)
COLUMNS = "name,vertebra,fixed_x_mm,fixed_y_mm,fixed_z_mm,moving_x_mm,moving_y_mm,moving_z_mm\n"
BLOCKS = np.zeros(SHAPE, "uint8")
BLOCKS[6:13, 6:13, 2:9], BLOCKS[6:13, 6:13, 11:18], BLOCKS[6:13, 6:13, 20:27] = 22, 21, 20
CT = (np.where(BLOCKS > 0, 600, 40) + np.random.default_rng(0).integers(-20, 20, SHAPE)).astype("int16")
CT[:3] = -1000
MR = np.where(CT < -900, 0, 600 - CT // 2).astype("uint16")


def save(path, array, affine=SPACE, sform=2, qform=0, qform_affine=None):
    image = nib.Nifti1Image(array, None)
    image.header.set_qform(SPACE if qform_affine is None else qform_affine, qform)
    image.header.set_sform(affine, sform)
    nib.save(image, path)
    return path


def moved(x_mm=0.0, y_mm=0.0, z_mm=0.0):
    affine = SPACE.copy()
    affine[:3, 3] += [x_mm, y_mm, z_mm]
    return affine


def sheared(degrees):
    tilt = np.eye(4)
    tilt[1, 2] = 1.25 * np.tan(np.deg2rad(degrees))
    return SPACE @ tilt


def refused(read, *parts):
    "The text of the error, which holds every part and is one line per problem."
    with pytest.raises(InputError) as caught:
        read()
    text = str(caught.value)
    for part in parts:
        assert str(part) in text, f"{part!r} is not in: {text}"
    for problem in caught.value.problems:
        assert problem.name
        assert problem.file
        assert problem.reason
        assert problem.fix.endswith(".")
    return text


def said(*read):
    "All that was noticed about what was read, a line each."
    return "\n".join(str(notice) for part in read for notice in part.notices)


@pytest.fixture(autouse=True)
def _readers_print_nothing(capsys):
    yield
    assert capsys.readouterr().out == ""


@pytest.fixture
def case(tmp_path):
    "A good pair; a test puts a bad file in the place of one of its files."
    (tmp_path / "points.csv").write_text(COLUMNS + "tip,L2,9,-1,-19,9,-1,-19\n")
    files = {"fixed": ("mr.nii.gz", MR), "moving": ("ct.nii.gz", CT), "moving_labels": ("ct_mask.nii.gz", BLOCKS)}
    return {name: save(tmp_path / file, array) for name, (file, array) in files.items()} | {"landmarks": tmp_path / "points.csv"}


# the bytes


def test_X1_missing_file_lists_what_is_there(case, tmp_path):
    case["moving"] = tmp_path / "cta.nii.gz"
    refused(lambda: read_pair(**case), "moving", "cta.nii.gz", "no such file", "ct.nii.gz", "mr.nii.gz", tmp_path)


def test_X1_missing_folder_lists_the_nearest_one(tmp_path):
    save(tmp_path / "here.nii.gz", CT)
    refused(lambda: read_image(tmp_path / "no" / "such" / "ct.nii.gz", "fixed"), "fixed", "no such file", "here.nii.gz")


def test_X1_folder_instead_of_a_file(tmp_path):
    refused(lambda: read_image(tmp_path, "moving"), tmp_path, "folder", "dcm2niix")


def test_X4_empty_file(tmp_path):
    (tmp_path / "ct.nii.gz").touch()
    refused(lambda: read_image(tmp_path / "ct.nii.gz", "moving"), "moving", "ct.nii.gz", "0 bytes", "again")


@pytest.mark.parametrize("kept", [3, 400, 0.5, 0.95, -12, -8, -1])
def test_truncated_gzip(tmp_path, kept):
    "X3: wherever it is cut, the last bytes of the checksum included."
    raw = Path(save(tmp_path / "whole.nii.gz", CT)).read_bytes()
    (tmp_path / "ct.nii.gz").write_bytes(raw[: int(kept * len(raw)) if isinstance(kept, float) else kept])
    refused(lambda: read_image(tmp_path / "ct.nii.gz", "moving"), "ct.nii.gz", "cut off or damaged", "again")


def test_X3_damaged_checksum(tmp_path):
    raw = bytearray(Path(save(tmp_path / "whole.nii.gz", CT)).read_bytes())
    raw[-6] ^= 0xFF
    (tmp_path / "ct.nii.gz").write_bytes(raw)
    refused(lambda: read_image(tmp_path / "ct.nii.gz", "moving"), "ct.nii.gz", "damaged", "again")


@pytest.mark.parametrize("bytes_kept", [100, 352, 2000])
def test_X3_truncated_plain_nifti(tmp_path, bytes_kept):
    raw = Path(save(tmp_path / "whole.nii", CT)).read_bytes()
    (tmp_path / "ct.nii").write_bytes(raw[:bytes_kept])
    refused(lambda: read_image(tmp_path / "ct.nii", "moving"), "ct.nii", "cannot be read as NIfTI", "again")


def test_X4_plain_nifti_named_gz(tmp_path):
    (tmp_path / "ct.nii.gz").write_bytes(Path(save(tmp_path / "plain.nii", CT)).read_bytes())
    refused(lambda: read_image(tmp_path / "ct.nii.gz", "moving"), "ct.nii.gz", "not compressed", "Rename it to .nii")


def test_X4_gzip_named_nii_is_read(tmp_path):
    (tmp_path / "ct.nii").write_bytes(Path(save(tmp_path / "whole.nii.gz", CT)).read_bytes())
    assert torch.equal(read_image(tmp_path / "ct.nii").data, read_image(tmp_path / "whole.nii.gz").data)


@pytest.mark.parametrize("content", [b"text " * 200, gzip.compress(b"text " * 200, mtime=0), b"NRRD0004\n"], ids=["text", "gzipped text", "nrrd"])
def test_X4_no_nifti(tmp_path, content):
    (tmp_path / "ct.nii").write_bytes(content)
    refused(lambda: read_image(tmp_path / "ct.nii", "moving"), "ct.nii", "not a NIfTI", "dcm2niix")


# the header


def test_X5_sform_and_qform_disagree(tmp_path):
    image = read_image(save(tmp_path / "ct.nii.gz", CT, qform=1, qform_affine=moved(y_mm=4)), "moving")
    assert "moving ct.nii.gz" in said(image)
    assert image.grid.same_as(read_image(save(tmp_path / "good.nii.gz", CT)).grid)


def test_sform_and_qform_agree_within_a_tenth(tmp_path):
    "X5: rounding of 1e-4 mm is no disagreement."
    assert not said(read_image(save(tmp_path / "ct.nii.gz", CT, qform=1, qform_affine=moved(y_mm=0.05))))


def test_X6_both_codes_zero(tmp_path):
    refused(lambda: read_image(save(tmp_path / "ct.nii.gz", CT, sform=0), "moving"), "ct.nii.gz", "no orientation", "set_sform")


def test_X6_qform_alone_is_enough(tmp_path):
    image = read_image(save(tmp_path / "ct.nii.gz", CT, affine=np.zeros((4, 4)), sform=0, qform=1))
    assert not said(image)
    assert image.grid.same_as(read_image(save(tmp_path / "good.nii.gz", CT)).grid)


@pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.diag([1.0, 1, 0, 1]), np.diag([np.nan, 1, 1, 1])], ids=["zero", "flat", "nan"])
def test_X7_singular_sform(tmp_path, affine):
    refused(lambda: read_image(save(tmp_path / "ct.nii.gz", CT, affine=affine), "moving"), "ct.nii.gz", "singular", "set_sform")
    image = read_image(save(tmp_path / "ct.nii.gz", CT, affine=affine, qform=1), "moving")
    assert "the qform is used" in said(image)
    assert image.grid.same_as(read_image(save(tmp_path / "good.nii.gz", CT)).grid)


@pytest.mark.parametrize("size", [0.0, np.nan])
def test_voxel_size_zero_or_nan(tmp_path, size):
    "X9: nibabel would mend zero to 1 mm without a word."
    raw = bytearray(Path(save(tmp_path / "ct.nii", CT, sform=0, qform=1)).read_bytes())
    raw[84:88] = np.float32(size).tobytes()
    (tmp_path / "ct.nii").write_bytes(raw)
    refused(lambda: read_image(tmp_path / "ct.nii", "moving"), "ct.nii", "qform with voxel sizes", "set_sform")


def test_X9_negative_voxel_size_is_a_direction(tmp_path):
    affine = SPACE @ np.diag([1, 1, -1, 1])
    assert read_image(save(tmp_path / "ct.nii.gz", CT, affine=affine)).grid.spacing_mm == pytest.approx([1.2, 1.2, 1.5])


def test_quaternion_that_is_none(tmp_path):
    for sform, name in ((0, "ct.nii"), (1, "sform.nii")):
        raw = bytearray(Path(save(tmp_path / name, CT, sform=sform, qform=1)).read_bytes())
        raw[256:264] = np.array([0.9, 0.9], "float32").tobytes()
        (tmp_path / name).write_bytes(raw)
    refused(lambda: read_image(tmp_path / "ct.nii", "moving"), "ct.nii", "not finite", "qform with voxel sizes", "set_sform")
    assert read_image(tmp_path / "sform.nii").grid.same_as(read_image(save(tmp_path / "good.nii.gz", CT)).grid)


def test_F17_micrometres_in_the_header(tmp_path):
    refused(lambda: read_image(save(tmp_path / "ct.nii.gz", CT, affine=SPACE @ np.diag([1e3, 1e3, 1e3, 1])), "moving"), "ct.nii.gz", "not in mm")


def test_X8_small_shear_is_straightened(tmp_path):
    image = read_image(save(tmp_path / "ct.nii.gz", CT, affine=sheared(0.3)), "moving")
    assert "sheared by 0.30 degrees" in said(image)
    axes = image.grid.axes
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    assert image.data.shape == SHAPE


def test_large_shear_is_resampled(tmp_path):
    "X8: a ramp along the world's y is the same ramp on the new, orthonormal grid."
    index = np.indices(SHAPE).reshape(3, -1)
    y_mm = (sheared(12) @ np.vstack([index, np.ones(index.shape[1])]))[1].reshape(SHAPE)
    image = read_image(save(tmp_path / "ct.nii.gz", y_mm.astype("float32"), affine=sheared(12)), "moving")
    labels = read_labels(save(tmp_path / "mask.nii.gz", BLOCKS, affine=sheared(12)), "verse", image, "moving_labels")
    assert "moving_labels mask.nii.gz: its axes are sheared by 12.0 degrees" in said(image, labels)
    assert np.allclose(image.grid.axes.T @ image.grid.axes, np.eye(3), atol=1e-12)
    points_mm = image.grid.points_mm(image.data)
    at = transform_points(np.linalg.inv(sheared(12)), points_mm)
    inside = ((at >= 0) & (at <= torch.tensor(SHAPE) - 1)).all(-1)
    assert torch.allclose(points_mm[..., 1][inside], image.data[inside], atol=1e-3)
    assert inside.float().mean() > 0.6
    assert labels.data.shape == image.data.shape
    assert labels.names == ("L1", "L2", "L3")
    volume_mm3 = np.prod(image.grid.spacing_mm) * (labels.data > 0).sum().item()
    assert volume_mm3 == pytest.approx((BLOCKS > 0).sum() * abs(np.linalg.det(SPACE[:3, :3])), rel=0.05)


# the array


def test_X11_singleton_axis_is_squeezed(tmp_path):
    image = read_image(save(tmp_path / "ct.nii.gz", CT[..., None, None]), "moving")
    assert "moving ct.nii.gz: shape" in said(image)
    assert torch.equal(image.data, read_image(save(tmp_path / "good.nii.gz", CT)).data)


def test_X11_series_asks_which_volume(tmp_path):
    refused(lambda: read_image(save(tmp_path / "dwi.nii.gz", np.stack([CT] * 3, -1)), "fixed"), "dwi.nii.gz", "3 volumes", "Which one")


@pytest.mark.parametrize("array", [CT[:, :, 5], CT[:, :, 5:6], CT[:, :, :7]], ids=["2-D", "one slice", "seven slices"])
def test_X12_flat_array(tmp_path, array):
    refused(lambda: read_image(save(tmp_path / "ct.nii.gz", array), "fixed"), "ct.nii.gz", "is no volume", "at least 8")


@pytest.mark.parametrize("slices", [12, 14, 16])
def test_A6_thick_slices_are_a_volume(tmp_path, slices):
    sagittal = np.random.default_rng(0).random((slices, 60, 80)).astype("float32")
    assert read_image(save(tmp_path / "mr.nii.gz", sagittal, affine=np.diag([4.0, 0.5, 0.5, 1]))).data.shape == (slices, 60, 80)


@pytest.mark.parametrize("dtype", [[("R", "u1"), ("G", "u1"), ("B", "u1")], "complex64"], ids=["RGB", "complex"])
def test_voxels_that_are_not_numbers(tmp_path, dtype):
    refused(lambda: read_image(save(tmp_path / "ct.nii.gz", np.zeros(SHAPE, dtype)), "fixed"), "ct.nii.gz", "voxels are of type", "greyscale")


# the values


def test_X13_few_nan_are_replaced(tmp_path):
    array = CT.astype("float32")
    array[10, 10, 10:14] = [np.nan, np.inf, -np.inf, np.nan]
    image = read_image(save(tmp_path / "ct.nii.gz", array), "moving")
    assert "4 voxels" in said(image)
    assert torch.isfinite(image.data).all()
    expected = np.where(np.isfinite(array), array, CT.min())[::-1, ::-1]
    assert np.array_equal(image.data.numpy(), expected)


def test_X13_nan_around_the_scan_is_background(tmp_path):
    array = CT.astype("float32")
    array[:5] = np.nan
    image = read_image(save(tmp_path / "ct.nii.gz", array), "moving")
    assert "(25.00%)" in said(image)
    assert image.data.min() == np.nanmin(array)


@pytest.mark.parametrize("part", [np.s_[5:15, 5:15, 5:10], np.s_[:12], np.s_[:]], ids=["inside", "more than half", "all"])
def test_X13_many_nan_are_refused(tmp_path, part):
    array = CT.astype("float32")
    array[part] = np.nan
    refused(lambda: read_image(save(tmp_path / "ct.nii.gz", array), "moving"), "ct.nii.gz", "NaN or infinite", "background")


def test_X14_constant_image(tmp_path):
    refused(lambda: read_image(save(tmp_path / "ct.nii.gz", np.full(SHAPE, 7, "int16")), "moving"), "ct.nii.gz", "every voxel is 7", "again")


def test_C8_X18_ct_in_wrong_units_is_noticed(case, tmp_path):
    case["moving"] = save(tmp_path / "offset.nii.gz", CT + 1024)
    assert "moving offset.nii.gz: a CT in HU" in said(read_pair(**case, moving_modality="ct"))
    assert not said(read_pair(**case | {"moving": tmp_path / "ct.nii.gz"}, moving_modality="ct", fixed_modality="mr"))


def test_unknown_modality(case):
    refused(lambda: read_pair(**case, fixed_modality="pet"), "fixed", "mr.nii.gz", "'pet'", "'auto', 'ct' or 'mr'")


# labels


def test_X10_mask_within_a_hundredth_is_the_same(case, tmp_path):
    case["moving_labels"] = save(tmp_path / "mask.nii.gz", BLOCKS, affine=moved(0.005, 0.005))
    assert "another grid" not in said(read_pair(**case))


def test_X10_mask_with_a_rounded_header(case, tmp_path):
    case["moving_labels"] = save(tmp_path / "mask.nii.gz", BLOCKS, affine=moved(0.2))
    labels = read_pair(**case).moving_labels
    assert "another grid" in said(labels)
    assert np.array_equal(labels.data.numpy() > 0, BLOCKS[::-1, ::-1] > 0)


def test_X10_mask_of_same_shape_elsewhere(case, tmp_path):
    case["moving_labels"] = save(tmp_path / "mask.nii.gz", BLOCKS, affine=moved(0, 3))
    refused(lambda: read_pair(**case), "moving_labels", "mask.nii.gz", "3.0 mm away", "ct.nii.gz", "copy the image's affine")


def test_mask_on_a_coarser_grid(case, tmp_path):
    "X10: nearest-neighbour resampling, against an index computed by hand."
    coarse = BLOCKS[::2, ::2, ::2]
    case["moving_labels"] = save(tmp_path / "mask.nii.gz", coarse, affine=SPACE @ np.diag([2, 2, 2, 1]))
    labels = read_pair(**case).moving_labels
    assert "another grid" in said(labels)
    even = labels.data.numpy()[::-1, ::-1][::2, ::2, ::2]
    assert np.array_equal(np.array([0, *labels.values])[even], coarse)


def test_X10_mask_that_covers_more_than_the_image(case, tmp_path):
    larger = np.pad(BLOCKS, 5)
    affine = SPACE.copy()
    affine[:3, 3] -= SPACE[:3, :3] @ [5, 5, 5]
    case["moving_labels"] = save(tmp_path / "mask.nii.gz", larger, affine=affine)
    labels = read_pair(**case).moving_labels
    assert np.array_equal(np.array([0, *labels.values])[labels.data.numpy()], BLOCKS[::-1, ::-1])


def test_X10_mask_of_another_place(case, tmp_path):
    case["moving_labels"] = save(tmp_path / "mask.nii.gz", BLOCKS[:15], affine=moved(0, 500))
    refused(lambda: read_pair(**case), "moving_labels", "mask.nii.gz", "no label lies inside", "of this image")


@pytest.mark.parametrize(("array", "scheme"), [(BLOCKS * 0, "verse"), (np.minimum(BLOCKS, 5), "totalseg_v2")], ids=["all zero", "organs only"])
def test_F3c_X15_labels_without_a_vertebra(case, tmp_path, array, scheme):
    case["moving_labels"] = save(tmp_path / "mask.nii.gz", array)
    refused(lambda: read_pair(**case, moving_scheme=scheme), "moving_labels", "mask.nii.gz", "it holds no vertebra", scheme, "give no labels")


def test_B6_X16_float_labels_near_integers_are_rounded(case, tmp_path):
    case["moving_labels"] = save(tmp_path / "mask.nii.gz", BLOCKS * np.float32(1.0005))
    labels = read_pair(**case).moving_labels
    assert "rounded" in said(labels)
    assert labels.values == (20, 21, 22)


def test_B6_labels_through_a_scale_factor(case, tmp_path):
    "X16: saved as uint8 with a slope, 20 comes back as something like 20.01."
    image = nib.Nifti1Image(BLOCKS.astype("float32"), SPACE)
    image.set_data_dtype("uint8")
    nib.save(image, tmp_path / "mask.nii.gz")
    assert set(np.unique(nib.load(tmp_path / "mask.nii.gz").get_fdata())) != {0, 20, 21, 22}
    case["moving_labels"] = tmp_path / "mask.nii.gz"
    assert read_pair(**case).moving_labels.values == (20, 21, 22)


def test_B6_X16_interpolated_labels(case, tmp_path):
    soft = BLOCKS.astype("float32")
    soft[6] = 10.4
    case["moving_labels"] = save(tmp_path / "mask.nii.gz", soft)
    refused(lambda: read_pair(**case), "mask.nii.gz", "10.4", "nearest neighbour")


@pytest.mark.parametrize("array", [BLOCKS.astype("int16") - 1, BLOCKS.astype("int32") * 9999], ids=["negative", "huge"])
def test_X16_values_that_are_no_labels(case, tmp_path, array):
    case["moving_labels"] = save(tmp_path / "mask.nii.gz", array)
    refused(lambda: read_pair(**case), "mask.nii.gz", "values run from", "not an image")


def test_B1_X17_unknown_values(case, tmp_path):
    case["moving_labels"] = save(tmp_path / "mask.nii.gz", np.where(BLOCKS == 20, 99, BLOCKS).astype("uint8"))
    refused(lambda: read_pair(**case), "mask.nii.gz", f"99 ({(BLOCKS == 20).sum()} voxels)", "totalseg_v2")


def test_B1_X17_schemes_that_cannot_be_used(case):
    refused(lambda: read_pair(**case, moving_scheme="versee"), "ct_mask.nii.gz", "versee", "totalseg_mr")
    refused(lambda: read_pair(**case, moving_scheme="spider"), "ct_mask.nii.gz", "spider:L5")
    assert read_pair(**case, moving_scheme={20: "L2", 21: "L3", 22: None}).moving_labels.names == ("L2", "L3")


def test_B2_levels_that_run_upwards_are_noticed(case):
    assert "UPWARDS" in said(read_pair(**case, moving_scheme="totalseg_v1"))
    assert "UPWARDS" not in said(read_pair(**case))


# landmarks


def test_landmarks_without_their_columns(tmp_path):
    (tmp_path / "points.csv").write_text("label,x,y,z\nL3,1,2,3\n")
    refused(lambda: read_landmarks(tmp_path / "points.csv"), "points.csv", "vertebra, fixed_x_mm", "The first line must be")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("tip,L9,1,2,3,4,5,6", "'L9' is no vertebra"),
        ("tip,L3,1,2,three,4,5,6", "'three'"),
        ("tip,L3,1,2,,4,5,6", "missing"),
        ("tip,L3,1,2,3,4,5", "missing"),
        ("tip,L3,1,2,3,4,5,inf", "not finite"),
    ],
)
def test_landmarks_with_a_bad_line(tmp_path, line, reason):
    (tmp_path / "points.csv").write_text(COLUMNS + "good,,1,1,1,2,2,2\n" + line + "\n")
    refused(lambda: read_landmarks(tmp_path / "points.csv"), "points.csv", "line 3", reason)


@pytest.mark.parametrize("content", [COLUMNS.encode(), b"", b"\x1f\x8b\xff\x00\xfe"], ids=["no line", "empty", "binary"])
def test_landmarks_that_hold_nothing(tmp_path, content):
    (tmp_path / "points.csv").write_bytes(content)
    refused(lambda: read_landmarks(tmp_path / "points.csv"), "points.csv")


def test_landmarks_missing(case, tmp_path):
    case["landmarks"] = tmp_path / "nowhere.csv"
    refused(lambda: read_pair(**case), "landmarks", "nowhere.csv", "no such file")


# all together


def test_X23_all_problems_come_in_one_list(case, tmp_path):
    (tmp_path / "empty.nii.gz").touch()
    (tmp_path / "points.csv").write_text("a,b\n1,2\n")
    case |= {"fixed": tmp_path / "lost.nii.gz", "moving": tmp_path / "empty.nii.gz"}
    case["fixed_labels"] = save(tmp_path / "mr_mask.nii.gz", np.where(BLOCKS == 20, 99, BLOCKS).astype("uint8"))
    case["moving_labels"] = save(tmp_path / "soft.nii.gz", BLOCKS / np.float32(3))
    with pytest.raises(InputError) as caught:
        read_pair(**case)
    assert [problem.name for problem in caught.value.problems] == ["fixed", "moving", "moving_labels", "fixed_labels", "landmarks"]
    text = str(caught.value)
    assert text.startswith("5 problems")
    assert [line[0] for line in text.splitlines()[1:]] == list("12345")


def test_B1_good_pair_is_read_without_a_complaint(case):
    pair = read_pair(**case)
    assert (pair.fixed_modality, pair.moving_modality) == ("mr", "ct")
    assert ["taken for" in notice.text for notice in pair.notices] == [True, True]
    assert pair.moving_labels.table() == "20 = L1, 21 = L2, 22 = L3"


def test_X23_an_error_tells_what_was_noticed_about_the_other_files(case, tmp_path):
    case |= {"moving": save(tmp_path / "one.nii.gz", CT[..., None]), "landmarks": tmp_path / "nowhere.csv"}
    with pytest.raises(InputError) as caught:
        read_pair(**case)
    assert "moving one.nii.gz: shape" in said(caught.value)
    with pytest.raises(InputError) as caught:
        read_image(save(tmp_path / "ct.nii.gz", np.full((*SHAPE, 1), 7, "int16")), "moving")
    assert "moving ct.nii.gz: shape" in said(caught.value)


def test_X22_nothing_is_written_beside_the_inputs(case, tmp_path):
    before = {name: os.stat(tmp_path / name).st_mtime_ns for name in os.listdir(tmp_path)}
    read_pair(**case)
    assert before == {name: os.stat(tmp_path / name).st_mtime_ns for name in os.listdir(tmp_path)}
