"Metrics against analytic truth, brute force and SimpleITK; millimetres; nothing that flatters."

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.spatial.distance import cdist

from spinereg.measure.metrics import diffeomorphism, label_agreement, landmark_errors, regularity, round_trip
from spinereg.space.fields import determinant, integrate, jacobian
from spinereg.space.geometry import Grid

GRID = Grid((16, 14, 12), np.array([[0, -1.2, 0, 5], [1, 0, 0, -7], [0, 0, 4, 9], [0, 0, 0, 1]], float))


def linear_field(matrix, grid=GRID):
    x = grid.voxels(torch.zeros(1, dtype=torch.float64)) * torch.as_tensor(grid.spacing_mm)
    return (x @ (torch.as_tensor(matrix).double() - torch.eye(3)).T).movedim(-1, 0)[None]


def det_of(disp, grid=GRID):
    return determinant(jacobian(disp, grid))


HALVED, MIRRORED = np.eye(3) / 2, np.diag([-1.0, 1, 1])


def ours(disp, grid):
    return regularity(det_of(disp, grid))


def published(disp, grid):
    "Defect 6: voxels instead of mm, folds counted on a cropped volume but divided by all voxels, 3 added before the logarithm."
    det = determinant(jacobian(disp, Grid(grid.shape, np.eye(4))))[:, 2:-2, 2:-2, 2:-2]

    class Found:
        n_folded = int((det <= 0).sum())
        folding_percent = 100 * n_folded / disp[0, 0].numel()
        sdlogj = float(torch.log((det + 3).clamp(1e-9, 1e9)).std())
        det_min = float(det.min())

    return Found


def halving_leaves_an_eighth(measure):
    return measure(linear_field(HALVED), GRID).det_min == pytest.approx(0.125)


def mirror_is_folded_everywhere(measure):
    return measure(linear_field(MIRRORED), GRID).folding_percent == pytest.approx(100)


def spread_of_log_jacobian(measure):
    "x -> x + 0.2 sin(x/4)/... along i only, so that log det J is known."
    x = GRID.voxels(torch.zeros(1, dtype=torch.float64)) * torch.as_tensor(GRID.spacing_mm)
    disp = torch.stack([0.02 * x[..., 0] ** 2, 0 * x[..., 0], 0 * x[..., 0]])[None]
    i = x[1:-1, 0, 0, 0].numpy()
    inner = np.log(1 + 0.04 * i)
    ends = np.log(1 + 0.02 * np.array([x[1, 0, 0, 0], x[-1, 0, 0, 0] + x[-2, 0, 0, 0]]))
    return measure(disp, GRID).sdlogj == pytest.approx(np.std(np.concatenate([inner, ends])), rel=1e-6)


@pytest.mark.parametrize("check", [halving_leaves_an_eighth, mirror_is_folded_everywhere, spread_of_log_jacobian])
def test_C9_defect_6_is_rejected(check):
    assert check(ours)
    assert not check(published)


def test_C9_identity():
    found = ours(linear_field(np.eye(3)), GRID)
    assert (found.n_voxels, found.n_folded, found.folding_percent) == (16 * 14 * 12, 0, 0)
    assert (found.det_min, found.det_p1, found.sdlogj, found.sdlogj_l2r) == pytest.approx((1, 1, 0, 0))


def test_C9_one_mask_above_and_below_the_fraction_line():
    det = torch.ones(1, 10, 10, 10)
    det[:, :2] = -1
    mask = torch.zeros(1, 10, 10, 10, dtype=torch.bool)
    mask[:, 1:5] = True
    found = regularity(det, mask)
    assert (found.n_voxels, found.n_folded, found.folding_percent) == (400, 100, 25)
    assert found.sdlogj == pytest.approx(np.std([np.log(1e-9)] + [0] * 3))
    assert found.sdlogj_l2r == pytest.approx(np.std([np.log(2)] + [np.log(4)] * 3))
    with pytest.raises(ValueError, match="mask is empty"):
        regularity(det, torch.zeros_like(mask))


def brute_force_ndv(disp, grid):
    "Ten determinants of every inner voxel, one by one."
    s = grid.spacing_mm
    phi = np.moveaxis(disp[0].double().numpy(), 0, -1) + np.indices(grid.shape).transpose(1, 2, 3, 0) * s
    e = np.eye(3, dtype=int)
    total, failing = 0.0, 0
    for voxel in itertools.product(*[range(1, n - 1) for n in grid.shape]):

        def step(d, voxel=voxel):
            return phi[tuple(np.array(voxel) + d)] - phi[voxel]

        found = [
            a * b * c * np.linalg.det(np.stack([step(a * e[0]), step(b * e[1]), step(c * e[2])], 1))
            for a, b, c in itertools.product((-1, 1), repeat=3)
        ]
        found.append(np.linalg.det(np.stack([step(-e[0] - e[1]), step(-e[0] - e[2]), step(-e[1] - e[2])], 1)))
        found.append(np.linalg.det(np.stack([step(e[0] + e[1]), step(e[1] + e[2]), step(e[0] + e[2])], 1)))
        found = np.array(found) / s.prod()
        total += np.maximum(-found, 0).sum()
        failing += (found <= 0).any()
    n = np.prod(np.array(grid.shape) - 2)
    return failing, 100 * total / (12 * n)


def test_C9_ndv_against_brute_force():
    grid = Grid((6, 7, 5), np.diag([1, 1.2, 4, 1.0]))
    disp = 0.8 * torch.randn(1, 3, 6, 7, 5, generator=torch.Generator().manual_seed(0))
    found = diffeomorphism(disp, grid)
    failing, percent = brute_force_ndv(disp, grid)
    assert found.n_voxels == 4 * 5 * 3
    assert found.n_failing == failing
    assert 0 < failing < found.n_voxels
    assert found.ndv_percent == pytest.approx(percent, rel=1e-4)


@pytest.mark.parametrize(("matrix", "percent"), [(np.eye(3), 0), (HALVED, 0), (MIRRORED, 100), (np.diag([1, -0.5, 1]), 50)])
def test_C9_ndv_of_linear_maps(matrix, percent):
    found = diffeomorphism(linear_field(matrix), GRID)
    assert found.ndv_percent == pytest.approx(percent)
    assert found.n_failing == (found.n_voxels if percent else 0)


def test_C9_a_checkerboard_fold_is_seen():
    "Central differences see det J = 1 everywhere."
    checker = torch.zeros(1, 3, *GRID.shape, dtype=torch.float64)
    checker[0, 2] = torch.as_tensor(4 * 0.6 * (-1.0) ** np.indices(GRID.shape).sum(0))
    assert torch.allclose(det_of(checker)[:, 1:-1, 1:-1, 1:-1], torch.ones(1, dtype=torch.float64))
    assert diffeomorphism(checker, GRID).n_failing == 14 * 12 * 10


def test_C9_ndv_over_a_mask():
    disp = linear_field(np.eye(3)).clone()
    disp[:, :, 8:] = linear_field(MIRRORED)[:, :, 8:]
    mask = torch.zeros(1, *GRID.shape, dtype=torch.bool)
    mask[:, :7] = True
    assert diffeomorphism(disp, GRID, mask) == (6 * 12 * 10, 0, 0.0)
    assert diffeomorphism(disp, GRID, ~mask).ndv_percent > 50


def test_A10_round_trip_of_shifts_and_of_a_flow():
    shift = torch.tensor([2.0, -3, 4])[None, :, None, None, None].expand(1, 3, *GRID.shape)
    back = -shift + torch.tensor([0.3, 0, 0.4])[None, :, None, None, None]
    assert np.allclose(round_trip(shift, back, GRID), 0.5, atol=1e-5)
    x = GRID.voxels(torch.zeros(1)) * torch.as_tensor(GRID.spacing_mm).float()
    velocity = torch.stack([torch.sin(x[..., 1] / 6), torch.cos(x[..., 2] / 15), torch.sin(x[..., 0] / 5)])[None]
    there, back = integrate(velocity, GRID), integrate(-velocity, GRID)
    for found in (round_trip(there, back, GRID), round_trip(back, there, GRID)):
        assert found.mean_mm < 0.02
        assert found.p99_mm <= found.max_mm < 0.2
    with pytest.raises(ValueError, match="stays inside"):
        round_trip(shift * 100, -shift * 100, GRID)


def test_round_trip_leaves_out_what_leaves_the_grid():
    "A shift by 6 mm along k loses 1.5 slices of 4 mm; the wrong way back is only wrong where nothing counts."
    there = torch.zeros(1, 3, *GRID.shape)
    there[:, 2] = 6
    back = -there.clone()
    back[..., 0] += 50
    assert round_trip(there, back, GRID).max_mm < 1e-5


def test_landmark_errors():
    moving = np.random.default_rng(0).normal(size=(40, 3)) * 50
    offsets = np.linspace(0.1, 4, 40)
    directions = np.random.default_rng(1).normal(size=(40, 3))
    mapped = moving + offsets[:, None] * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    rows = {row.group: row for row in landmark_errors(mapped, moving, ["L1"] * 10 + [""] * 20 + ["L2"] * 10)}
    assert list(rows) == ["all", "bone", "soft tissue", "L1", "L2"]
    assert [row.n for row in rows.values()] == [40, 20, 20, 10, 10]
    for name, own in {"all": offsets, "soft tissue": offsets[10:30], "L2": offsets[30:], "bone": np.r_[offsets[:10], offsets[30:]]}.items():
        expected = own.mean(), np.median(own), np.quantile(own, 0.95), own.max(), 100 * (own < 2).mean()
        assert np.allclose(rows[name][2:], expected)
    assert [row.group for row in landmark_errors(mapped[:2], moving[:2], ["", ""])] == ["all", "soft tissue"]


SPACING = np.array([1, 1.2, 4.0])


def blob(shift=0, size=1.0, shape=(30, 28, 12)):
    x = np.indices(shape) * SPACING[:, None, None, None] - np.array([14.0, 15, 21])[:, None, None, None]
    x[0] -= shift
    return torch.tensor(((x / (size * np.array([9, 8, 14])[:, None, None, None])) ** 2).sum(0) < 1).long()


def surface_mm(mask):
    "World positions of the voxels with a face neighbour outside, by looking at the six neighbours."
    padded = np.pad(mask.numpy() > 0, 1)
    neighbours = np.stack([np.roll(padded, s, a) for a in range(3) for s in (-1, 1)])
    return (np.argwhere(padded & ~neighbours.all(0)) - 1) * SPACING


def test_dice_and_surface_distances_against_brute_force_and_sitk():
    a, b = blob(), blob(3, 1.15)
    rows, mean = label_agreement(a, b, SPACING, ["L1"])
    distance = cdist(surface_mm(a), surface_mm(b))
    there, back = distance.min(1), distance.min(0)
    assert rows[0].hd95_mm == pytest.approx(max(np.quantile(there, 0.95), np.quantile(back, 0.95)))
    assert rows[0].assd_mm == pytest.approx(np.concatenate([there, back]).mean())
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*(sitk.GetImageFromArray(x.numpy().astype(np.uint8)) for x in (a, b)))
    assert rows[0].dice == pytest.approx(overlap.GetDiceCoefficient())
    assert mean[:5] == (*rows[0][1:4], 1, 0)


def published_hd95(a, b):
    "Defect 7: surface distances in voxels."
    distance = cdist(surface_mm(a) / SPACING, surface_mm(b) / SPACING)
    return max(np.quantile(distance.min(1), 0.95), np.quantile(distance.min(0), 0.95))


def moved_by_one_slice(hd95):
    "Two blocks one slice of 4 mm apart, as large as the image in plane."
    a, b = torch.zeros(2, 12, 12, 12, dtype=torch.long)
    a[..., 2:6], b[..., 3:7] = 1, 1
    return hd95(a, b) == pytest.approx(4)


def test_C14_defect_7_is_rejected():
    assert moved_by_one_slice(lambda a, b: label_agreement(a, b, SPACING, ["L1"])[0][0].hd95_mm)
    assert not moved_by_one_slice(published_hd95)


def published_intersection(moved, fixed):
    "Defect 7: only labels that both have are looked at."
    common = sorted(set(moved.unique().tolist()) & set(fixed.unique().tolist()) - {0})
    return np.mean([label_agreement((moved == n).long(), (fixed == n).long(), SPACING, ["x"])[1].dice for n in common])


def losing_a_vertebra_does_not_pay(mean_dice):
    fixed = torch.where(blob() > 0, 1, 0)
    fixed[:, :, 6:][fixed[:, :, 6:] > 0] = 2
    moved = torch.roll(fixed, 2, 0)
    moved[..., :6] = fixed[..., :6]
    lost = torch.where(moved == 2, 0, moved)
    return mean_dice(lost, fixed) < mean_dice(moved, fixed)


def test_C14_losing_a_vertebra_does_not_pay():
    assert losing_a_vertebra_does_not_pay(lambda moved, fixed: label_agreement(moved, fixed, SPACING, ["L1", "L2"])[1].dice)
    assert not losing_a_vertebra_does_not_pay(published_intersection)


def test_C14_the_four_cases_of_presence():
    first, second = torch.zeros(2, 12, 12, 12, dtype=torch.long)
    first[:3], second[:3], first[4:6], second[7:9] = 1, 1, 2, 3
    rows, mean = label_agreement(first, second, SPACING, ["L1", "L2", "L3", "L4"], penalty_mm=30.0)
    assert [tuple(row) for row in rows] == [("L1", 1, 0, 0, False), ("L2", 0, 30, 30, True), ("L3", 0, 30, 30, True)]
    assert mean == pytest.approx((1 / 3, 20, 20, 3, 2, 1, 30))
    rows, mean = label_agreement(0 * first, 0 * second, SPACING, ["L1"])
    assert rows == []
    assert (mean.n, mean.n_missing, mean.n_absent) == (0, 0, 1)


def test_labels_on_two_grids_are_refused():
    with pytest.raises(ValueError, match="one grid"):
        label_agreement(torch.zeros(3, 3, 3, dtype=torch.long), torch.zeros(3, 3, 4, dtype=torch.long), SPACING, ["L1"])


def test_rows_are_plain_numbers():
    import json

    rows, mean = label_agreement(blob(), blob(2), SPACING, ["L1"])
    found = [rows[0], mean, ours(linear_field(HALVED), GRID), diffeomorphism(linear_field(HALVED), GRID)]
    found += landmark_errors(np.zeros((1, 3)), np.ones((1, 3)), ["L1"])
    assert json.loads(json.dumps([row._asdict() for row in found], allow_nan=False))


def test_nan_does_not_pass_for_a_map_that_does_not_fold():
    grid = Grid((6, 6, 6), np.eye(4))
    assert regularity(torch.full((1, 6, 6, 6), torch.nan)).n_folded == 216
    assert diffeomorphism(torch.full((1, 3, 6, 6, 6), torch.nan), grid).n_failing == 64


def test_C14_losing_a_vertebra_is_never_better_than_missing_its_place():
    fixed = torch.zeros(20, 20, 60, dtype=torch.int32)
    fixed[5:15, 5:15, 2:8] = 1
    far = torch.zeros_like(fixed)
    far[5:15, 5:15, 50:56] = 1
    lost, placed = (label_agreement(moved, fixed, np.ones(3), ["L1"])[1] for moved in (torch.zeros_like(fixed), far))
    assert lost.hd95_mm > placed.hd95_mm and lost.assd_mm > placed.assd_mm
