"Similarities against their definitions; finite for every awkward image; one sample never changes another."

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from spinereg.losses.similarity import LNCC, MI, MIND, box_mean, compare_with, masked_mean, mind_ssc
from spinereg.space.images import erode_mask

LOSSES = [MIND(), LNCC(radius=3), MI()]


def texture(seed, shape=(12, 14, 13), batch=1, dtype=torch.float32):
    return torch.rand(batch, 1, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def awkward(kind):
    image = texture(3)
    if kind == "constant":
        image.fill_(0.3)
    elif kind == "half constant":
        image[..., :6] = 0.3
    elif kind == "zero":
        image.zero_()
    elif kind == "one bright voxel":
        image.zero_()[..., 6, 6, 6] = 1
    elif kind == "times 1e6":
        image *= 1e6
    elif kind == "times 1e-6":
        image *= 1e-6
    elif kind == "minus 1000":
        image -= 1000
    elif kind == "constant -1000":
        image.fill_(-1000)
    elif kind == "constant to rounding":
        image = 1000 + 1e-4 * image
    return image


KINDS = ("constant", "half constant", "zero", "one bright voxel", "times 1e6", "times 1e-6", "minus 1000", "constant -1000", "constant to rounding")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_C1_loss_and_gradient_are_finite(loss, kind):
    mask = torch.ones(1, 1, 12, 14, 13)
    mask[..., :3] = 0
    for first, second in ((texture(1), awkward(kind)), (awkward(kind), texture(1)), (awkward(kind), awkward(kind))):
        pair = [first.requires_grad_(), second.requires_grad_()]
        for where in (None, mask):
            value = loss(*pair, where)
            grads = torch.autograd.grad(value.sum(), pair)
            assert value.isfinite().all()
            assert all(g.isfinite().all() for g in grads)


def published_mind(image, radius=2, dilation=2):
    "Defect 1: the mean's clamp is relative to the mean over the batch, and 0/0 when that is zero."
    padded = F.pad(image, [dilation] * 6, mode="replicate")
    steps = [s * dilation * np.eye(3, dtype=int)[a] for a in range(3) for s in (1, -1)]
    pairs = [(p, q) for p, q in itertools.combinations(steps, 2) if ((p - q) ** 2).sum() == 2 * dilation**2]
    cut = slice(dilation, -dilation)
    shifted = [[padded.roll(tuple(-p), (2, 3, 4))[:, :, cut, cut, cut] for p in pair] for pair in pairs]
    distance = torch.cat([F.avg_pool3d(F.pad((a - b) ** 2, [radius] * 6, mode="replicate"), 2 * radius + 1, 1) for a, b in shifted], 1)
    excess = distance - distance.amin(1, keepdim=True)
    mean = excess.mean(1, keepdim=True)
    return torch.exp(-excess / mean.clamp(0.001 * mean.mean().item(), 1000 * mean.mean().item()))


def finite_when_constant(descriptor):
    return descriptor(torch.full((1, 1, 12, 12, 12), 0.3)).isfinite().all()


def independent_of_neighbour(descriptor):
    weak, strong = 1e-3 * texture(1), texture(2)
    return torch.allclose(descriptor(torch.cat([weak, strong]))[:1], descriptor(weak), atol=1e-6)


@pytest.mark.parametrize("check", [finite_when_constant, independent_of_neighbour])
def test_C1_defect_1_is_rejected(check):
    assert check(mind_ssc)
    assert not check(published_mind)


def test_mind_is_the_published_descriptor_where_that_is_sound():
    image = texture(5, (20, 20, 20), dtype=torch.float64)
    inner = (slice(None), slice(None), *[slice(6, -6)] * 3)
    ours, published = (d[inner].sort(1).values for d in (mind_ssc(image), published_mind(image)))
    assert torch.allclose(ours, published, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(scale=st.floats(1e-3, 1e5), sign=st.sampled_from([1, -1]), offset=st.floats(-1e3, 1e3))
def test_mind_and_lncc_ignore_a_linear_change_of_grey_values(scale, sign, offset):
    a, b = texture(1, dtype=torch.float64), texture(2, dtype=torch.float64) + texture(1, dtype=torch.float64)
    changed = sign * scale * b + offset * scale
    for loss in (MIND(), LNCC(radius=3)):
        assert torch.allclose(loss(a, changed), loss(a, b), atol=1e-5)


def test_mutual_information_ignores_which_grey_value_means_what():
    levels = torch.randint(0, 4, (1, 1, 14, 14, 14), generator=torch.Generator().manual_seed(0)).double()
    shuffled = torch.tensor([2.0, 0, 3, 1], dtype=torch.float64)[levels.long()]
    share = torch.bincount(levels.long().flatten()) / levels.numel()
    entropy = -(share * share.log()).sum()
    assert abs(MI(bins=62)(levels, shuffled).item() + entropy) < 0.02
    other = texture(1, (14, 14, 14), dtype=torch.float64)
    assert torch.allclose(MI()(levels, other), MI()(other, levels))


def test_mutual_information_against_a_dense_histogram():
    a, b, mask = texture(1, dtype=torch.float64), texture(1, dtype=torch.float64) ** 2 + 0.2 * texture(2, dtype=torch.float64), texture(4) > 0.4

    def weights(image, bins=16):
        place = (image - image.min()) / (image.max() - image.min()) * (bins - 3) + 1
        d = np.abs(place.numpy()[mask][:, None] - np.arange(bins))
        return np.where(d < 0.5, 0.75 - d**2, np.where(d < 1.5, (1.5 - d) ** 2 / 2, 0))

    joint = weights(a).T @ weights(b)
    joint /= joint.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        truth = np.nansum(joint * np.log(joint / (joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True))))
    assert np.isclose(-MI(bins=16)(a, b, mask).item(), truth, atol=1e-6)


def test_lncc_against_the_correlation_of_every_window():
    a, b = texture(1, (9, 10, 11), dtype=torch.float64), texture(2, (9, 10, 11), dtype=torch.float64)
    inner = torch.zeros(1, 1, 9, 10, 11)
    inner[..., 2:-2, 2:-2, 2:-2] = 1
    windows = [np.lib.stride_tricks.sliding_window_view(x[0, 0].numpy(), (5, 5, 5)).reshape(-1, 125) for x in (a, b)]
    truth = np.mean([np.corrcoef(u, v)[0, 1] ** 2 for u, v in zip(*windows)])
    assert np.isclose(1 - LNCC(radius=2)(a, b, inner).item(), truth, rtol=1e-2)


@pytest.mark.parametrize("loss", LOSSES)
def test_batch_of_two_is_two_batches_of_one(loss):
    first, second = torch.cat([texture(1), 1e3 * texture(2)]), torch.cat([texture(3), texture(4) - 1000])
    mask = torch.cat([texture(5), texture(6)]) > 0.3
    second.requires_grad_()
    together = loss(first, second, mask)
    grad = torch.autograd.grad(together.sum(), second)[0]
    for n in (0, 1):
        part = second[n : n + 1].detach().requires_grad_()
        alone = loss(first[n : n + 1], part, mask[n : n + 1])
        assert torch.allclose(together[n : n + 1], alone, rtol=1e-4)
        (own,) = torch.autograd.grad(alone.sum(), part)
        assert torch.allclose(grad[n : n + 1], own, rtol=1e-3, atol=1e-4 * own.abs().max().item())


@pytest.mark.parametrize("loss", [MIND(radius=1, dilation=1), LNCC(radius=1)])
def test_gradient_against_finite_differences(loss):
    shape = (4, 3, 4)
    mask = torch.ones(2, 1, *shape)
    mask[..., 0, :], mask[1, ..., 1] = 0, 0
    pair = [texture(n, shape, batch=2, dtype=torch.float64).requires_grad_() for n in (1, 2)]
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, mask), pair)


def test_gradient_of_mutual_information_against_finite_differences():
    "The ends of the grey-value range are constants: they lie outside the mask and are not varied."
    ends = torch.linspace(-0.5, 1.5, 16, dtype=torch.float64).reshape(1, 1, 4, 4, 1)
    mask = torch.cat([torch.ones(1, 1, 4, 4, 3), torch.zeros(1, 1, 4, 4, 1)], -1)
    pair = [texture(n, (4, 4, 3), dtype=torch.float64).requires_grad_() for n in (1, 2)]
    assert torch.autograd.gradcheck(lambda *pair: MI(bins=8)(*(torch.cat([x, ends], -1) for x in pair), mask), pair)


@pytest.mark.parametrize("loss", LOSSES)
def test_C2_full_precision_inside_autocast(loss):
    first, second = texture(1), texture(1) + 0.5 * texture(2)
    exact = loss(first, second)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            value = loss(first.to(dtype), second.to(dtype))
            assert value.dtype == torch.float32
            assert torch.allclose(value, exact, rtol=1e-2 if dtype != torch.bfloat16 else 5e-2)


@pytest.mark.parametrize("loss", [MIND(), LNCC(radius=3)])
def test_an_eroded_mask_sees_nothing_outside_the_overlap(loss):
    overlap = torch.zeros(1, 1, 20, 18, 22)
    overlap[..., 3:, 2:17, 1:20] = 1
    first, second = texture(1, (20, 18, 22), dtype=torch.float64), texture(2, (20, 18, 22), dtype=torch.float64)
    other = torch.where(overlap > 0, second, texture(7, (20, 18, 22), dtype=torch.float64))
    eroded = erode_mask(overlap, loss.reach)
    assert eroded.sum() > 0
    assert torch.allclose(loss(first, second, eroded), loss(first, other, eroded), atol=2e-4)
    assert not torch.allclose(loss(first, second, overlap), loss(first, other, overlap), atol=2e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_empty_mask_gives_no_gradient(loss):
    image = texture(2).requires_grad_()
    value = loss(texture(1), image, torch.zeros(1, 1, 12, 14, 13))
    (grad,) = torch.autograd.grad(value.sum(), image)
    assert value.isfinite().all()
    assert grad.abs().max() == 0


def test_masked_mean_divides_by_its_own_count():
    values, mask = texture(1, batch=2), texture(2, batch=2) > 0.7
    for n in (0, 1):
        assert torch.allclose(masked_mean(values, mask)[n], values[n][mask[n]].mean())


def test_erosion_and_box_against_scipy():
    mask = texture(1, (15, 16, 17)) > 0.01
    truth = ndimage.binary_erosion(mask[0, 0].numpy(), np.ones((5, 5, 5)), border_value=1)
    assert np.array_equal(erode_mask(mask, 2)[0, 0].numpy() > 0, truth)
    image = texture(2, (15, 16, 17), dtype=torch.float64)
    truth = ndimage.uniform_filter(image[0, 0].numpy(), 5)[2:-2, 2:-2, 2:-2]
    assert np.allclose(box_mean(image, 2)[0, 0].numpy(), truth)


def test_mind_in_slabs_is_mind_in_one_piece():
    first, second = texture(1, (50, 90, 80)), texture(2, (50, 90, 80))
    mask = (texture(3, (50, 90, 80)) > 0.5).requires_grad_(False)
    whole = masked_mean((mind_ssc(first) - mind_ssc(second)).square().mean(1, keepdim=True), mask)
    assert torch.allclose(MIND()(first, second, mask), whole, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_C11_two_runs_agree_bit_for_bit(loss):
    images = texture(1), texture(2).requires_grad_()
    runs = [(value := loss(fixed=images[0], moved=images[1]), *torch.autograd.grad(value.sum(), images[1])) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


class Correlation:
    "A similarity that knows nothing of `against`."

    reach = 0

    def __call__(self, one, other, mask=None):
        return -masked_mean(one * other, mask)


@pytest.mark.parametrize("loss", [*LOSSES, Correlation()])
def test_one_image_given_once_is_the_same_comparison(loss):
    "Value and gradient, for one moved image after another; in half precision too, and under autocast."
    fixed, mask = texture(1, batch=2), texture(2) > 0.3
    kept = compare_with(loss, fixed, mask)
    for seed in (3, 4, 3):
        moved = texture(seed, batch=2).requires_grad_()
        values = [kept(moved), loss(fixed, moved, mask)]
        grads = [torch.autograd.grad(value.sum(), moved)[0] for value in values]
        assert torch.allclose(*values, rtol=1e-5)
        assert torch.allclose(*grads, atol=1e-6 * grads[1].abs().max())
    if not isinstance(loss, Correlation):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = compare_with(loss, fixed.half(), mask)(moved.detach().half())
        assert low.dtype == torch.float32
        assert torch.equal(low, loss(fixed.half().float(), moved.detach().half().float(), mask))
