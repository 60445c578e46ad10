"A saved map on other files: label maps keep their values, points say where no deformation is known."

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from spinereg.files.transforms import SpineTransform, write_transform
from spinereg.registration.apply import apply
from spinereg.space.geometry import Grid

GRID = Grid((14, 12, 16), np.diag([2.0, 2, 2, 1]))
AXES = ["x_mm", "y_mm", "z_mm"]


@pytest.fixture
def half_a_voxel(tmp_path):
    "The file of a map that reads 1 mm, half a voxel, further to the right; and an image to say on which voxels."
    disp = torch.zeros(1, 3, *GRID.shape)
    disp[:, 0] = 1
    image = np.random.default_rng(0).normal(size=GRID.shape).astype("float32")
    nib.save(nib.Nifti1Image(image, GRID.affine), tmp_path / "mr.nii.gz")
    return write_transform(tmp_path, SpineTransform(GRID, disp, -disp, np.eye(4)))[0], tmp_path / "mr.nii.gz"


def test_F5_a_label_map_is_never_interpolated_by_default(half_a_voxel, tmp_path):
    """F5: its values stay those it had, under whatever type it is stored; an image is interpolated."""
    transform, onto = half_a_voxel
    values = np.zeros(GRID.shape, "uint8")
    values[3:10, 3:9, 3:8], values[3:10, 3:9, 8:13] = 20, 24
    for dtype in ("uint8", "int16", "float32"):
        nib.save(nib.Nifti1Image(values.astype(dtype), GRID.affine), tmp_path / "mask.nii.gz")
        moved = nib.load(apply(transform, tmp_path / "mask.nii.gz", tmp_path / "moved.nii.gz", onto=onto))
        assert set(np.unique(moved.dataobj)) == {0, 20, 24} and moved.get_data_dtype().kind == "u"
    between = np.asarray(nib.load(apply(transform, onto, tmp_path / "image.nii.gz", onto=onto)).dataobj)
    image = np.asarray(nib.load(onto).dataobj)
    assert np.allclose(between[:-2], (image[:-2] + image[1:-1]) / 2, atol=1e-4)


def test_F7_points_that_are_moved_by_the_rigid_part_alone_say_so(half_a_voxel, tmp_path, capsys):
    """F7: a column in_view, and a notice with their number."""
    transform, _ = half_a_voxel
    pd.DataFrame([[10.0, 8, 12], [5000, 0, 0]], columns=AXES).to_csv(tmp_path / "points.csv", index=False)
    moved = pd.read_csv(apply(transform, tmp_path / "points.csv", tmp_path / "there.csv", to="moving"))
    assert moved.in_view.tolist() == [True, False]
    assert np.allclose(moved[AXES], [[11, 8, 12], [5000, 0, 0]], atol=1e-4)
    assert "1 of 2 points lie where no deformation is known; they are moved by the rigid part alone" in capsys.readouterr().out
