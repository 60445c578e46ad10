"""The polyrigid map: rigid in bone on any grid, invertible, and what it does where bones touch; made-up bones and random motions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm

from spinereg.space.fields import determinant, jacobian
from spinereg.space.geometry import Grid, transform_points
from spinereg.space.polyrigid import Polyrigid, closeness_weights, distance_map, flow_on, near_bone, release
from spinereg.space.rigid import matrix_twist, twist_matrix

GRID = Grid((24, 26, 44), np.diag([1.5, 1.2, 1.4, 1.0]))
BONES = torch.zeros(GRID.shape, dtype=torch.long)
BONES[6:18, 7:19, 5:13], BONES[6:18, 7:19, 18:26], BONES[6:18, 7:19, 31:39] = 1, 2, 3
MAPS = tuple(distance_map(BONES == number, GRID) for number in (1, 2, 3))
STILL = torch.eye(4).double()


def motion(turn_deg, shift_mm, centre=(17.0, 15, 30)):
    "A rigid motion about a centre, by SciPy."
    generator = np.zeros((4, 4))
    generator[:3, :3] = np.cross(np.eye(3), np.deg2rad(turn_deg))
    matrix = expm(generator)
    matrix[:3, 3] = np.array(centre) - matrix[:3, :3] @ np.array(centre) + np.array(shift_mm)
    return torch.from_numpy(matrix)


turns = st.tuples(*[st.floats(-4, 4)] * 3)
shifts = st.tuples(*[st.floats(-1, 1)] * 3)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(turns, shifts), min_size=3, max_size=3), turns, st.tuples(*[st.floats(-40, 40)] * 3), st.integers(0, 2**31))
def test_every_bone_is_rigid_and_every_point_comes_back(each, turn, shift, seed):
    """For any poses, with a common motion in front of them: T_k in bone to rounding, the rest to and fro within 0.01 mm."""
    centres = [(17.0, 15, z) for z in (12, 30, 48)]
    whole = motion(turn, shift)
    poses = torch.stack([whole @ motion(*pose, centre) for pose, centre in zip(each, centres)])
    poly = Polyrigid(MAPS, poses, whole, steps=8)
    generator = torch.Generator().manual_seed(seed)
    moving = torch.rand(1500, 3, generator=generator, dtype=torch.float64) * torch.tensor([36.0, 31, 62])
    fixed = poly.inverse_points(moving)
    for bone, pose in zip(MAPS, poses):
        held = bone.holds(moving)
        assert torch.allclose(transform_points(pose, fixed[held]), moving[held], atol=1e-9)
    assert (poly.points(fixed) - moving).norm(dim=1).quantile(0.99) < 0.01


def test_only_the_common_motion_is_left_far_away_and_alone_where_all_go_with_it():
    whole = motion((3, -4, 5), (10, 20, -15))
    poly = Polyrigid(MAPS, torch.stack([whole @ motion((4, 0, 0), (0, 1, 0)), whole, whole]), whole)
    far = torch.tensor([[1500.0, 0, 0], [0, -1500, 200], [17, 15, 1500]]).double()
    assert (poly.points(far) - transform_points(whole, far)).norm(dim=1).max() < 1.5
    together = Polyrigid(MAPS, whole.expand(3, 4, 4), whole)
    anywhere = torch.rand(500, 3).double() * 60
    assert torch.allclose(together.points(anywhere), transform_points(whole, anywhere), atol=1e-9)


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (0.8, 3.0, 1.1)])
def test_on_any_grid_bone_is_rigid_and_nothing_folds(spacing_mm):
    """1e-3 mm, on an oblique grid whose voxels are not those of the labels; a margin keeps the neighbourhood of bone rigid too."""
    poses = torch.stack([STILL, motion((5, 0, 0), (0, 0, 0), (17, 15, 21)), motion((9, 2, 0), (0, 0, 0), (17, 15, 21))])
    affine = twist_matrix(torch.tensor([0.1, -0.2, 0.05, 3, 5, -6]).double()).numpy() @ np.diag([*spacing_mm, 1])
    grid = Grid(tuple(int(60 / mm) for mm in spacing_mm), affine)
    for margin_mm in (0.0, 1.5):
        poly = Polyrigid(MAPS, poses, STILL, margin_mm=margin_mm)
        disp = flow_on(poly, grid)
        x = grid.points_mm(disp.double()).reshape(-1, 3)
        y = x + disp[0].double().movedim(0, -1).reshape(-1, 3) @ torch.as_tensor(grid.axes.T)
        for bone, pose in zip(MAPS, poses):
            near = bone.at(x, pose) < margin_mm if margin_mm else bone.holds(x, pose)
            assert near.sum() > 100 and (y - transform_points(pose, x))[near].norm(dim=1).max() < (0.02 if margin_mm else 1e-3)
        assert determinant(jacobian(disp, grid)).min() > 0


def test_flow_on_a_grid_goes_back():
    poses = torch.stack([STILL, motion((4, 0, 0), (0, 0, 0), (17, 15, 21)), motion((7, 0, 0), (0, 0, 0), (17, 15, 21))])
    poly = Polyrigid(MAPS, poses, STILL)
    there, back = flow_on(poly, GRID), flow_on(poly, GRID, backward=True)
    x = GRID.points_mm(there).reshape(-1, 3)
    back_points = x + back[0].movedim(0, -1).reshape(-1, 3)
    assert (poly.points(back_points) - x).norm(dim=1).max() < 0.1
    assert (there - back).abs().max() > 1


def test_the_distance_is_that_of_a_box_and_a_thin_bone_is_not_lost():
    """Against the formula for a box; a bone of one layer of voxels is held, and the leak covers it."""
    low, high = np.array([6, 7, 18]) - 0.5, np.array([18, 19, 26]) - 0.5
    points = torch.rand(3000, 3).double() * torch.tensor([34.0, 30, 60])
    outside = (points / torch.tensor(GRID.spacing_mm)).numpy()
    beyond = np.maximum(np.maximum(low - outside, outside - high), 0) * GRID.spacing_mm
    exact = np.linalg.norm(beyond, axis=1)
    near = (exact > 0) & (exact < 12)
    assert np.abs(MAPS[1].at(points).numpy() - exact)[near].max() < MAPS[1].leak_mm
    thin = torch.zeros(GRID.shape, dtype=torch.bool)
    thin[10, 5:15, 5:15] = True
    sheet = distance_map(thin, GRID)
    assert sheet.holds(GRID.points_mm(torch.zeros(1)).reshape(-1, 3)).sum() == thin.sum()
    held = sheet.holds(points.float())
    assert held.any() and sheet.at(points.float())[held].max() <= sheet.leak_mm + 1e-5


def test_one_bone_alone_fades_into_the_background():
    """And is at rest 35 mm from what it decides alone, so that a grid may end there."""
    shares = closeness_weights(torch.tensor([[-1.0, 0.5, 5.0, 15.0, 25.0, 35.0, 36.0, 400.0]]), leak_mm=1.0)[0]
    assert shares[0] == shares[1] == 1 and (shares[1:7].diff() < 0).all() and (shares[6:] == 0).all()


def test_bone_is_released_only_where_it_touches_and_slides():
    """Blocks without a gap that lie 5 mm apart in the fixed posture: only what lies in the layer is freed."""
    touching = torch.zeros(GRID.shape, dtype=torch.long)
    touching[6:18, 7:19, 5:15], touching[6:18, 7:19, 15:25] = 1, 2
    poses = torch.stack([STILL, motion((0, 0, 0), (0, 0, -5))])
    kept, found = release(touching, GRID, poses, STILL)
    freed = (touching > 0) & (kept == 0)
    assert freed.any() and not freed[:, :, :13].any() and not freed[:, :, 17:].any()
    assert {(f.bone, f.other) for f in found} == {(1, 2), (2, 1)} and all(0 < f.percent < 25 for f in found)
    kept, found = release(touching, GRID, STILL.expand(2, 4, 4), STILL)
    assert torch.equal(kept, touching) and all(f.percent == 0 for f in found)
    _, found = release(touching, GRID, torch.stack([STILL, motion((0, 0, 0), (0, 0, 4))]), STILL)
    assert all(f.gap_mm < -2 and 900 < f.overlap_mm3 < 1200 for f in found), "they lie in one another in the fixed posture"


def test_the_nearest_bone_is_found_in_either_posture():
    """Distances on an oblique grid that cuts off half of the bones: those of every point of it, bone by bone."""
    poses = torch.stack([STILL, STILL, motion((8, 0, 0), (0, 0, 0), (17, 15, 39))])
    poly = Polyrigid(MAPS, poses, motion((1, 2, 3), (4, 5, 6)))
    grid = Grid((20, 15, 30), twist_matrix(torch.tensor([0.1, -0.2, 0.05, 3, 5, 6]).double()).numpy() @ np.diag([1.0, 3, 1.5, 1]))
    x = grid.points_mm(poses).reshape(-1, 3)
    for backward in (False, True):
        apart, number = near_bone(poly, grid, backward)
        each = torch.stack([bone.at(x, there) for bone, there in zip(MAPS, poly.seen_from(backward))]).amin(0).clamp_max(15)
        assert torch.allclose(apart.flatten(), each.float(), atol=1e-3) and torch.equal(number.flatten(), poly.bone_at(x, backward))
        assert len(number.unique()) > 2


def test_log_of_a_motion_is_that_of_scipy():
    from scipy.linalg import logm

    for turn in ((0.0, 0, 0), (1e-6, 0, 0), (5, -3, 8), (100, 20, -60)):
        matrix = motion(turn, (3, -20, 7))
        twist = matrix_twist(matrix)
        log = logm(matrix.numpy()).real
        assert np.allclose(twist[:3], [log[2, 1], log[0, 2], log[1, 0]], atol=1e-8) and np.allclose(twist[3:], log[:3, 3], atol=1e-6)
