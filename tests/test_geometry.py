"Grids against NIfTI, NumPy and SciPy: whole-voxel shifts, orientations, half-voxel traps."

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from spinereg.space.geometry import Grid, crop_grid, from_ras, index_map, respace_grid, sample_index, to_ras, transform_points

ORIENTATIONS = ["".join(codes) for axes in itertools.permutations(("RL", "AP", "SI")) for codes in itertools.product(*axes)]


def random_grid(seed):
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.random(random_state=seed).as_matrix() @ np.diag(rng.uniform(0.4, 4, 3))
    affine[:3, 3] = rng.uniform(-300, 300, 3)
    return Grid(tuple(int(n) for n in rng.integers(3, 12, 3)), affine)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("step", [-2, 1, 3])
def test_A11_whole_voxel_shift_is_a_roll(axis, step):
    """A11: reading `step` voxels further moves the image by that many voxels, along the right axis."""
    image = torch.rand(1, 1, 9, 11, 13, generator=torch.Generator().manual_seed(0))
    index = Grid((9, 11, 13), np.eye(4)).voxels(image)[None] + step * torch.eye(3)[axis]
    inside = slice(max(0, -step), image.shape[2 + axis] - max(0, step))
    expected = image.roll(-step, 2 + axis).narrow(2 + axis, inside.start, inside.stop - inside.start)
    for mode, tolerance in (("nearest", 0), ("bilinear", 1e-5)):
        read = sample_index(image, index, mode).narrow(2 + axis, inside.start, inside.stop - inside.start)
        assert (read - expected).abs().max() <= tolerance


def test_A12_identity_reproduces_the_image_and_an_axis_of_one_voxel_works():
    image = torch.rand(2, 3, 5, 1, 7)
    index = Grid((5, 1, 7), np.eye(4)).voxels(image)[None]
    assert torch.allclose(sample_index(image, index), image, atol=1e-6)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_index_map_goes_by_the_world(seed):
    one, other = random_grid(seed), random_grid(seed + 1)
    index = torch.tensor(np.random.default_rng(seed).uniform(-5, 15, (20, 3)))
    direct = transform_points(index_map(one, other), index)
    by_world = transform_points(np.linalg.inv(other.affine), transform_points(one.affine, index))
    assert torch.allclose(direct, by_world, atol=1e-8)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_A1_every_stored_orientation_gives_the_same_voxels_at_the_same_places(codes):
    """A1: 48 axis orders and flips of one oblique volume."""
    data = np.random.default_rng(0).random((5, 6, 7))
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [12, -9, 20], degrees=True).as_matrix() @ np.diag([3.0, 0.9, 1.1])
    image = nib.Nifti1Image(data, affine)
    stored = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes)))
    read, grid = to_ras(np.asarray(stored.dataobj), stored.affine)
    assert np.array_equal(read, data)
    assert grid.same_as(Grid(data.shape, affine), 1e-9)
    assert np.array_equal(from_ras(read, stored.affine), np.asarray(stored.dataobj))


@given(st.integers(0, 10**6), st.floats(0.3, 6))
@settings(max_examples=40, deadline=None)
def test_A12_respacing_keeps_the_centre_and_covers_the_box(seed, spacing_mm):
    grid = random_grid(seed)
    new = respace_grid(grid, spacing_mm)
    assert np.allclose(new.centre_mm, grid.centre_mm)
    assert np.allclose(new.axes, grid.axes)
    assert (new.size_mm >= grid.size_mm - 1e-3 * spacing_mm - 1e-9).all()  # a thousandth of a voxel is rounded away
    assert (new.size_mm < grid.size_mm + spacing_mm).all()


def test_cropping_and_padding_leave_voxels_where_they_are():
    grid = random_grid(5)
    padded = crop_grid(grid, [-2, -1, 0], np.array(grid.shape) + [0, 3, 1])
    assert padded.shape == tuple(np.array(grid.shape) + [2, 4, 1])
    assert np.allclose(padded.affine @ [2, 1, 0, 1], grid.affine @ [0, 0, 0, 1])
    assert crop_grid(padded, [2, 1, 0], np.array(grid.shape) + [2, 1, 0]).same_as(grid, 1e-9)


def test_a_grid_differs_in_shape_or_place():
    grid = random_grid(1)
    moved = grid.affine.copy()
    moved[0, 3] += 0.02
    assert not grid.same_as(Grid(grid.shape, moved))
    assert not grid.same_as(crop_grid(grid, [0, 0, 0], np.array(grid.shape) + [1, 0, 0]))
