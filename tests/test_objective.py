"What a velocity does to a batch, and the loss made of it: against matrix exponentials, scipy's interpolation, and one sample at a time."

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from scipy.ndimage import map_coordinates

from spinereg.losses.bone import bone_voxels
from spinereg.losses.objective import TERMS, Weights, apply_velocity, batch_on_grid, likeness, loss_terms, moved_labels
from spinereg.losses.similarity import LNCC, MI, MIND
from spinereg.registration.networks import velocity_grid
from spinereg.space.geometry import Grid

BOTH = pytest.mark.parametrize("full", [False, True], ids=["half", "full"])


def pair(*shape, batch=1, seed=0):
    return torch.rand(2, batch, 1, *shape, generator=torch.Generator().manual_seed(seed))


def batch_of(grid, fixed, moving, labels=None):
    return batch_on_grid(fixed, moving, torch.ones_like(fixed), labels, ("L1",), grid)

def cube(grid, half=3):
    away = (grid.voxels(torch.zeros(1)) - (torch.tensor(grid.shape) // 2)).abs().amax(-1)
    return (away <= half).int()[None]


@BOTH
def test_defect_3_a_constant_velocity_stays_itself_at_the_border(full):
    """4 voxels are 4 voxels everywhere, both ways; labels and images move by whole voxels with it."""
    grid = Grid((20, 22, 24), np.diag([1.5, 1.5, 1.5, 1.0]))
    place = velocity_grid(grid, full)
    velocity = torch.zeros(1, 3, *place.shape)
    velocity[:, 0] = 4 * 1.5
    fixed, moving = pair(*grid.shape)
    batch = batch_of(grid, fixed, moving, cube(grid))
    there = apply_velocity(velocity, place, batch)
    wanted = torch.tensor([6.0, 0, 0])[:, None, None, None].expand(3, *grid.shape)
    assert torch.allclose(there.disp[0], wanted, atol=1e-5)
    assert torch.allclose(there.disp_inv[0], -wanted, atol=1e-5)
    assert torch.allclose(there.moved[..., :-4, :, :], moving[..., 4:, :, :], atol=1e-5)
    assert torch.allclose(there.moved_back[..., 4:, :, :], fixed[..., :-4, :, :], atol=1e-5)
    assert torch.equal(moved_labels(there.disp, batch)[0][:, :-4], cube(grid)[:, 4:])


@BOTH
def test_a10_a_linear_velocity_becomes_the_exponential_of_its_matrix(full):
    """A10: disp is expm(A) - I and disp_inv expm(-A) - I, so each undoes the other; away from the border."""
    grid = Grid((32, 36, 30), np.diag([1.0, 1.0, 2.0, 1.0]))
    A = np.array([[0.05, 0.12, 0.0], [-0.12, -0.04, 0.06], [0.0, -0.05, 0.08]])
    place, like = velocity_grid(grid, full), torch.zeros(1)
    middle = torch.as_tensor(grid.centre_mm).float()
    velocity = ((place.points_mm(like).float() - middle) @ torch.tensor(A).float().T).movedim(-1, 0)[None]
    there = apply_velocity(velocity, place, batch_of(grid, *pair(*grid.shape)))
    inner = (slice(None), *[slice(n // 3, -n // 3) for n in grid.shape])
    for disp, matrix in ((there.disp, expm(A)), (there.disp_inv, expm(-A))):
        wanted = ((grid.points_mm(like).float() - middle) @ torch.tensor(matrix - np.eye(3)).float().T).movedim(-1, 0)
        assert wanted[inner].abs().max() > 0.5
        assert (disp[0] - wanted)[inner].abs().max() < 0.02


def test_moved_reads_the_moving_image_at_x_plus_disp():
    """A8: against scipy's interpolation, each image through its own direction."""
    grid = Grid((14, 16, 12), np.diag([1.0, 1.0, 1.0, 1.0]))
    place = velocity_grid(grid)
    velocity = 0.8 * torch.randn(1, 3, *place.shape, generator=torch.Generator().manual_seed(1))
    fixed, moving = pair(*grid.shape)
    batch = batch_of(grid, fixed, moving, cube(grid))
    there = apply_velocity(velocity, place, batch)
    voxels = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"))
    for image, disp, got in ((moving, there.disp, there.moved), (fixed, there.disp_inv, there.moved_back)):
        wanted = map_coordinates(image[0, 0].numpy(), voxels + disp[0].numpy(), order=1, mode="nearest")
        assert np.abs(got[0, 0].numpy() - wanted).max() < 1e-4


@pytest.mark.parametrize("similarity", [LNCC(), MIND(), MI()], ids=["lncc", "mind", "mi"])
def test_two_samples_are_twice_one_and_only_images_have_a_gradient(similarity):
    """Fields, labels and every term of the loss; the second sample has no bone."""
    grid = Grid((14, 16, 12), np.diag([1.0, 1.0, 2.0, 1.0]))
    place = velocity_grid(grid)
    velocity = torch.randn(2, 3, *place.shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    fixed, moving = pair(*grid.shape, batch=2)
    labels = cube(grid).repeat(2, 1, 1, 1) * torch.tensor([1, 0])[:, None, None, None].int()

    def everything(part):
        batch = batch_of(grid, fixed[part], moving[part], labels[part])
        what = apply_velocity(velocity[part], place, batch)
        won, fraction = moved_labels(what.disp, batch)
        assert won.grad_fn is None
        assert fraction.grad_fn is None
        terms = loss_terms(what, batch, similarity, bone_voxels(won, 1, minimum=0))
        fields = {name: value for name, value in what._asdict().items() if name != "velocity_grid"}
        return fields | {"labels": won, "fraction": fraction}, terms

    both, alone = everything(slice(0, 2)), [everything(slice(n, n + 1)) for n in (0, 1)]
    for k in (0, 1):
        for name, value in both[k].items():
            assert torch.allclose(value, torch.cat([one[k][name] for one in alone]), atol=1e-4), name
    terms = both[1]
    assert [terms[name][1].item() for name in ("oc", "pc", "rd", "rf")] == [0, 0, 0, 0]
    (gradient,) = torch.autograd.grad(Weights(diffusion=1.0, oc=1.0, pc=1.0, rd=1.0, rf=1.0).total(terms), velocity)
    assert gradient.isfinite().all()
    assert (gradient != 0).flatten(1).any(1).all()


@pytest.mark.parametrize("similarity", [LNCC(), MI(), MIND()], ids=["lncc", "mi", "mind"])
def test_both_sides_count_for_one_velocity_after_another(similarity):
    "What is kept of the images that stay changes neither value nor slope."
    grid = Grid((14, 16, 18), np.diag([1.0, 1.5, 2.0, 1.0]))
    place, generator = velocity_grid(grid, False), torch.Generator().manual_seed(1)
    batch = batch_of(grid, *pair(*grid.shape))
    alike = likeness(batch, similarity)
    for _ in range(2):
        velocity = torch.randn(1, 3, *place.shape, generator=generator).requires_grad_()
        there = apply_velocity(velocity, place, batch)
        by_hand = similarity(batch.fixed, there.moved, batch.mask) + similarity(batch.moving, there.moved_back, batch.mask)
        slopes = [torch.autograd.grad(loss, velocity, retain_graph=True)[0] for loss in (alike(there), by_hand)]
        assert torch.allclose(alike(there), by_hand)
        assert torch.allclose(*slopes, atol=1e-6 * slopes[1].abs().max())
        assert torch.equal(loss_terms(there, batch, similarity)["similarity"], alike(there))


def test_the_total_is_the_weighted_sum_and_a_zero_weight_costs_nothing():
    terms = {name: torch.tensor([float(n), 2.0 * n]) for n, name in enumerate(TERMS, start=1)}
    weights = Weights(1.0, 0.5, 3.0, 0.0, 2.0, 0.1)
    assert weights.total(terms).item() == pytest.approx(1.5 * (1 + 0.5 * 2 + 3 * 3 + 2 * 5 + 0.1 * 6))
    terms["pc"] = torch.tensor([float("nan"), 1.0])
    assert weights.total(terms).isfinite()
    assert weights.softened(0.1).row() == weights.row() | {"weight_oc": pytest.approx(0.3), "weight_pc": 0.0}
    with pytest.raises(AttributeError):
        weights.properness = 3.0
