"Ours against a plain transcription of the published step where that is right, and against known answers where it is not."

import numpy as np
import pytest
import torch
from benchmarks import reference
from scipy import ndimage
from scipy.spatial.transform import Rotation

from spinereg.losses.bone import Bone, bone_jacobian, bone_voxels, rigid_motions
from spinereg.losses.objective import apply_velocity, batch_on_grid
from spinereg.losses.penalties import diffusion, oc, pc, rd, rf
from spinereg.losses.similarity import MIND
from spinereg.registration.networks import UNet, predict
from spinereg.space.geometry import Grid
from spinereg.space.rigid import RigidMotions

SHAPE = (24, 26, 22)
GRID = Grid(SHAPE, np.eye(4))


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def two_bones():
    "Two vertebrae away from the border and from each other."
    labels = torch.zeros(1, *SHAPE, dtype=torch.long)
    labels[:, 4:20, 4:12, 5:17], labels[:, 5:19, 14:22, 4:16] = 1, 2
    return labels


def one_hot(labels):
    return torch.stack([labels[0] == n for n in (1, 2)])[None].double()


def linear_field(matrix, shift=(0, 0, 0)):
    "Displacement of a linear map about the middle of the grid."
    x = GRID.voxels(torch.zeros(1, dtype=torch.float64)) - 11
    return (x @ (torch.as_tensor(matrix) - torch.eye(3)).T + torch.tensor(shift)).movedim(-1, 0)[None]


def turned():
    return linear_field(Rotation.from_rotvec([0.05, -0.08, 0.1]).as_matrix(), (1.3, -0.4, 0.7))


def test_the_network_is_the_published_one():
    theirs, ours = reference.UNet(), UNet()
    torch.nn.init.normal_(theirs.velocity.weight)
    ours.load_state_dict(theirs.state_dict())
    fixed, moving = torch.rand(2, 1, 1, 64, 80, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(ours(fixed, moving), theirs(moving, fixed), rtol=1e-5, atol=1e-6)


def test_mind_is_the_published_one_away_from_the_border():
    fixed, moved = random(1, 1, *SHAPE), random(1, 1, *SHAPE, seed=1)
    inner = (..., *[slice(6, -6)] * 3)
    mask = torch.zeros(1, 1, *SHAPE)
    mask[inner] = 1
    theirs = (reference.mind_descriptor(fixed) - reference.mind_descriptor(moved))[inner].square().mean()
    assert MIND()(fixed, moved, mask).item() == pytest.approx(theirs.item(), rel=1e-5)


def test_diffusion_is_half_the_published_one():
    "Theirs is multiplied by two; in voxels of 2 mm and in millimetres a slope is the same number."
    voxels, half = random(1, 3, 12, 13, 11), Grid((12, 13, 11), np.diag([2.0, 2.0, 2.0, 1.0]))
    assert 2 * diffusion(2 * voxels, half).item() == pytest.approx(reference.diffusion(voxels).item(), rel=1e-5)


def test_conditions_are_the_published_ones_inside_bone():
    "Any field, at voxels whose neighbours are bone too: at a surface, theirs reaches into soft tissue."
    disp, labels = 0.1 * random(1, 3, *SHAPE), two_bones()
    bone = bone_voxels(labels, 2)
    deep = (bone.steps == 2).all(0)
    bone = Bone(bone.voxel[deep], bone.vertebra[deep], bone.before[:, deep], bone.after[:, deep], bone.steps[:, deep], 1, 2)
    inner = torch.zeros_like(one_hot(labels)[0], dtype=torch.bool)
    inner[bone.vertebra, *bone.voxel[:, 1:].T] = True
    ours, theirs = bone_jacobian(disp, GRID, bone), reference.jacobian(disp)
    assert oc(ours, bone).item() == pytest.approx(reference.orthonormality(theirs, inner).item(), rel=1e-5)
    assert pc(ours, bone).item() == pytest.approx(reference.properness(theirs, inner).item(), rel=1e-5)


def test_conditions_are_the_published_ones_for_a_linear_map():
    disp, labels = linear_field(np.eye(3) + 0.1 * random(3, 3).numpy()), two_bones()
    bone, every = bone_voxels(labels, 2), one_hot(labels)[0] > 0.5
    ours, theirs = bone_jacobian(disp, GRID, bone), reference.jacobian(disp)
    assert oc(ours, bone).item() == pytest.approx(reference.orthonormality(theirs, every).item(), rel=1e-5)
    assert pc(ours, bone).item() == pytest.approx(reference.properness(theirs, every).item(), rel=1e-5)


def test_rigid_field_of_a_rigid_motion_plus_a_chequer():
    "Boxes with even sides: plus and minus half a millimetre in turn has neither a mean nor a moment, so it is all that is left."
    labels = two_bones()
    sign = 1 - 2 * (GRID.voxels(torch.zeros(1, dtype=torch.float64)).sum(-1) % 2)
    disp = turned() + 0.5 * sign * torch.tensor([0.6, 0, 0.8], dtype=torch.float64)[:, None, None, None]
    bone = bone_voxels(labels, 2)
    assert rf(disp, GRID, bone, rigid_motions(disp, GRID, bone)).item() == pytest.approx(0.5, rel=1e-5)


def test_rigid_field_of_the_transcription_is_near_what_growth_costs():
    "Its 256 random points give the motion roughly."
    torch.manual_seed(0)
    labels = two_bones()
    bones = [(labels[0] == n).nonzero().double() for n in (1, 2)]
    truth = np.mean([(0.1 * (x - x.mean(0))).norm(dim=1).mean() for x in bones])
    grid = reference.Warp(SHAPE).grid.double()
    assert reference.rigid_field(linear_field(1.1 * np.eye(3)), one_hot(labels), grid).item() == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize("squared", [True, False])
def test_rigid_dice_of_a_mismatch_in_place_is_that_of_scipy(squared):
    "The field shifts by one vector, the motion by another; SciPy shifts the labels by both."
    labels, mismatch = two_bones(), (0.4, -0.7, 1.2)
    field, motion = (1.3, 0.2, -0.8), np.add((1.3, 0.2, -0.8), mismatch)
    p, t = (np.stack([ndimage.shift(v.numpy(), -np.array(by), order=1) for v in one_hot(labels)[0]]) for by in (field, motion))
    sizes = (p**2 + t**2 if squared else p + t).sum((1, 2, 3))
    truth = 1 - (2 * (p * t).sum((1, 2, 3)) / sizes).mean()
    disp = linear_field(np.eye(3), field)
    bone = bone_voxels(torch.as_tensor(np.where(p.max(0) > 0.5, p.argmax(0) + 1, 0))[None], 2)
    motions = RigidMotions(torch.eye(3).double().repeat(2, 1, 1), torch.as_tensor(motion).repeat(2, 1))
    assert rd(disp, GRID, bone, motions, labels, GRID, squared=squared).item() == pytest.approx(truth, rel=1e-5)


def test_rigid_dice_of_the_transcription_finds_a_rigid_motion():
    "From a start that is half a voxel off; ours needs no search, because the fitted motion is the answer."
    torch.manual_seed(0)
    labels, disp, warp = two_bones(), turned().float(), reference.Warp(SHAPE)
    moving = one_hot(labels).float()
    warped = warp(moving, disp)
    R = torch.as_tensor(Rotation.from_rotvec([0.05, -0.08, 0.1]).as_matrix()).float()
    start = torch.tensor([1.3, -0.4, 0.7]) + 11 - R @ torch.tensor([11.0, 11, 11]) + torch.tensor([0.3, -0.3, 0.2])
    target = reference.closest_rigid(moving[:, :1], warped[:, :1], R, start, warp)
    before = reference.dice_loss(warp(moving[:, :1], reference.rigid_disp(warp.grid, R, start)), warped[:, :1])
    exact = reference.dice_loss(warped[:, :1], warped[:, :1])
    assert reference.dice_loss(target, warped[:, :1]) - exact < 0.2 * (before - exact)
    assert reference.rigid_dice(disp, moving, warped, warp).item() == pytest.approx(exact.item(), abs=0.03)


def test_the_transcription_keeps_the_defects_it_names():
    "So that what it is measured against is the published step; that ours is free of 1 to 5 is shown beside each subject."
    assert reference.mind_descriptor(torch.full((1, 1, 12, 12, 12), 0.3)).isnan().any()
    head = reference.Head((32, 32, 32))
    half = torch.zeros(1, 3, 16, 16, 16)
    half[:, 0] = 4
    assert head.integrate(half)[0, 0, :, 16, 16].min().item() / 2 == pytest.approx(0.98, abs=0.01)
    half[:, 0] = 1e-4 * (torch.arange(16) - 7.5)[:, None, None]
    slope = head.integrate(half)[0, 0, 8:24, 16, 16].diff().mean().item()
    assert slope == pytest.approx(1e-4 * 30 / 31, rel=1e-3)


def test_defect_8_no_size_is_frozen_in_ours():
    "One network carries pairs of two shapes, which the published head refuses; nothing but weights is stored."
    network, head = UNet(), reference.Head((16, 16, 16))
    assert all(name.endswith((".weight", ".bias")) for name in network.state_dict())
    for shape in ((16, 16, 16), (18, 21, 12)):
        grid, image = Grid(shape, np.eye(4)), torch.rand(1, 1, *shape)
        moved = apply_velocity(*predict(network, image, image, grid), batch_on_grid(image, image, torch.ones_like(image), None, (), grid))
        assert moved.disp.shape[2:] == shape
    with pytest.raises(RuntimeError):
        head(torch.zeros(1, 3, 9, 10, 6), image, image, image, image)


@pytest.mark.parametrize("full_resolution", [True, False])
def test_defect_9_a_network_can_be_printed(full_resolution):
    assert "Conv3d(2, 32" in repr(UNet(full_resolution))
