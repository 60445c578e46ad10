"The phantom: its truth, its images and its files."

import functools
import json

import nibabel as nib
import numpy as np
import pytest
import torch

from spinereg.files.labels import SCHEMES
from spinereg.files.pairs import read_landmarks
from spinereg.phantom.cases import (
    DIFFICULTIES,
    case_facts,
    draw_case,
    draw_truth,
    make_case,
    place_bone_landmarks,
    start_and_rigid_mm,
    truth_table,
    write_case,
    write_samples,
)
from spinereg.phantom.posture import bone_points, clearances_mm, inverse_map, map_jacobian, smallest_jacobian
from spinereg.phantom.spine import DRAWN, Sizes, bone_distances, build_spine, typical_sizes, vertebra_distance
from spinereg.phantom.tissues import build_anatomy, render, signal, tissue_fractions
from spinereg.space.geometry import Grid, crop_grid, respace_grid, to_ras, transform_points

CASES = [("easy", 3), ("clinical", 1), ("hard", 101)]
drawn = functools.cache(draw_truth)
easy_case = functools.cache(lambda: make_case("easy", 1))


def bone_in_fixed(truth, inside):
    "Points in bone of the fixed image, and the number of the vertebra each lies in."
    points = torch.cat([transform_points(pose, own) for pose, own in zip(truth.poses[0], inside)])
    return points, torch.cat([torch.full((len(own),), k) for k, own in enumerate(inside)])


# ---------------------------------------------------------------------------------------------------------------- anatomy


@pytest.mark.parametrize(("first", "last"), [("C3", "T2"), ("T2", "T9"), ("T9", "L5")])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_vertebra_is_drawn_and_no_neighbours_touch(first, last, seed):
    spine = build_spine(first, last, seed)
    assert [v.name for v in spine] == list(DRAWN[DRAWN.index(first) : DRAWN.index(last) + 1])
    inside = [bone_points(v, 1.2) for v in spine]
    assert clearances_mm(spine, np.stack([v.pose for v in spine]), inside).min() >= 1.5


def test_sizes_vary_with_the_person_and_scale():
    a, b, small = build_spine("L1", "L3", 0), build_spine("L1", "L3", 1), build_spine("L1", "L3", 0, scale=0.8)
    assert a[1].sizes != b[1].sizes
    assert np.isclose(small[1].sizes.width, 0.8 * a[1].sizes.width)
    assert abs(a[1].sizes.width / typical_sizes("L2").width - 1) <= 0.04


def test_a_vertebra_is_one_piece_around_a_free_canal():
    from scipy.ndimage import label

    for v in build_spine("T12", "L4", 2):
        axes = [torch.arange(-60.0, 60), torch.arange(-90.0, 30), torch.arange(-45.0, 45)]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        bone = (vertebra_distance(v, grid.reshape(-1, 3).T) < 0).reshape(grid.shape[:3]).numpy()
        assert label(bone)[1] == 1
        along, behind = torch.linspace(-20, 20, 41), -(v.sizes.depth + v.sizes.canal_depth) / 2
        canal = torch.stack([0 * along, 0 * along + behind, along])
        assert vertebra_distance(v, canal).min() > 3


def test_unknown_vertebra_and_difficulty_are_refused_with_advice():
    with pytest.raises(ValueError, match="expected one of C3"):
        typical_sizes("S1")
    with pytest.raises(ValueError, match="expected one of easy"):
        make_case("trivial", 0)


def test_sizes_are_plausible_everywhere():
    sizes = [typical_sizes(name) for name in DRAWN]
    assert all(isinstance(s, Sizes) and s.canal_width > 12 and s.canal_depth > 12 and s.pedicle_width > 3 for s in sizes)
    assert np.all(np.diff([s.width for s in sizes[10:]]) >= 0)


# ------------------------------------------------------------------------------------------------------------------ truth


@pytest.mark.parametrize(("difficulty", "seed"), CASES)
def test_truth_is_exactly_rigid_in_every_vertebra(difficulty, seed):
    truth, _, _, inside = drawn(difficulty, seed)
    points, number = bone_in_fixed(truth, inside)
    points, number = points[::29], number[::29]
    matrices = torch.as_tensor(truth.matrices)[number]
    rigid = (matrices[:, :3, :3] @ points[..., None])[..., 0] + matrices[:, :3, 3]
    assert (truth.map(points) - rigid).abs().max() < 1e-9
    for k, own in enumerate(inside):
        deep = own[vertebra_distance(truth.vertebrae[k], own.T) < -0.01][::150]
        J = map_jacobian(truth, transform_points(truth.poses[0][k], deep))
        assert (J.mT @ J - torch.eye(3)).abs().max() < 1e-7
        assert (torch.linalg.det(J) - 1).abs().max() < 1e-7
        assert torch.allclose(J, torch.as_tensor(truth.matrices[k, :3, :3]).expand_as(J), atol=1e-7)


@pytest.mark.parametrize(("difficulty", "seed"), CASES)
def test_truth_is_invertible_all_over_the_image(difficulty, seed):
    truth, _, mr_grid, inside = drawn(difficulty, seed)
    points = respace_grid(mr_grid, 10.0).points_mm(torch.zeros(1, dtype=torch.float64)).reshape(-1, 3)
    assert torch.linalg.det(map_jacobian(truth, points)).min() > 0.1
    assert smallest_jacobian(truth, [own[3::7] for own in inside]) > 0.1
    some = points[::41]
    assert (inverse_map(truth, truth.map(some)) - some).norm(dim=1).max() < 1e-6


def test_soft_tissue_is_pushed_between_bones_but_not_on_them():
    truth, _, mr_grid, inside = drawn("easy", 0)
    calm = type(truth)(truth.vertebrae, truth.poses, truth.centres_mm, 0 * truth.pushes_mm, truth.width_mm, truth.falloff_mm)
    points = respace_grid(mr_grid, 6.0).points_mm(torch.zeros(1, dtype=torch.float64)).reshape(-1, 3)
    push = (truth.map(points) - calm.map(points)).norm(dim=1)
    distance = bone_distances(truth.vertebrae, truth.poses[0], points).amin(0)
    assert push[distance <= 0].max() == 0
    assert push[distance > 0].min() > 0 and push.max() > 1.0
    assert push[(distance > 0) & (distance < 1)].max() < 0.5


def test_truth_follows_shape_dtype_and_batch():
    truth, *_ = drawn("easy", 0)
    points = torch.randn(2, 5, 3) * 20 + torch.as_tensor(truth.vertebrae[3].pose[:3, 3]).float()
    assert truth.map(points).shape == points.shape and truth.map(points).dtype == torch.float32
    assert torch.allclose(truth.map(points)[1], truth.map(points[1]), atol=1e-4)
    assert torch.allclose(truth.map(points.double()).float(), truth.map(points), atol=1e-2)


@pytest.mark.parametrize("seed", [0, 6, 101, 103])
@pytest.mark.parametrize("difficulty", ["easy", "clinical"])
def test_cases_are_neither_too_easy_nor_beyond_their_difficulty(difficulty, seed):
    truth, ct_grid, mr_grid, inside = drawn(difficulty, seed)
    bone = place_bone_landmarks(truth, inside, ct_grid, mr_grid)
    start, rigid = start_and_rigid_mm(bone)
    assert start >= {"easy": 4.0, "clinical": 6.0}[difficulty]
    assert rigid >= {"easy": 0.7, "clinical": 1.1}[difficulty]
    joint = np.linalg.inv(truth.matrices[1:]) @ truth.matrices[:-1]
    angle = np.rad2deg(np.arccos(np.clip((np.trace(joint[:, :3, :3], axis1=1, axis2=2) - 1) / 2, -1, 1)))
    assert angle.max() <= DIFFICULTIES[difficulty].joint_deg + 1e-6
    assert clearances_mm(truth.vertebrae, truth.poses[0], inside).min() > 0.6
    assert len(set(bone.vertebra)) >= 3


def test_a_hard_case_bends_far_and_its_bones_stay_apart_on_the_way():
    truth, ct_grid, mr_grid, inside = drawn("hard", 101)
    joint = np.linalg.inv(truth.matrices[1:]) @ truth.matrices[:-1]
    angle = np.rad2deg(np.arccos((np.trace(joint[:, :3, :3], axis1=1, axis2=2) - 1) / 2))
    assert 7 < angle.max() <= 15 + 1e-6
    assert start_and_rigid_mm(place_bone_landmarks(truth, inside, ct_grid, mr_grid))[1] > 2
    assert min(clearances_mm(truth.vertebrae, poses, inside).min() for poses in truth.poses) > 0.6


# ----------------------------------------------------------------------------------------------------------------- images


def test_a_world_point_has_one_value_on_every_grid():
    truth, _, mr_grid, _ = drawn("easy", 0)
    person = build_anatomy(truth.vertebrae, 0)
    part = crop_grid(mr_grid, np.array([20, 20, 60]), np.array([44, 60, 84]))
    turned = Grid((24, 40, 24), part.affine @ np.array([[0, 0, 1.0, 0], [0, -1, 0, 39], [-1, 0, 0, 23], [0, 0, 0, 1]]))
    image, label = render(person, part, ("ct", "t1", "t2"), truth, dtype=torch.float64)
    other, other_label = render(person, turned, ("ct", "t1", "t2"), truth, dtype=torch.float64)
    back, _ = to_ras(other[1].numpy(), turned.affine)
    assert np.allclose(back, image[1].numpy(), atol=1e-9)
    assert np.array_equal(to_ras(other_label.numpy(), turned.affine)[0], label.numpy())
    single = render(person, part, ("ct", "t1", "t2"), truth)[0]
    assert (single - image).abs().amax(dim=(1, 2, 3))[1:].max() < 0.05


def test_fixed_image_is_the_person_at_the_mapped_points():
    truth, _, mr_grid, _ = drawn("easy", 0)
    person = build_anatomy(truth.vertebrae, 0)
    part = crop_grid(mr_grid, np.array([30, 30, 70]), np.array([34, 60, 90]))
    image, label = render(person, part, ("t2",), truth, dtype=torch.float64)
    points = truth.map(part.points_mm(torch.zeros(1, dtype=torch.float64)).reshape(-1, 3))
    fractions, expected = tissue_fractions(person, points)
    assert torch.allclose(fractions.sum(0), torch.ones(1, dtype=torch.float64))
    assert torch.equal(expected.reshape(part.shape), label)
    assert torch.allclose(signal(person, points, fractions, "t2").reshape(part.shape), image[0])


def test_a_thick_slice_is_the_mean_of_thin_ones():
    truth, _, mr_grid, _ = drawn("easy", 0)
    person = build_anatomy(truth.vertebrae, 0)
    thin = crop_grid(mr_grid, np.array([20, 30, 70]), np.array([29, 50, 90]))
    thick = respace_grid(thin, np.array([3.0, 1, 1]))
    averaged = render(person, thin, ("t1",), dtype=torch.float64)[0][0].reshape(3, 3, 20, 20).mean(1)
    assert torch.allclose(render(person, thick, ("t1",), None, (3, 1, 1), torch.float64)[0][0], averaged, atol=1e-9)


def test_textures_of_ct_and_mr_are_independent_in_marrow():
    case = easy_case()
    truth = case.truth
    person = build_anatomy(truth.vertebrae, case.seed)
    points = torch.cat([transform_points(pose, p) for pose, p in zip(truth.poses[-1], [bone_points(v) for v in truth.vertebrae])])
    points = points[bone_distances(truth.vertebrae, truth.poses[-1], points).amin(0) < -3]
    fractions, _ = tissue_fractions(person, points)
    pure = fractions[list(person.tissues).index("marrow")] > 0.999
    images = torch.stack([signal(person, points[pure], fractions[:, pure], m) for m in ("ct", "t1")])
    assert pure.sum() > 5000 and images.std(1).min() > 0.02
    assert abs(torch.corrcoef(images)[0, 1]) < 0.06


def test_labels_are_the_shape_and_neighbours_do_not_touch():
    case = easy_case()
    value = {name: number for number, name in SCHEMES["verse"].items()}
    for mask, grid, poses in ((case.ct_mask, case.ct_grid, case.truth.poses[-1]), (case.mr_mask, case.mr_grid, case.truth.poses[0])):
        points = grid.points_mm(torch.zeros(1, dtype=torch.float64))[::3, ::3, ::3].reshape(-1, 3)
        distance, number = bone_distances(case.truth.vertebrae, poses, points).min(0)
        expected = torch.tensor([value[v.name] for v in case.truth.vertebrae])[number] * (distance < 0)
        sure = distance.abs() > 1e-3
        assert np.array_equal(expected[sure].numpy(), mask[::3, ::3, ::3].reshape(-1)[sure.numpy()])
        for axis in range(3):
            a, b = np.delete(mask, 0, axis), np.delete(mask, -1, axis)
            assert not ((a != b) & (a > 0) & (b > 0)).any()


def test_images_look_like_ct_and_mr():
    case = easy_case()
    bone, air = case.ct_mask > 0, case.ct < -900
    assert case.ct.dtype == np.int16 and case.ct_mask.dtype == np.uint8 and case.mr_t1.dtype == np.uint16
    assert case.ct.shape == case.mr_t1.shape == (64, 96, 160) and case.ct_grid.same_as(case.mr_grid)
    assert air.any() and case.ct[bone].mean() > 250 and np.percentile(case.ct[bone], 98) > 700
    assert not np.array_equal(case.mr_t1, case.mr_t2)
    assert case.mr_t1.std() > 10 and case.mr_t2.std() > 10


def test_same_seed_same_voxels_bit_for_bit():
    "C6: a part of a case drawn twice, noise included, and two seeds that differ."
    truth, ct_grid, mr_grid, _ = draw_truth("clinical", 7)
    again, _, mr_again, _ = draw_truth("clinical", 7)
    assert np.array_equal(truth.poses, again.poses) and np.array_equal(mr_grid.affine, mr_again.affine)
    part = crop_grid(mr_grid, np.array([60, 60, 8]), np.array([100, 100, 12]))
    images = [render(build_anatomy(t.vertebrae, 7), part, ("t1", "t2"), t, (1, 1, 3))[0] for t in (truth, again)]
    assert torch.equal(*images)
    assert not np.array_equal(draw_truth("clinical", 8)[0].poses, truth.poses)


# ------------------------------------------------------------------------------------------------------------------ files


def test_a_written_case_reads_back_and_is_the_same_again(tmp_path):
    case = easy_case()
    first, second = write_case(tmp_path / "a", case), write_case(tmp_path / "b", make_case("easy", 1))
    names = {"ct.nii.gz", "ct_mask.nii.gz", "mr_t1.nii.gz", "mr_mask.nii.gz", "truth.json", "landmarks.csv"}
    assert {file.name for file in first.iterdir()} == names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    for name, array, grid in (("ct", case.ct, case.ct_grid), ("mr_mask", case.mr_mask, case.mr_grid)):
        image = nib.load(first / f"{name}.nii.gz")
        assert np.array_equal(np.asarray(image.dataobj), array) and np.allclose(image.affine, grid.affine, atol=1e-4)
        assert image.get_data_dtype() == array.dtype and int(image.header["sform_code"]) == int(image.header["qform_code"]) == 1
    assert sum(file.stat().st_size for file in first.iterdir()) < 2.5e6


def test_truth_json_and_landmarks_agree_with_the_truth(tmp_path):
    case = easy_case()
    folder = write_case(tmp_path, case)
    stored = json.loads((folder / "truth.json").read_text())
    assert stored == truth_table(case)
    assert stored["schema_version"] == 1 and (stored["level"], stored["seed"]) == ("easy", 1)
    matrices = {v["name"]: np.array(v["matrix"]) for v in stored["vertebrae"]}
    assert np.array_equal(np.stack(list(matrices.values())), case.truth.matrices)
    assert {v["label"] for v in stored["vertebrae"] if v["fixed"] != "absent"} >= set(np.unique(case.mr_mask)) - {0}
    assert {v["fixed"] for v in stored["vertebrae"]} <= {"whole", "cut", "absent"}
    marks = read_landmarks(folder / "landmarks.csv")
    assert (case.truth.map(marks.fixed_mm) - marks.moving_mm).norm(dim=1).max() < 1e-3
    owners = np.array(marks.vertebra)
    whole = [v["name"] for v in stored["vertebrae"] if v["fixed"] == v["moving"] == "whole"]
    assert len(whole) >= 3 and (owners == "").sum() >= 20
    for name in whole:
        own = marks.fixed_mm[torch.as_tensor(owners == name)]
        assert len(own) >= 20 and (own.amax(0) - own.amin(0)).min() > 20
        expected = transform_points(matrices[name], own)
        assert (expected - marks.moving_mm[torch.as_tensor(owners == name)]).abs().max() < 1e-3
    assert set(owners) - {""} == set(whole)


def test_a_clinical_case_has_two_oblique_unlike_grids():
    for seed in range(3):
        _, ct_grid, mr_grid, _ = drawn("clinical", seed)
        assert np.allclose(ct_grid.spacing_mm, 1) and np.allclose(sorted(mr_grid.spacing_mm), [0.8, 0.8, 3.5])
        assert ct_grid.axcodes != mr_grid.axcodes and "".join(mr_grid.axcodes)[int(np.argmax(mr_grid.spacing_mm))] in "RL"
        assert np.abs(mr_grid.axes).max(0).min() < 0.9999
        assert not mr_grid.same_as(ct_grid)


def test_facts_and_picture_of_a_case():
    case = easy_case()
    facts = case_facts(case)
    assert facts["vertebrae"].split() == [v.name for v, ct, mr in zip(case.truth.vertebrae, case.in_ct, case.in_mr) if ct == mr == "whole"]
    assert facts["start mm"] == pytest.approx(case.start_mm, abs=0.005) and facts["landmarks"] == len(case.landmarks.names)
    titles = [ax.get_title() for ax in draw_case(case).axes]
    assert titles == [f"{name}, {plane}" for name in ("CT", "T1") for plane in ("sagittal", "coronal", "axial")]


@pytest.mark.parametrize("name", ["easy", "easy_x", "harder_0", "_0"])
def test_a_data_set_refuses_a_case_it_cannot_draw(tmp_path, name):
    with pytest.raises(ValueError, match=rf"train='{name}': .* easy, clinical, hard and a seed"):
        next(write_samples(tmp_path, train=name))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["test/easy_0", "test/clinical_0", "val/easy_5", "train/easy_6", "train/easy_7", "train/clinical_6"])
def test_c6_data_samples_are_complete(case, request):
    folder = request.config.rootpath / "data_samples" / case
    names = {"ct.nii.gz", "ct_mask.nii.gz", "mr_t1.nii.gz", "mr_mask.nii.gz", "truth.json", "landmarks.csv"}
    assert {file.name for file in folder.iterdir()} == names
    stored = json.loads((folder / "truth.json").read_text())
    assert f"{stored['level']}_{stored['seed']}" == folder.name
    total = sum(file.stat().st_size for file in (request.config.rootpath / "data_samples").rglob("*") if file.is_file())
    assert total <= 16e6
