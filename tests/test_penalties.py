"Penalties against analytic values; zero for rigid bone on any voxels; no price without bone."

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from spinereg.losses.bone import bone_jacobian, bone_points_mm, bone_voxels, rigid_motions
from spinereg.losses.penalties import bending, diffusion, oc, pc, rd, rf
from spinereg.measure.motion import vertebra_rigidity
from spinereg.phantom.spine import build_spine
from spinereg.phantom.tissues import nearest_bones
from spinereg.space.fields import determinant, jacobian, warp, warp_labels
from spinereg.space.geometry import Grid, respace_grid, to_ras
from spinereg.space.rigid import RigidMotions, procrustes

ISO, THICK = (1, 1, 1), (1, 1, 4)
REAL = Path(__file__).resolve().parents[2] / "shared/data/lumbar_ct/ct_mask.nii.gz"


def make_grid(spacing, shape=(20, 22, 18)):
    "An oblique grid somewhere in the world."
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [20, -10, 30], degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = [-50, 30, 900]
    return Grid(shape, affine)


def local_mm(grid, dtype=torch.float64):
    return grid.voxels(torch.zeros(1, dtype=dtype)) * torch.as_tensor(grid.spacing_mm, dtype=dtype)


def linear_field(grid, matrix, shift=(0, 0, 0)):
    x = local_mm(grid)
    return (x @ (torch.as_tensor(matrix).double() - torch.eye(3)).T + torch.tensor(shift, dtype=torch.float64)).movedim(-1, 0)[None]


def two_boxes(grid):
    "Two touching vertebrae; the first is cut by two borders of the grid."
    labels = torch.zeros(1, *grid.shape, dtype=torch.long)
    labels[:, :12, :9, 3:14], labels[:, 2:15, 9:18, 4:-1] = 1, 2
    return labels


def penalties(disp, grid, labels, n=2, minimum=0):
    "All four rigidity terms, with labels as they are."
    bone = bone_voxels(labels, n, minimum)
    J = bone_jacobian(disp, grid, bone)
    motions = rigid_motions(disp, grid, bone)
    terms = {"oc": oc(J, bone), "pc": pc(J, bone), "rf": rf(disp, grid, bone, motions)}
    return terms | {"rd": rd(disp, grid, bone, motions, labels, grid)}


MOTION = {"turn": st.tuples(*[st.floats(-0.25, 0.25)] * 3), "shift": st.tuples(*[st.floats(-5, 5)] * 3)}


@pytest.mark.parametrize(("spacing", "limit"), [(ISO, 1e-6), (THICK, 1e-4)])
@settings(max_examples=8, deadline=None)
@given(**MOTION)
def test_B5_A6_a_rigid_vertebra_pays_nothing(spacing, limit, turn, shift):
    "Each vertebra has a motion of its own, and the soft tissue around moves at random; float32."
    grid = make_grid(spacing)
    labels = two_boxes(grid)
    first = linear_field(grid, Rotation.from_rotvec(turn).as_matrix(), shift)
    second = linear_field(grid, Rotation.from_rotvec(turn).as_matrix().T, (3, 2, 1))
    noise = 5 * torch.randn(1, 3, *grid.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    disp = torch.where(labels[:, None] == 1, first, torch.where(labels[:, None] == 2, second, noise)).float()
    terms = penalties(disp, grid, labels)
    assert all(terms[name].item() <= limit for name in ("oc", "pc", "rf"))


def drawn_spine(spacing):
    "Three drawn vertebrae with all their processes."
    spine = build_spine("L1", "L3", seed=0, scale=0.9)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-45, -75, -60]
    grid = Grid(tuple(int(n / s) for n, s in zip((90, 100, 120), spacing)), affine)
    label = nearest_bones(spine, grid.points_mm(torch.zeros(1, dtype=torch.float64)).reshape(-1, 3))[2]
    return label.view(1, *grid.shape), grid


def real_spine(spacing):
    "The lumbar vertebrae of a patient, read onto such voxels by votes."
    image = nib.load(REAL)
    data, own = to_ras(np.asarray(image.dataobj).astype(np.int64), image.affine)
    _, numbers = np.unique(data, return_inverse=True)
    grid = respace_grid(own, np.array(spacing, float))
    won, fraction = warp_labels(torch.as_tensor(numbers.reshape(1, *data.shape)), own, grid)
    return won * (fraction > 0.5), grid


REAL_SHAPES = [drawn_spine, pytest.param(real_spine, marks=pytest.mark.skipif(not REAL.is_file(), reason="the real CT is not on this machine"))]


@pytest.mark.parametrize("spacing", [ISO, THICK, (4, 1, 1)])
@pytest.mark.parametrize("shape", REAL_SHAPES)
def test_B5_A6_thin_bone_of_real_shape_pays_nothing_for_a_rotation(shape, spacing):
    "Laminae and processes are one voxel thin in places, where no difference can be taken: neither penalties nor reported figures count them."
    labels, grid = shape(spacing)
    n = int(labels.max())
    bone = bone_voxels(labels, n, minimum=0)
    thin = (~bone.measured).double().mean().item()
    assert thin > (1e-4 if spacing == ISO else 0.02)
    turning = linear_field(grid, Rotation.from_rotvec([0.2, -0.15, 0.1]).as_matrix(), (3, -2, 5))
    J = bone_jacobian(turning, grid, bone)
    assert mean_over_all(J) > 1e-3 * thin
    assert max(oc(J, bone).item(), pc(J, bone).item()) < 1e-12
    rows, _ = vertebra_rigidity(turning, grid, labels, [str(k) for k in range(n)])
    for row in rows:
        assert max(row.oc, row.pc, abs(row.volume_change_percent), row.folding_percent, abs(row.det_min - 1)) < 1e-9
    stretched, _ = vertebra_rigidity(linear_field(grid, np.diag([1.1, 0.9, 1.2])), grid, labels, [str(k) for k in range(n)])
    assert all(row.volume_change_percent == pytest.approx(100 * (1 - 1.1 * 0.9 * 1.2)) for row in stretched)


def mean_over_all(J):
    "OC with the thin voxels in it."
    return (J.mT @ J - torch.eye(3).to(J)).square().sum((1, 2)).mean().item()


def test_a_vertebra_of_which_nothing_is_known_has_no_strain():
    "A plate of one voxel: no penalty and no gradient; in the figures its strain is unknown, its residual is not."
    grid = make_grid(ISO)
    labels = torch.zeros(1, *grid.shape, dtype=torch.long)
    labels[:, 4:14, 5:15, 8] = 1
    disp = torch.randn(1, 3, *grid.shape, dtype=torch.float64).requires_grad_()
    bone = bone_voxels(labels, 1, minimum=0)
    J = bone_jacobian(disp, grid, bone)
    (slope,) = torch.autograd.grad((oc(J, bone) + pc(J, bone)).sum(), disp)
    assert oc(J, bone).item() == pc(J, bone).item() == slope.abs().max() == 0
    ((row,), _) = vertebra_rigidity(disp.detach(), grid, labels, ["L1"])
    assert np.isnan([row.oc, row.pc, row.volume_change_percent, row.folding_percent, row.det_min]).all()
    assert row.residual_rms_mm > 0.1


@pytest.mark.parametrize(("spacing", "limit"), [(ISO, 1e-6), (THICK, 1e-4)])
@settings(max_examples=8, deadline=None)
@given(**MOTION)
def test_B5_A6_rigid_dice_of_a_rigid_motion_is_zero(spacing, limit, turn, shift):
    "In float64: at a rounding error the two readings may fall to different sides of a voxel."
    grid = make_grid(spacing)
    labels = two_boxes(grid)
    disp = linear_field(grid, Rotation.from_rotvec(turn).as_matrix(), shift)
    assert penalties(disp, grid, labels)["rd"].item() <= limit


@pytest.mark.parametrize("spacing", [ISO, THICK, (1, 1.2, 4)])
def test_B5_growth_by_ten_percent_has_its_price(spacing):
    grid = make_grid(spacing)
    labels = two_boxes(grid)
    terms = penalties(linear_field(grid, 1.1 * np.eye(3)), grid, labels)
    bone = bone_voxels(labels, 2)
    x = bone_points_mm(grid, bone)
    off = [(0.1 * (x[bone.vertebra == n] - x[bone.vertebra == n].mean(0))).norm(dim=1) for n in (0, 1)]
    assert terms["oc"].item() == pytest.approx(3 * 0.21**2)
    assert terms["pc"].item() == pytest.approx((1.1**3 - 1) ** 2)
    assert terms["rf"].item() == pytest.approx(torch.cat(off).mean().item())
    assert terms["rd"].item() > 0.02


def test_oc_is_the_distance_of_the_gram_matrix_from_the_identity():
    "Against products of matrices in numpy, for Jacobians that are anything."
    grid = make_grid(THICK)
    labels = two_boxes(grid)
    bone = bone_voxels(labels, 2, minimum=0)
    J = bone_jacobian(3 * torch.randn(1, 3, *grid.shape, dtype=torch.float64), grid, bone)
    wanted = np.mean([np.linalg.norm(j.T @ j - np.eye(3)) ** 2 for j in J[bone.measured].numpy()])
    assert oc(J, bone).item() == pytest.approx(wanted)


@pytest.mark.parametrize("term", ["oc", "rf"])
def test_B5_a_term_has_an_effect(term):
    "Descending from a bent field, the strain in the bone falls by more than half."
    grid = make_grid(ISO, (14, 14, 14))
    labels = torch.zeros(1, 14, 14, 14, dtype=torch.long)
    labels[:, 2:12, 3:11, 2:12] = 1
    x = local_mm(grid, torch.float32)
    disp = torch.stack([torch.sin(x[..., 2] / 2), torch.cos(x[..., 0] / 2), 0.05 * (x[..., 1] - 7) ** 2])[None].requires_grad_()
    optimiser = torch.optim.Adam([disp], lr=0.05)

    def strain():
        return penalties(disp.detach(), grid, labels, 1)["oc"].item()

    before = strain()
    for _ in range(40):
        optimiser.zero_grad()
        penalties(disp, grid, labels, 1)[term].sum().backward()
        optimiser.step()
    assert strain() < 0.5 * before


def published_oc(disp, grid, labels):
    "Defect 2: differences in voxels, zeros beyond the border, a squeeze before the sum over the second axis, a mean that may be empty."
    u = F.pad(disp / torch.as_tensor(grid.spacing_mm).to(disp)[:, None, None, None], [1] * 6)
    c = slice(1, -1)
    slopes = [u[:, :, 2:, c, c] - u[:, :, :-2, c, c], u[:, :, c, 2:, c] - u[:, :, c, :-2, c], u[:, :, c, c, 2:] - u[:, :, c, c, :-2]]
    eye = torch.eye(3).to(u)[..., None, None, None]
    J = torch.stack(slopes, 2).squeeze(0) / 2 + eye
    inside = torch.stack([labels[0] == n for n in range(1, max(int(labels.max()), 1) + 1)])
    products = inside[:, None, None, None] * (J[:, :, None] * J[:, None, :])
    excess = products.squeeze().sum(1) - (inside[:, None, None] * eye).squeeze()
    return excess.square().sum()[None] / inside.sum()


def our_oc(disp, grid, labels):
    bone = bone_voxels(labels, 2, minimum=0)
    return oc(bone_jacobian(disp, grid, bone), bone)


def rotation_on_thick_slices(oc):
    grid = make_grid(THICK)
    labels = torch.zeros(1, *grid.shape, dtype=torch.long)
    labels[:, 4:14, 5:15, 6:9], labels[:, 4:14, 5:15, 9:12] = 1, 2
    return oc(linear_field(grid, Rotation.from_rotvec([0.5, 0.2, 0]).as_matrix()), grid, labels).item() <= 1e-6


def rotation_of_one_label(oc):
    grid = make_grid(ISO)
    labels = torch.zeros(1, *grid.shape, dtype=torch.long)
    labels[:, 4:14, 5:15, 6:12] = 1
    return oc(linear_field(grid, Rotation.from_rotvec([0.5, 0.2, 0]).as_matrix()), grid, labels).item() <= 1e-6


def shift_at_the_border(oc):
    grid = make_grid(ISO)
    return oc(linear_field(grid, np.eye(3), (4, 0, 0)), grid, two_boxes(grid)).item() <= 1e-6


def no_bone(oc):
    grid = make_grid(ISO)
    return oc(linear_field(grid, 1.1 * np.eye(3)), grid, torch.zeros(1, *grid.shape, dtype=torch.long)).item() == 0


def two_samples(oc):
    grid = make_grid(ISO)
    fields = linear_field(grid, 1.1 * np.eye(3)), linear_field(grid, 1.2 * np.eye(3))
    labels = two_boxes(grid)
    try:
        both = oc(torch.cat(fields), grid, labels.repeat(2, 1, 1, 1))
    except (IndexError, RuntimeError):
        return False
    return len(both) == 2 and torch.allclose(both, torch.cat([oc(field, grid, labels) for field in fields]))


@pytest.mark.parametrize("check", [rotation_on_thick_slices, rotation_of_one_label, shift_at_the_border, no_bone, two_samples])
def test_A6_defect_2_is_rejected(check):
    assert check(our_oc)
    assert not check(published_oc)


def test_A6_the_copy_of_defect_2_is_a_fair_one():
    "On isotropic voxels, away from the border, with two labels that do not touch, it measures the same."
    grid = make_grid(ISO)
    labels = torch.zeros(1, *grid.shape, dtype=torch.long)
    labels[:, 3:9, 5:15, 6:12], labels[:, 11:17, 5:15, 6:12] = 1, 2
    growth = linear_field(grid, np.diag([1.1, 0.9, 1.2]))
    assert torch.allclose(published_oc(growth, grid, labels), our_oc(growth, grid, labels))


def published_fit(points, moved, few):
    "Defect 5: 256 of the points, centred on the means of all of them."
    x, y = points[few] - points.mean(0), moved[few] - moved.mean(0)
    U, _, Vt = torch.linalg.svd(x.T @ y)
    R = Vt.T @ torch.diag(torch.tensor([1, 1, torch.linalg.det(Vt.T @ U.T).sign()]).to(Vt)) @ U.T
    return RigidMotions(R[None], (moved.mean(0) - R @ points.mean(0))[None])


def fit_is_least_squares(fit):
    "A quarter of the points moved on top of a rotation; SciPy's fit of the chosen points is the truth."
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4000, 3, dtype=torch.float64, generator=generator) * torch.tensor([20.0, 15, 10]) + 100
    moved = points @ torch.as_tensor(Rotation.from_rotvec([0.1, 0.2, 0.3]).as_matrix()).T
    moved[:1000] += 3
    few = torch.randperm(4000, generator=generator)[:256]
    x, y = (p[few] - p[few].mean(0) for p in (points, moved))
    truth, _ = Rotation.align_vectors(y.numpy(), x.numpy())
    return np.allclose(fit(points, moved, few).rotation[0].numpy(), truth.as_matrix(), atol=1e-9)


def test_B5_defect_5_is_rejected():
    def ours(points, moved, few):
        return procrustes(points[few], moved[few], torch.ones(256, dtype=torch.float64), torch.zeros(256, dtype=torch.long), 1)

    assert fit_is_least_squares(ours)
    assert not fit_is_least_squares(published_fit)


def test_C3_the_same_field_costs_the_same_on_other_voxels():
    def waves(spacing):
        grid = Grid(tuple(int(96 / s) for s in spacing), np.diag([*spacing, 1.0]))
        x = grid.points_mm(torch.zeros(1)) + torch.tensor(spacing) / 2
        return torch.stack([torch.sin(x[..., 1] / 8), torch.cos(x[..., 2] / 10), torch.sin(x[..., 0] / 9 + x[..., 1] / 12)])[None], grid

    for penalty in (diffusion, bending):
        fine, coarse, mixed = (penalty(*waves(s)).item() for s in ((1, 1, 1), (2, 2, 2), (1, 2, 1.5)))
        assert coarse == pytest.approx(fine, rel=0.05)
        assert mixed == pytest.approx(fine, rel=0.05)


@pytest.mark.parametrize("spacing", [ISO, THICK])
def test_C3_linear_and_quadratic_fields(spacing):
    grid = make_grid(spacing)
    L = np.random.default_rng(0).normal(size=(3, 3)) / 10
    field = linear_field(grid, np.eye(3) + L)
    assert diffusion(field, grid).item() == pytest.approx((L**2).sum() / 9)
    assert bending(field, grid).item() < 1e-20
    x = local_mm(grid)
    mixed = torch.stack([x[..., 0] * x[..., 2], 0 * x[..., 0], 0 * x[..., 0]])[None]
    assert bending(mixed, grid).item() == pytest.approx(2 / 3)


def test_C9_jacobian_in_the_bone_is_the_dense_one_where_that_stays_inside():
    grid = make_grid((1, 1.2, 4))
    disp = torch.randn(1, 3, *grid.shape, dtype=torch.float64)
    bone = bone_voxels(two_boxes(grid), 2)
    deep = (bone.steps == 2).all(0)
    assert torch.allclose(bone_jacobian(disp, grid, bone)[deep], jacobian(disp, grid)[tuple(bone.voxel[deep].T)])
    random = torch.randn(50, 3, 3, dtype=torch.float64)
    assert torch.allclose(determinant(random), torch.linalg.det(random))


def test_jacobian_in_the_bone_never_leaves_its_vertebra():
    grid = make_grid(ISO)
    labels = two_boxes(grid)
    disp = torch.randn(1, 3, *grid.shape, dtype=torch.float64)
    other = torch.where(labels[:, None] == 1, disp, torch.randn_like(disp))
    bone = bone_voxels(labels, 2)
    first = bone.vertebra == 0
    assert torch.equal(bone_jacobian(disp, grid, bone)[first], bone_jacobian(other, grid, bone)[first])


def test_batch_of_two_is_two_batches_of_one_and_no_bone_is_free():
    grid = make_grid((1, 1.2, 4))
    labels = torch.cat([two_boxes(grid), two_boxes(grid).flip(1), torch.zeros(1, *grid.shape, dtype=torch.long)])
    disp = torch.randn(3, 3, *grid.shape, dtype=torch.float64, requires_grad=True)
    together = penalties(disp, grid, labels)
    for n in range(3):
        alone = penalties(disp[n : n + 1], grid, labels[n : n + 1])
        for name, value in alone.items():
            assert torch.allclose(value, together[name][n : n + 1]), name
    for value in together.values():
        assert value[2] == 0
        (grad,) = torch.autograd.grad(value.sum(), disp, retain_graph=True)
        assert grad[:2].abs().max() > 0
        assert grad[2].abs().max() == 0


def test_C1_no_bone_at_all():
    grid = make_grid(ISO)
    disp = torch.randn(2, 3, *grid.shape, requires_grad=True)
    for value in penalties(disp, grid, torch.zeros(2, *grid.shape, dtype=torch.long)).values():
        (grad,) = torch.autograd.grad(value.sum(), disp, retain_graph=True)
        assert value.tolist() == [0, 0]
        assert grad.abs().max() == 0


def test_small_vertebrae_are_left_out():
    labels = torch.zeros(1, 12, 12, 12, dtype=torch.long)
    labels[:, :5, :5, :4], labels[:, 6:, 6:, 6:] = 1, 2
    assert bone_voxels(labels, 2, minimum=100).vertebra.unique().tolist() == [1]
    assert bone_voxels(labels, 2, minimum=99).vertebra.unique().tolist() == [0, 1]


@pytest.mark.parametrize("squared", [True, False])
def test_rigid_dice_against_dense_one_hot_warps(squared):
    "Between grids of other shape, spacing and orientation, through a pre-alignment."
    grid = make_grid(ISO, (24, 26, 28))
    label_grid = make_grid((1.3, 1.1, 1.4), (22, 26, 21))
    labels = torch.zeros(1, *label_grid.shape, dtype=torch.long)
    labels[:, 5:16, 5:12, 5:16], labels[:, 6:17, 12:20, 6:16] = 1, 2
    world = np.eye(4)
    world[:3, 3] = [1, -2, 1]
    x = local_mm(grid)
    disp = torch.stack([torch.sin(x[..., 1] / 6), 0.03 * x[..., 2], torch.cos(x[..., 0] / 5)])[None]
    one_hot = torch.stack([labels == 1, labels == 2], 1).double()
    p = warp(one_hot, label_grid, grid, disp, world, outside="zeros")
    won = torch.where(p.max(1).values > 0.5, p.argmax(1) + 1, 0)
    bone = bone_voxels(won, 2)
    motions = rigid_motions(disp, grid, bone)
    t = []
    for n in (0, 1):
        rigid = (x @ motions.rotation[n].T + motions.translation[n] - x).movedim(-1, 0)[None]
        t.append(warp(one_hot[:, n : n + 1], label_grid, grid, rigid, world, outside="zeros")[0, 0])
    p, t = p[0], torch.stack(t)
    sizes = (p**2 + t**2 if squared else p + t).sum((1, 2, 3))
    truth = 1 - (2 * (p * t).sum((1, 2, 3)) / sizes).mean()
    assert rd(disp, grid, bone, motions, labels, label_grid, world, squared=squared).item() == pytest.approx(truth.item(), abs=1e-6)


def test_masks_and_rigid_motions_carry_no_gradient():
    grid = make_grid(ISO)
    disp = torch.randn(1, 3, *grid.shape, requires_grad=True)
    motions = rigid_motions(disp, grid, bone_voxels(two_boxes(grid), 2))
    assert not motions.rotation.requires_grad
    assert not motions.translation.requires_grad


def test_gradients_against_finite_differences():
    grid = make_grid((1, 1.2, 4), (3, 4, 3))
    labels = torch.zeros(2, 3, 4, 3, dtype=torch.long)
    labels[0, 1:, 1:3, 1:3], labels[1, :2, 2:, :] = 1, 2
    bone = bone_voxels(labels, 2, minimum=3)
    u = torch.randn(2, 3, 3, 4, 3, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    motions = rigid_motions(u, grid, bone)
    assert torch.autograd.gradcheck(lambda u: diffusion(u, grid), u)
    assert torch.autograd.gradcheck(lambda u: bending(u, grid), u)
    assert torch.autograd.gradcheck(lambda u: oc(bone_jacobian(u, grid, bone), bone), u)
    assert torch.autograd.gradcheck(lambda u: pc(bone_jacobian(u, grid, bone), bone), u)
    assert torch.autograd.gradcheck(lambda u: rf(u, grid, bone, motions), u)
    assert torch.autograd.gradcheck(lambda u: rd(u, grid, bone, motions, labels, grid), u)


def test_C2_full_precision_inside_autocast():
    grid = make_grid(ISO)
    labels = two_boxes(grid)
    disp = torch.randn(1, 3, *grid.shape)
    exact = penalties(disp, grid, labels) | {"diffusion": diffusion(disp, grid), "bending": bending(disp, grid)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = penalties(disp, grid, labels) | {"diffusion": diffusion(disp, grid), "bending": bending(disp, grid)}
    for name, value in exact.items():
        assert inside[name].dtype == torch.float32
        assert torch.allclose(value, inside[name], rtol=1e-2), name


def test_a_field_at_rest_has_no_rigid_field_gradient():
    """The direction of a rounding error is no direction: an optimiser that starts at rest must not follow it."""
    grid = Grid((12, 12, 12), np.diag([1.0, 1.0, 1.0, 1.0]) + np.array([[0, 0, 0, 311.7]] * 3 + [[0, 0, 0, 0]]))
    labels = torch.zeros(1, 12, 12, 12, dtype=torch.long)
    labels[:, 2:10, 3:9, 2:10] = 1
    disp = torch.zeros(1, 3, 12, 12, 12, requires_grad=True)
    bone = bone_voxels(labels, 1)
    rf(disp, grid, bone, rigid_motions(disp, grid, bone)).sum().backward()
    assert disp.grad.abs().max() == 0
