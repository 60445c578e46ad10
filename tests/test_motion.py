"How each vertebra moved: known motions come back, on any grid; known deformations have their known figures."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from spinereg.measure.motion import aligned_motions, bone_contacts, neighbour_motions, pose, vertebra_rigidity, world_motions
from spinereg.space.fields import warp_labels
from spinereg.space.geometry import Grid, transform_points
from spinereg.space.images import label_centres_mm

NAMES = ("L1", "L2", "L3")


def rigid(rotation_vector_deg, shift):
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(rotation_vector_deg, degrees=True).as_matrix()
    matrix[:3, 3] = shift
    return matrix


def oblique_grid(spacing=(1, 1.2, 4)):
    affine = rigid([10, -20, 30], [-40, 25, 800])
    affine[:3, :3] = affine[:3, :3] @ np.diag(spacing)
    return Grid((22, 30, 12), affine)


def spine(grid):
    "Two touching vertebrae; the third is not in view."
    labels = torch.zeros(1, *grid.shape, dtype=torch.long)
    labels[:, 3:18, 2:14, 2:9], labels[:, 4:20, 14:26, 3:] = 1, 2
    return labels


def field_of(grid, labels, matrices):
    "Displacement that moves each label by its own matrix."
    x = grid.points_mm(torch.zeros(1, dtype=torch.float64))
    step = torch.zeros_like(x)
    for n, matrix in enumerate(matrices, start=1):
        step[labels[0] == n] = (transform_points(matrix, x) - x)[labels[0] == n]
    return (step @ torch.as_tensor(grid.axes)).movedim(-1, 0)[None]


@settings(max_examples=20, deadline=None)
@given(turn=st.tuples(*[st.floats(-20, 20)] * 3), shift=st.tuples(*[st.floats(-15, 15)] * 3))
def test_known_motions_come_back_from_any_grid(turn, shift):
    grid = oblique_grid()
    labels, prealign = spine(grid), rigid([5, 0, -9], [3, 4, -50])
    matrices = [rigid(turn, shift), rigid([-3, 4, 1], [2, 2, -6])]
    rows, motions = vertebra_rigidity(field_of(grid, labels, matrices), grid, labels, NAMES)
    assert [row.vertebra for row in rows] == ["L1", "L2"]
    assert np.allclose(world_motions(motions, grid, prealign)[:2], prealign @ np.array(matrices), atol=1e-6)
    for row in rows:
        assert max(row.residual_max_mm, row.oc, row.pc, abs(row.volume_change_percent), row.folding_percent) < 1e-6
        assert row.det_min == pytest.approx(1)


def test_neighbours_that_share_a_motion_have_not_moved_against_each_other():
    common, alone = rigid([5, -7, 3], [10, 20, 30]), rigid([0, 0, 4], [1, 0, 0])
    relative = neighbour_motions(np.stack([common @ alone, common, common]))
    assert np.allclose(relative, [alone, np.eye(4)])


@settings(max_examples=30, deadline=None)
@given(turn=st.tuples(*[st.floats(-20, 20)] * 3), shift=st.tuples(*[st.floats(-15, 15)] * 3), origin=st.tuples(*[st.floats(-900, 900)] * 3))
def test_the_origin_of_a_scanner_is_no_motion_of_a_vertebra(turn, shift, origin):
    """A known motion about a known centre, behind any pre-alignment and any offset of the headers, comes back; the headers' figure does not."""
    centre, own = np.array([10.0, -30, -280]), rigid(turn, [0, 0, 0])
    own[:3, 3] = centre + shift - own[:3, :3] @ centre
    prealign, headers = rigid([8, -6, 20], [3, 4, -50]), rigid([0, 0, 0], origin)
    (found,) = aligned_motions((headers @ prealign @ own)[None], headers @ prealign)
    angle = np.rad2deg(Rotation.from_rotvec(turn, degrees=True).magnitude())
    assert pose(found, centre)[3:5] == pytest.approx((np.linalg.norm(shift), angle), abs=1e-6)
    both = [pose(before @ prealign @ own, centre) for before in (np.eye(4), headers)]
    moved = [np.array(each[:3]) for each in both]
    assert np.allclose(moved[1] - moved[0], origin)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_volume_change_is_an_integral_and_no_count(factor):
    grid = oblique_grid()
    labels = spine(grid)
    x = grid.voxels(torch.zeros(1, dtype=torch.float64)) * torch.as_tensor(grid.spacing_mm)
    row = vertebra_rigidity(((factor - 1) * x).movedim(-1, 0)[None], grid, labels, NAMES)[0][0]
    assert row.volume_change_percent == pytest.approx(100 * (1 - factor**3))  # a map that stretches reads a smaller vertebra from a larger one
    assert row.oc == pytest.approx(3 * (factor**2 - 1) ** 2)
    assert row.pc == pytest.approx((factor**3 - 1) ** 2)
    own = x[labels[0] == 1]
    off = (factor - 1) * (own - own.mean(0)).norm(dim=1).numpy()
    expected = np.sqrt((off**2).mean()), np.quantile(abs(off), 0.95), abs(off).max()
    assert np.allclose([row.residual_rms_mm, row.residual_p95_mm, row.residual_max_mm], expected)
    assert row.volume_mm3 == pytest.approx(len(own) * 1.2 * 4)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_volume_change_is_positive_where_the_moved_vertebra_is_larger(factor):
    "The moved label, made by the warp that makes every result and counted, against the figure: the same sign, about the same size."
    grid = Grid((40, 40, 40), np.eye(4))
    from_centre = grid.points_mm(torch.zeros(1)) - 19.5
    moving = (from_centre.abs() < torch.tensor([10.0, 11, 12])).all(-1).int()[None]
    disp = ((factor - 1) * from_centre).movedim(-1, 0)[None]
    won, share = warp_labels(moving, grid, grid, disp)
    moved = won * (share > 0.5)
    (row,), _ = vertebra_rigidity(disp, grid, moved, NAMES)
    counted = 100 * (moved.sum() - moving.sum()).item() / moved.sum().item()
    assert row.volume_change_percent == pytest.approx(100 * (1 - factor**3), abs=1e-3)
    assert counted == pytest.approx(row.volume_change_percent, abs=8)


def test_C9_a_mirrored_vertebra_is_folded_and_its_neighbour_is_not():
    grid = oblique_grid()
    labels = spine(grid)
    x = grid.voxels(torch.zeros(1, dtype=torch.float64)) * torch.as_tensor(grid.spacing_mm)
    disp = torch.where(labels[0] == 1, -2 * x[..., 0], 0)[None, None] * torch.tensor([1.0, 0, 0], dtype=torch.float64)[:, None, None, None]
    rows, motions = vertebra_rigidity(disp, grid, labels, NAMES)
    assert [row.folding_percent for row in rows] == [100, 0]
    assert [row.det_min for row in rows] == pytest.approx([-1, 1])
    assert torch.linalg.det(motions.rotation).min() > 0.999
    assert rows[1].residual_max_mm < 1e-6 < 1 < rows[0].residual_rms_mm


def test_weights_decide_the_fit():
    "Voxels without weight may go anywhere."
    grid = oblique_grid()
    labels = spine(grid)
    matrices = [rigid([4, 5, 6], [1, 2, 3]), np.eye(4)]
    disp, share = field_of(grid, labels, matrices), torch.ones(1, *grid.shape)
    disp[:, :, 3:8], share[:, 3:8] = 9, 0
    rows, motions = vertebra_rigidity(disp, grid, labels, NAMES, share)
    assert np.allclose(world_motions(motions, grid)[0], matrices[0], atol=1e-6)
    assert rows[0].residual_rms_mm < 1e-6 < rows[0].residual_max_mm


@pytest.mark.parametrize("angle", [1e-5, 0.3, 12.0])
@pytest.mark.parametrize(("axis", "place", "sign"), [(0, 0, -1), (1, 1, 1), (2, 2, 1)])
def test_clinical_angles(angle, axis, place, sign):
    "Right-hand turns about right, anterior, superior: extension, a lean to the right, a turn to the left."
    found = pose(rigid(angle * np.eye(3)[axis], [0, 0, 0]), np.zeros(3))
    expected = np.zeros(3)
    expected[place] = sign * angle
    assert np.allclose([found.flexion_deg, found.lateral_bend_deg, found.axial_rotation_deg], expected, rtol=1e-4, atol=1e-9)
    assert found.angle_deg == pytest.approx(angle, rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(turn=st.tuples(*[st.floats(-30, 30)] * 3))
def test_angles_give_the_rotation_back_also_about_the_vertebras_own_axes(turn):
    matrix, axes = rigid(turn, [1, 2, 3]), Rotation.from_euler("xyz", [40, 10, -20], degrees=True).as_matrix()
    centre = np.array([10.0, 20, 300])
    found = pose(matrix, centre, axes)
    a, b, c = np.deg2rad([-found.flexion_deg, found.lateral_bend_deg, found.axial_rotation_deg])
    turns = [Rotation.from_rotvec(angle * e).as_matrix() for angle, e in zip((a, b, c), np.eye(3))]
    assert np.allclose(axes @ turns[0] @ turns[1] @ turns[2] @ axes.T, matrix[:3, :3])
    step = np.array([found.right_mm, found.anterior_mm, found.superior_mm])
    assert np.allclose(centre + step, matrix[:3, :3] @ centre + matrix[:3, 3])
    assert found.distance_mm == pytest.approx(np.linalg.norm(step))


def test_centres_of_labels():
    grid = oblique_grid()
    labels = spine(grid)[0]
    found = label_centres_mm(labels, grid, 3)
    for n in (1, 2):
        assert np.allclose(found[n - 1], grid.points_mm(torch.zeros(1, dtype=torch.float64))[labels == n].mean(0))
    assert np.isnan(found[2]).all()


def ball(grid, centre, radius):
    return ((grid.points_mm(torch.zeros(1)) - torch.tensor(centre)) ** 2).sum(-1) < radius**2


def test_contact_of_two_balls():
    "Two balls of 10 mm pushed together until they overlap by 4 mm: a lens of two caps of 2 mm."
    grid = Grid((60, 40, 40), np.diag([0.8, 0.8, 0.8, 1.0]))
    labels = ball(grid, [12.0, 15, 15], 10) + 2 * ball(grid, [34.0, 15, 15], 10)
    push = np.stack([np.eye(4), rigid([0, 0, 0], [6, 0, 0]), np.eye(4)])
    (contact,) = bone_contacts(labels, grid, push, NAMES)
    assert contact[:2] == ("L1", "L2")
    assert contact.depth_mm == pytest.approx(4, abs=0.8)
    assert contact.volume_mm3 == pytest.approx(2 * np.pi * 2**2 * (10 - 2 / 3), rel=0.25)
    assert bone_contacts(labels, grid, np.stack([np.eye(4)] * 3), NAMES) == []


def test_bones_that_share_a_face_do_not_interpenetrate():
    grid = oblique_grid()
    labels = spine(grid)[0]
    common = rigid([5, 6, 7], [10, -3, 2])
    assert bone_contacts(labels, grid, np.stack([common] * 3), NAMES) == []
    (contact,) = bone_contacts(labels, grid, np.stack([common, common @ rigid([0, 0, 0], grid.axes @ [0, 2, 0]), common]), NAMES)
    assert contact.depth_mm == pytest.approx(2, abs=0.8)
