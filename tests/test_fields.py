"Fields against analytic flows, SimpleITK and float64; and the known mistakes, which must fail the same checks."

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation

from spinereg.files.transforms import itk_field, itk_image
from spinereg.space.fields import compose, extend_field, integrate, invert, jacobian, length_mm, resample_field, warp, warp_labels
from spinereg.space.geometry import Grid, crop_grid, inside, respace_grid
from spinereg.space.images import blur, coarsen, label_centres_mm, vote


def tilted(shape, spacing, seed):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_rotvec(np.random.default_rng(seed).normal(size=3) * 0.3).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) / 2)
    return Grid(shape, affine)


def smooth_velocity(grid, amplitude_mm, seed=0, dtype=torch.float64):
    "Waves that fade to zero at the border."
    t = (grid.voxels(torch.zeros(1, dtype=dtype)) / torch.tensor(grid.shape)).movedim(-1, 0)
    window = (torch.sin(np.pi * t.clamp(0, 1)) ** 2).prod(0)
    phase = torch.tensor(np.random.default_rng(seed).uniform(0, 6, (3, 3)), dtype=dtype)
    waves = torch.stack([sum(torch.sin(5 * t[a] + phase[c, a]) for a in range(3)) for c in range(3)])
    return amplitude_mm * (window * waves / waves.abs().max())[None]


def test_B_equals_2_is_twice_B_equals_1():
    grid = tilted((9, 10, 11), (1, 2, 3), 0)
    both = torch.cat([smooth_velocity(grid, 3, s, torch.float32) for s in (0, 1)])
    images = torch.rand(2, 2, *grid.shape)
    labels = (images[:, 0] > 0.5).int()
    for run in (lambda v, x: integrate(v, grid), lambda v, x: warp(x, grid, grid, v), lambda v, x: jacobian(v, grid), lambda v, x: invert(v, grid)):
        assert torch.allclose(run(both, images), torch.cat([run(both[:1], images[:1]), run(both[1:], images[1:])]), atol=1e-6)
    assert torch.equal(warp_labels(labels, grid, grid, both)[0][1:], warp_labels(labels[1:], grid, grid, both[1:])[0])


@pytest.mark.parametrize("velocity_mm", [4.0, 12.0])
def test_defect_3_a_constant_velocity_shifts_everything_by_itself(velocity_mm):
    """Zero padding in scaling and squaring loses most of a constant velocity at one border."""

    def defect(velocity, grid, steps=7):
        disp = velocity / 2**steps
        for _ in range(steps):
            disp = disp + warp(disp, grid, grid, disp, outside="zeros")
        return disp

    grid = tilted((16, 18, 20), (1, 1, 1), 1)
    velocity = torch.tensor([velocity_mm, 0, 0])[None, :, None, None, None].expand(1, 3, *grid.shape)
    assert (integrate(velocity, grid) - velocity).abs().max() < 1e-4
    assert (defect(velocity, grid) - velocity).abs().max() > 0.4 * velocity_mm


@pytest.mark.parametrize("n", [8, 16, 33])
def test_defect_4_and_A13_a_stretch_survives_half_resolution(n):
    """A13: up from half resolution, a linear field is exact to the border, also for odd sizes; times two with aligned corners is not."""
    grid = Grid((n, n + 2, n + 4), np.eye(4))
    half = respace_grid(grid, 2.0)
    fine, coarse = (0.1 * g.points_mm(torch.zeros(1, dtype=torch.float64)).movedim(-1, 0)[None] for g in (grid, half))
    defect = 2 * F.interpolate(coarse / 2, size=grid.shape, mode="trilinear", align_corners=True)
    assert (resample_field(coarse, half, grid) - fine).abs().max() < 1e-9
    assert n % 2 or (defect - fine).abs().max() > 0.02


@pytest.mark.parametrize(("shape", "spacing_mm"), [((5, 4, 6), 1.0), ((5, 4, 6), 0.7), ((6, 5, 11), 3.1), ((1, 2, 5), 0.5)])
def test_fields_on_another_grid_are_scipys_interpolation(shape, spacing_mm):
    "Finer, coarser, and with an axis of one voxel; within the outermost centres, from voxels of 2 x 1.5 x 4 mm on oblique axes."
    from scipy.ndimage import map_coordinates

    grid = tilted(shape, (2, 1.5, 4), 3)
    onto = respace_grid(grid, spacing_mm)
    field = torch.randn(2, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = (onto.points_mm(field).numpy() - grid.affine[:3, 3]) @ np.linalg.inv(grid.affine[:3, :3]).T
    inner = ((at >= 0) & (at <= np.array(shape) - 1) | (np.array(shape) == 1)).all(-1)
    found = resample_field(field, grid, onto)
    assert found.shape == (2, 3, *onto.shape)
    assert inner.any()
    for got, given in zip(found.flatten(0, 1), field.flatten(0, 1)):
        wanted = map_coordinates(given.numpy(), at.reshape(-1, 3).T, order=1, mode="nearest").reshape(onto.shape)
        assert np.allclose(got.numpy()[inner], wanted[inner])
    assert torch.autograd.gradcheck(lambda x: resample_field(x, grid, onto), field[:1, :1].clone().requires_grad_())


def test_length_is_that_of_the_world():
    from spinereg.space.fields import world_vectors

    grid = tilted((4, 5, 6), (1, 2, 3), 1)
    disp = torch.randn(2, 3, *grid.shape, dtype=torch.float64)
    assert torch.allclose(length_mm(disp), torch.linalg.vector_norm(world_vectors(disp, grid), dim=-1))


def test_integration_agrees_with_many_small_euler_steps():
    grid = tilted((30, 32, 34), (1.5, 1.5, 1.5), 2)
    velocity = smooth_velocity(grid, 6)
    disp = torch.zeros_like(velocity)
    for _ in range(2000):
        disp = disp + warp(velocity, grid, grid, disp) / 2000
    assert (integrate(velocity, grid) - disp).norm(dim=1).max() < 0.1


def test_A10_the_inverse_of_a_10_mm_field_comes_back():
    """A10: mean 0.1 mm and 99th percentile 0.5 mm, by the negated velocity and by the fixed point."""
    grid = tilted((40, 44, 48), (2, 2, 2), 3)
    velocity = smooth_velocity(grid, 14)
    disp = integrate(velocity, grid)
    assert disp.norm(dim=1).max() > 10
    for disp_inv in (integrate(-velocity, grid), invert(disp, grid)):
        for error in (compose(disp_inv, disp, grid), compose(disp, disp_inv, grid)):
            length = error.norm(dim=1).flatten()
            assert length.mean() < 0.1
            assert length.quantile(0.99) < 0.5


@pytest.mark.parametrize("seed", range(4))
def test_A7_warping_is_ITK_resampling(seed):
    """A7: oblique anisotropic grids on both sides."""
    fixed, moving = tilted((24, 26, 12), (1, 1.2, 4), seed), tilted((40, 42, 60), (1.4, 1.3, 1.1), seed + 9)
    disp = smooth_velocity(fixed, 4, seed)
    image = blur(torch.rand(1, 1, *moving.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), (1.0, 1.0, 1.0))
    ours = warp(image, moving, fixed, disp)[0, 0].numpy()
    by_itk = sitk.Resample(itk_image(image[0, 0].numpy(), moving), itk_image(ours, fixed), itk_field(disp, fixed), sitk.sitkLinear, -1.0)
    by_itk = sitk.GetArrayFromImage(by_itk).transpose(2, 1, 0)
    inside = by_itk > -0.5
    assert inside.mean() > 0.2
    assert np.abs(ours - by_itk)[inside].max() < 1e-5 * np.ptp(image.numpy())


def test_C9_jacobian_is_in_mm():
    """C9: identity 1, halving 0.125, a mirror -1, whatever the voxel size."""
    grid = tilted((7, 8, 9), (0.7, 1, 4), 4)
    local = (grid.voxels(torch.zeros(1, dtype=torch.float64)) * torch.tensor(grid.spacing_mm)).movedim(-1, 0)[None]
    flip = torch.cat([-2 * local[:, :1], 0 * local[:, 1:]], 1)
    for disp, expected in ((0 * local, 1.0), (-local / 2, 0.125), (flip, -1.0)):
        assert torch.allclose(torch.linalg.det(jacobian(disp, grid)), torch.tensor(expected, dtype=torch.float64))


def test_gradients_through_warp_and_integration():
    grid = Grid((4, 5, 3), np.diag([1.0, 1.2, 2, 1]))
    image = torch.rand(1, 1, *grid.shape, dtype=torch.float64, requires_grad=True)
    velocity = (0.3 * torch.rand(1, 3, *grid.shape, dtype=torch.float64) + 0.05).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: warp(x, grid, grid, integrate(v, grid, 3)), (image, velocity))
    assert torch.autograd.gradcheck(lambda x: blur(x, (1.0, 0.0, 0.6)), image)


def test_blur_is_the_gaussian_of_scipy_with_the_border_repeated():
    from scipy.ndimage import gaussian_filter

    image = torch.rand(2, 2, 17, 12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = gaussian_filter(image.numpy(), (0, 0, 2, 1, 0), mode="nearest", truncate=3.0)
    assert np.abs(blur(image, (2.0, 1.0, 0.0)).numpy() - expected).max() < 1e-12


def test_B6_warped_labels_are_the_one_hot_vote():
    """B6: values are a subset, and the winner is the largest linearly interpolated one-hot channel."""
    grid, other = tilted((14, 15, 16), (1, 1, 1), 5), tilted((20, 20, 20), (0.8, 0.8, 0.8), 6)
    labels = torch.randint(0, 5, (1, 14, 15, 16), generator=torch.Generator().manual_seed(0)) * 3
    disp = smooth_velocity(other, 2, 1, torch.float32)
    won, share = warp_labels(labels, grid, other, disp)
    channels = warp(torch.stack([labels == v for v in (0, 3, 6, 9, 12)], 1).float(), grid, other, disp, outside="zeros")
    best = channels.max(1)
    second = channels.topk(2, 1).values[:, 1]
    clear = (best.values - second > 1e-3) & (channels.sum(1) > 0.999)
    assert torch.equal(won[clear], torch.tensor([0, 3, 6, 9, 12])[best.indices[clear]])
    assert set(won.unique().tolist()) <= {0, 3, 6, 9, 12}
    assert (share >= 0).all()


def test_coarsening_keeps_means_and_places():
    grid = tilted((32, 30, 28), (1, 1, 1), 7)
    bump = torch.exp(-((grid.voxels(torch.zeros(1)) - torch.tensor([15.0, 14, 13])) ** 2).sum(-1) / 30)[None, None]
    image, coarse = coarsen(bump, grid, 2.0)
    middle = [(g.points_mm(i[0, 0]) * i[0, 0][..., None]).sum((0, 1, 2)) / i.sum() for i, g in ((bump, grid), (image, coarse))]
    assert torch.allclose(*middle, atol=0.02)
    assert abs(image.sum() * 8 / bump.sum() - 1) < 0.01


def test_crop_of_a_field_is_the_field_there():
    grid = tilted((12, 12, 12), (1, 1, 1), 8)
    disp = smooth_velocity(grid, 3)
    part = crop_grid(grid, [3, 2, 4], [9, 10, 11])
    assert torch.allclose(warp(disp, grid, part), disp[:, :, 3:9, 2:10, 4:11], atol=1e-9)


@pytest.mark.parametrize("size_mm", [1.0, 60.0], ids=["small", "large"])
def test_a_field_faded_over_twice_its_size_keeps_its_values_ends_at_zero_and_folds_nothing(size_mm):
    grid = Grid((9, 11, 7), np.diag([2.0, 3.0, 2.0, 1.0]))
    disp = size_mm * torch.tensor([0.6, -0.64, 0.48])[None, :, None, None, None].expand(1, 3, *grid.shape)
    extended, wide = extend_field(disp, grid, 0.0, max(20.0, 2 * size_mm))
    start = np.round(np.linalg.inv(wide.affine) @ grid.affine)[:3, 3].astype(int)
    inner = tuple(slice(s, s + n) for s, n in zip(start, grid.shape))
    assert torch.equal(extended[(slice(None), slice(None), *inner)], disp)
    outside = extended.clone()
    outside[(slice(None), slice(None), *(slice(1, -1),) * 3)] = 0
    assert not outside.any()
    assert torch.linalg.det(jacobian(extended, wide)).min() > 0


@pytest.mark.parametrize(("hold_mm", "fade_mm"), [(0.0, 4.0), (5.0, 20.0), (7.5, 3.0)])
def test_a_field_is_held_before_it_fades(hold_mm, fade_mm):
    """On thick slices too: within the distance to hold the border's value goes on, and the grid ends not much beyond the fade."""
    grid = Grid((6, 5, 4), np.array([[1.0, 0, 0, 3], [0, 0, 4.0, -2], [0, -1.5, 0, 5], [0, 0, 0, 1]]))
    field = torch.rand(2, 1, *grid.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    extended, wide = extend_field(field, grid, hold_mm, fade_mm)
    index = torch.linalg.solve(torch.tensor(grid.affine[:3, :3]), (wide.points_mm(field) - torch.tensor(grid.affine[:3, 3]))[..., None])[..., 0]
    nearest = torch.minimum(index.clamp_min(0), torch.tensor(grid.shape) - 1.0)
    beyond_mm = (index - nearest).abs() * torch.tensor(grid.spacing_mm)
    border = warp(field, grid, wide)
    held = (beyond_mm <= hold_mm + 1e-6).all(-1)
    assert torch.allclose(extended[:, 0, held], border[:, 0, held])
    assert (extended <= border + 1e-9).all()
    assert (extended >= 0).all()
    assert (beyond_mm.amax((0, 1, 2)) <= hold_mm + fade_mm + 2 * torch.tensor(grid.spacing_mm)).all()


@pytest.mark.parametrize("outside", ["border", "zeros", "lowest"])
def test_what_lies_outside_the_image(outside):
    """Beyond the outer edges of its voxels: the nearest value, zero, or the smallest value of each channel; each sample by itself."""
    grid, wide = Grid((4, 5, 6), np.eye(4)), crop_grid(Grid((4, 5, 6), np.eye(4)), [-2] * 3, [6, 7, 8])
    image = torch.rand(2, 3, *grid.shape, generator=torch.Generator().manual_seed(0)) + 1
    read = warp(image, grid, wide, outside=outside)
    far = ~inside(wide.points_mm(image), grid.shape)
    expected = {"border": warp(image, grid, wide), "zeros": torch.zeros_like(read), "lowest": image.amin((2, 3, 4), keepdim=True).expand_as(read)}
    assert torch.allclose(read[:, :, far], expected[outside][:, :, far], atol=1e-5)
    assert torch.allclose(read[:, :, 2:6, 2:7, 2:8], image, atol=1e-6)
    assert torch.allclose(read[1:], warp(image[1:], grid, wide, outside=outside))


def test_a_vote_is_for_the_nearest_voxels_label_or_for_none_outside():
    labels = torch.zeros(4, 4, 4, dtype=torch.int16)
    labels[2:] = 7
    won, fraction = vote(labels, torch.tensor([[2.0, 1, 1], [1.4, 1, 1], [3.4, 1, 1], [3.6, 1, 1]]))
    assert won.tolist() == [7, 0, 7, 0]
    assert torch.allclose(fraction[won > 0], torch.ones(2))


@pytest.mark.parametrize("seed", range(3))
def test_label_centres_are_the_means_of_their_voxels(seed):
    rng = np.random.default_rng(seed)
    labels = torch.tensor(rng.integers(0, 4, (5, 6, 7)))
    grid = tilted(labels.shape, (1.0, 2.0, 3.0), seed)
    points = grid.points_mm(torch.zeros(1, dtype=torch.float64))
    assert np.allclose(label_centres_mm(labels, grid, 3), np.stack([points[labels == n].mean(0) for n in (1, 2, 3)]))
    assert np.isnan(label_centres_mm(labels, grid, 5)[3:]).all()
