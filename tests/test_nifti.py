"NIfTI files there and back: orientation against SimpleITK, header codes, integers, atomic writing."

import gzip
import io
import itertools
import os
import stat

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from spinereg.files import nifti
from spinereg.files.nifti import write_image
from spinereg.files.problems import InputFile, write_atomic
from spinereg.space.fields import warp
from spinereg.space.geometry import Grid, covering_grid, orthonormal_grid, shear_deg, transform_points

ORIENTATIONS = [np.stack([axes, signs], 1) for axes in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)]
LPS = np.diag([-1.0, -1, 1])


def read_nifti(path):
    return nifti.read_nifti(InputFile("image", path))


def turn(x_deg, y_deg, z_deg):
    a, b, c = np.deg2rad([x_deg, y_deg, z_deg])
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return x @ y @ z


def oblique(spacing_mm=(1.5, 1.0, 0.75), degrees=(15, -8, 20), origin_mm=(-12, 30, -200)):
    affine = np.eye(4)
    affine[:3, :3] = turn(*degrees) @ np.diag(spacing_mm)
    affine[:3, 3] = origin_mm
    return affine


def image_of(shape=(9, 10, 12), affine=None, dtype="int16", sform=2, qform=1):
    affine = oblique() if affine is None else affine
    image = nib.Nifti1Image(np.random.default_rng(0).integers(0, 1000, shape).astype(dtype), affine)
    image.header.set_sform(affine, sform)
    image.header.set_qform(affine, qform)
    return image


def raw_header(path):
    "The header as it is on disk; nibabel's loaded header has its scale factors taken out."
    return nib.Nifti1Header.from_fileobj(io.BytesIO(gzip.decompress(path.read_bytes())))


def test_A1_all_48_orientations_are_one_image(tmp_path):
    "A1: equal voxels, and grids equal to 1e-5 mm, whatever the axis order and directions on disk."
    image = image_of()
    first, space = read_nifti(image_path(tmp_path, image))
    stored_as = {}
    for orientation in ORIENTATIONS:
        data, native = read_nifti(image_path(tmp_path, image.as_reoriented(orientation)))
        assert np.array_equal(data, first)
        assert native.grid.shape == space.grid.shape
        assert np.abs(native.grid.affine - space.grid.affine).max() < 1e-5
        stored_as[nib.aff2axcodes(native.affine)] = native.grid.axcodes
    assert len(stored_as) == 48
    assert set(stored_as.values()) == {"RAS"}


def image_path(folder, image):
    nib.save(image, folder / "image.nii.gz")
    return folder / "image.nii.gz"


@pytest.mark.parametrize("orientation", [0, 5, 17, 30, 46])
@pytest.mark.parametrize("degrees", [(0, 0, 0), (20, 0, 0), (-15, 25, 10)])
def test_A1_voxels_are_where_simpleitk_puts_them(tmp_path, orientation, degrees):
    "Value and world position of voxels, against a reader of another making (LPS turned to RAS)."
    path = image_path(tmp_path, image_of(affine=oblique(degrees=degrees)).as_reoriented(ORIENTATIONS[orientation]))
    data, native = read_nifti(path)
    other = sitk.ReadImage(str(path))
    for index in [(0, 0, 0), (3, 1, 7), (8, 9, 11)]:
        world = transform_points(native.grid.affine, torch.tensor(index, dtype=torch.float64)).numpy()
        theirs = other.TransformPhysicalPointToIndex((LPS @ world).tolist())
        assert data[index] == other.GetPixel(*theirs)
        assert LPS @ np.array(other.TransformIndexToPhysicalPoint(theirs)) == pytest.approx(world, abs=1e-3)


@pytest.mark.parametrize("orientation", range(0, 48, 5))
def test_A14_round_trip_keeps_voxels_affines_and_codes(tmp_path, orientation):
    image = image_of(sform=4, qform=1).as_reoriented(ORIENTATIONS[orientation])
    image.header["sform_code"], image.header["qform_code"] = 4, 1
    image.header["cal_max"] = 500
    path = image_path(tmp_path, image)
    data, native = read_nifti(path)
    before, after = raw_header(path), raw_header(write_image(tmp_path / "out.nii.gz", torch.from_numpy(data), native, "int16"))
    for key in ("dim", "pixdim", "sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x", "xyzt_units"):
        assert np.array_equal(before[key], after[key]), key
    assert (after["scl_slope"], after["scl_inter"], after["cal_max"]) == (1, 0, 0)
    assert np.array_equal(nib.load(tmp_path / "out.nii.gz").dataobj, nib.load(path).dataobj)


@pytest.mark.parametrize(("sform", "qform"), [(1, 0), (0, 1), (2, 2), (4, 1)])
def test_A14_both_affines_stay_even_when_they_differ(tmp_path, sform, qform):
    image = image_of(sform=sform, qform=qform)
    other = oblique(origin_mm=(-12, 30, -190))
    image.header.set_qform(other, qform)
    path = image_path(tmp_path, nib.Nifti1Image(image.get_fdata().astype("int16"), None, image.header))
    data, native = read_nifti(path)
    codes = native.header["sform_code"], native.header["qform_code"]
    assert (*codes, native.header.get_data_shape()) == (sform, qform, (9, 10, 12))
    write_image(tmp_path / "out.nii.gz", torch.from_numpy(data).float(), native)
    before, after = raw_header(path), raw_header(tmp_path / "out.nii.gz")
    assert np.array_equal(before.get_sform(), after.get_sform())
    assert np.array_equal(before.get_qform(), after.get_qform())
    assert (after["sform_code"], after["qform_code"]) == (sform, qform)


def test_A14_X8_sheared_file_is_written_on_its_own_grid(tmp_path):
    sheared = oblique()
    sheared[:3, 2] += 0.2 * sheared[:3, 1]
    path = image_path(tmp_path, image_of(affine=sheared, qform=0))
    data, native = read_nifti(path)
    write_image(tmp_path / "out.nii.gz", torch.from_numpy(data), native, "int16")
    assert np.array_equal(raw_header(path).get_sform(), raw_header(tmp_path / "out.nii.gz").get_sform())
    assert np.array_equal(nib.load(tmp_path / "out.nii.gz").dataobj, nib.load(path).dataobj)
    assert shear_deg(native.grid) > 5


def test_A14_nifti_2_stays_nifti_2(tmp_path):
    nib.save(nib.Nifti2Image(image_of().get_fdata().astype("float32"), oblique()), tmp_path / "image.nii")
    data, native = read_nifti(tmp_path / "image.nii")
    written = nib.load(write_image(tmp_path / "out.nii", torch.from_numpy(data), native))
    assert isinstance(written, nib.Nifti2Image)
    assert np.array_equal(written.get_fdata(), nib.load(tmp_path / "image.nii").get_fdata())


def test_big_endian_file(tmp_path):
    image = image_of()
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), None, image.header.as_byteswapped(">")), tmp_path / "big.nii")
    data, native = read_nifti(tmp_path / "big.nii")
    assert np.array_equal(data, read_nifti(image_path(tmp_path, image))[0])
    written = nib.load(write_image(tmp_path / "out.nii", torch.from_numpy(data.astype("float32")), native))
    assert np.array_equal(written.get_fdata(), image.get_fdata())


def test_vector_file_has_five_dimensions(tmp_path):
    "Components are written as they are given; ITK reads them as a displacement field."
    data, native = read_nifti(image_path(tmp_path, image_of().as_reoriented(ORIENTATIONS[13])))
    vectors = torch.from_numpy(np.stack([data, data + 1000, data + 2000], -1).astype("float32"))
    path = write_image(tmp_path / "disp.nii.gz", vectors, native, intent="vector")
    written = nib.load(path)
    assert written.shape == (*native.header.get_data_shape(), 1, 3)
    assert written.header.get_intent()[0] == "vector"
    assert np.array_equal(written.get_fdata()[..., 0, 1] - written.get_fdata()[..., 0, 0], np.full(native.header.get_data_shape(), 1000))
    field = sitk.ReadImage(str(path))
    assert (field.GetNumberOfComponentsPerPixel(), field.GetDimension()) == (3, 3)


def test_content_of_the_original_stays_behind(tmp_path):
    image = image_of()
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"patient name"))
    image.header.set_slope_inter(2.5, 7)
    data, native = read_nifti(image_path(tmp_path, image))
    written = nib.load(write_image(tmp_path / "out.nii.gz", torch.from_numpy(data.astype("float32")), native))
    assert len(written.header.extensions) == 0
    assert np.allclose(written.get_fdata(), image.get_fdata() * 2.5 + 7)


def test_B6_integers_come_from_integers(tmp_path):
    data, native = read_nifti(image_path(tmp_path, image_of()))
    with pytest.raises(ValueError, match="convert it to integers"):
        write_image(tmp_path / "out.nii.gz", torch.from_numpy(data).float(), native, "uint8")


def test_data_of_another_grid_is_refused(tmp_path):
    _, native = read_nifti(image_path(tmp_path, image_of()))
    with pytest.raises(ValueError, match="resample it there first"):
        write_image(tmp_path / "out.nii.gz", torch.zeros(9, 10, 11), native)


def test_X22_path_with_spaces_and_letters_of_all_kinds(tmp_path):
    folder = tmp_path / "Wirbelsäule – 脊椎 (1)"
    folder.mkdir()
    data, native = read_nifti(image_path(folder, image_of()))
    path = write_image(folder / "out dir" / "bewegt ü.nii.gz", torch.from_numpy(data), native, "int16")
    assert np.array_equal(read_nifti(path)[0], data)


def test_X22_read_only_input_folder(tmp_path):
    folder = tmp_path / "inputs"
    folder.mkdir()
    path = image_path(folder, image_of())
    os.chmod(folder, stat.S_IRUSR | stat.S_IXUSR)
    try:
        data, native = read_nifti(path)
        write_image(tmp_path / "out" / "moved.nii.gz", torch.from_numpy(data), native, "int16")
        assert os.listdir(folder) == ["image.nii.gz"]
    finally:
        os.chmod(folder, stat.S_IRWXU)


def test_atomic_writing_leaves_the_old_file_or_the_new_one(tmp_path):
    path = write_atomic(tmp_path / "deep" / "er" / "a.txt", lambda partial: partial.write_text("old"))

    def stopped(partial):
        partial.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, stopped)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["a.txt"]


def test_same_voxels_give_the_same_bytes(tmp_path):
    data, native = read_nifti(image_path(tmp_path, image_of()))
    once, twice = (write_image(tmp_path / name / "out.nii.gz", torch.from_numpy(data), native, "int16").read_bytes() for name in "ab")
    assert once == twice


@pytest.mark.parametrize("angle_deg", [0.2, 5.0, 20.0])
def test_sheared_grid_and_its_covering_grid(angle_deg):
    affine = oblique()
    length = np.linalg.norm(affine[:3, 2])
    leaning = np.cos(np.deg2rad(angle_deg)) * affine[:3, 2] / length + np.sin(np.deg2rad(angle_deg)) * affine[:3, 1] / np.linalg.norm(affine[:3, 1])
    affine[:3, 2] = length * leaning
    grid = Grid((20, 24, 28), affine)
    straight, cover = orthonormal_grid(grid), covering_grid(grid)
    assert shear_deg(grid) == pytest.approx(angle_deg)
    assert np.allclose(straight.axes.T @ straight.axes, np.eye(3), atol=1e-12)
    assert np.allclose(straight.centre_mm, grid.centre_mm)
    inside = transform_points(np.linalg.inv(cover.affine), torch.from_numpy(grid.corners_mm())).numpy()
    assert (inside >= -0.5 - 1e-6).all()
    assert (inside <= np.array(cover.shape) - 0.5 + 1e-6).all()


def test_resample_onto_itself_is_identity():
    grid = Grid((7, 8, 9), oblique())
    data = torch.rand(7, 8, 9)
    assert torch.allclose(warp(data[None, None], grid, grid, outside="zeros")[0, 0], data, atol=1e-5)
    assert torch.equal(warp(data[None, None], grid, grid, mode="nearest", outside="zeros")[0, 0], data)
