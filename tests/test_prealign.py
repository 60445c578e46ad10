"The rigid start: overlap, centroids, files, and a search that finds the spine or says that it is not sure."

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.spatial.transform import Rotation

from spinereg.files.pairs import read_pair
from spinereg.files.problems import InputError
from spinereg.files.transforms import itk_affine, write_itk
from spinereg.registration.prealign import numbering_shift, overlap, rigid_start, searchable
from spinereg.registration.search import search
from spinereg.space.geometry import Grid, crop_grid, to_ras, transform_points
from spinereg.space.rigid import motion_matrix, procrustes, rotation_angle_deg


@pytest.fixture(scope="module")
def folder():
    return Path(__file__).parent.parent / "data_samples/test/clinical_0"


@pytest.fixture(scope="module")
def pair(folder):
    return read_pair(folder / "mr_t1.nii.gz", folder / "ct.nii.gz", folder / "ct_mask.nii.gz", folder / "mr_mask.nii.gz", folder / "landmarks.csv")


def bone_error_mm(pair, matrix):
    bone = torch.tensor([v != "" for v in pair.landmarks.vertebra])
    return (transform_points(matrix, pair.landmarks.fixed_mm[bone]) - pair.landmarks.moving_mm[bone]).norm(dim=1).mean().item()


def fit_points(fixed_mm, moving_mm):
    "The rigid motion from one list of points to the other, as `align_labels` finds it."
    x, y = torch.as_tensor(fixed_mm), torch.as_tensor(moving_mm)
    return motion_matrix(procrustes(x, y, torch.ones(len(x)).double(), torch.zeros(len(x)).long(), 1, 0.02))[0].numpy()


def moved_header(pair, matrix):
    "The pair with its moving image put elsewhere in the world."
    grid = Grid(pair.moving.grid.shape, matrix @ pair.moving.grid.affine)
    moving, labels = replace(pair.moving, grid=grid), replace(pair.moving_labels, grid=grid)
    marks = pair.landmarks._replace(moving_mm=transform_points(matrix, pair.landmarks.moving_mm))
    return pair._replace(moving=moving, moving_labels=labels, landmarks=marks)


def test_A2_overlap_of_grids_that_share_nothing_but_the_world():
    """A2: an oblique box inside a large one is covered whole, half outside by half."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_rotvec([0.3, 0.2, -0.4]).as_matrix() @ np.diag([2, 1, 1.5])
    small, large = Grid((10, 20, 12), affine), Grid((200, 200, 200), np.array([[1.0, 0, 0, -100], [0, 1, 0, -100], [0, 0, 1, -100], [0, 0, 0, 1]]))
    assert overlap(small, large) > 0.999
    assert overlap(large, small) > 0.9
    away = np.eye(4)
    away[0, 3] = 100 - small.centre_mm[0]
    assert abs(overlap(small, large, away) - 0.5) < 0.1


@pytest.mark.parametrize("angle_deg", [0.0, 5.0, 20.0])
def test_centroids_determine_what_they_can(angle_deg):
    rng = np.random.default_rng(int(angle_deg))
    column = np.stack([3 * np.sin(np.arange(6)), 5 * np.cos(np.arange(6)), 33.0 * np.arange(6)], 1)
    turn = Rotation.from_rotvec(np.deg2rad(angle_deg) * np.array([0.8, 0.6, 0])).as_matrix()
    matrix = fit_points(column, column @ turn.T + rng.normal(size=3) * 20)
    assert np.allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-9)
    assert rotation_angle_deg(torch.tensor(matrix[:3, :3] @ turn.T)) < 0.1 * angle_deg + 1e-6


@pytest.mark.parametrize("how", ["labels", "auto"])
def test_A5_every_way_brings_the_bones_within_reach(pair, how):
    """A5: from 6 mm or more to where the deformable part takes over."""
    start = rigid_start(pair, how)
    assert bone_error_mm(pair, np.eye(4)) > 6
    assert bone_error_mm(pair, start.rigid) < 4
    assert start.overlap_after > 0.3


def moved_by(centre_mm, shift_mm, turn_deg):
    "A rigid motion that turns about a place."
    away = np.eye(4)
    away[:3, :3] = Rotation.from_rotvec(np.deg2rad(turn_deg)).as_matrix()
    away[:3, 3] = centre_mm - away[:3, :3] @ centre_mm + shift_mm
    return away


OFF = {"one level up": ((0, 0, 34), (0, 0, 0)), "two levels down": ((0, 0, -66), (0, 0, 0)), "far and turned": ((-30, 40, 17), (12, 6, -12))}


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("labels", [True, False])
def test_A5_the_search_finds_back_from_a_level_off_and_further(pair, off, labels):
    """A5: from the best rigid motion, moved along the spine by a level or two, or 50 mm and 18 degrees."""
    true = search_matrix(pair)
    there = moved_header(pair, moved_by(pair.landmarks.moving_mm.mean(0).numpy(), *OFF[off]) @ np.linalg.inv(true))
    start = rigid_start(there if labels else there._replace(moving_labels=None, fixed_labels=None), "search")
    assert bone_error_mm(there, start.rigid) < bone_error_mm(pair, true) + 1
    assert start.confidence >= 1 and not start.notices and "sure by" in start.how


def test_A5_a_search_that_cannot_reach_the_spine_is_not_sure(pair):
    """A5: 110 mm along the spine are beyond its reach; what it finds instead is a doubt."""
    off = moved_by(pair.landmarks.moving_mm.mean(0).numpy(), (0, 0, 110), (0, 0, 0)) @ np.linalg.inv(search_matrix(pair))
    start = rigid_start(moved_header(pair, off)._replace(fixed_labels=None), "search")
    assert start.confidence < 1 and "NOT SURE" in start.how
    assert [notice.name for notice in start.notices] == ["prealign"] and "not sure" in start.notices[0].text


def test_an_upside_down_spine_is_a_doubt(pair):
    mr = replace(pair.fixed, data=pair.fixed.data.flip(2))
    assert rigid_start(pair._replace(fixed=mr, fixed_labels=None), "search").confidence < 1


def test_an_image_on_itself_is_no_doubt_and_stays(pair):
    start = rigid_start(pair._replace(fixed=pair.moving, fixed_modality="ct", fixed_labels=None), "auto")
    assert start.confidence > 1 and not start.notices and np.abs(start.rigid - np.eye(4)).max() < 0.05


def test_MR_may_move_onto_CT(pair):
    """The pair the other way round, with the labels of the MR."""
    other = pair._replace(
        fixed=pair.moving, moving=pair.fixed, fixed_modality="ct", moving_modality="mr", moving_labels=pair.fixed_labels, fixed_labels=None,
        landmarks=pair.landmarks._replace(fixed_mm=pair.landmarks.moving_mm, moving_mm=pair.landmarks.fixed_mm),
    )
    start = rigid_start(other, "search")
    assert bone_error_mm(other, start.rigid) < bone_error_mm(other, search_matrix(other)) + 1 and start.confidence > 1


@pytest.mark.parametrize("gain", [4.0, 9.0])
def test_the_gain_of_a_coil_does_not_lead_the_search_away(pair, gain):
    """Brightness that falls by a factor over the depth of the body, in a slab of 40 mm, as surface coils and sagittal stacks have it."""
    fall = torch.linspace(1, 0, pair.fixed.data.shape[1])[:, None]
    n = round(20 / pair.fixed.grid.spacing_mm[0])
    middle = pair.fixed.data.shape[0] // 2
    grid = crop_grid(pair.fixed.grid, [middle - n, 0, 0], [middle + n, *pair.fixed.grid.shape[1:]])
    mr = replace(pair.fixed, data=(pair.fixed.data * gain**fall)[middle - n : middle + n], grid=grid)
    start = rigid_start(pair._replace(fixed=mr, fixed_labels=None), "search")
    assert bone_error_mm(pair, start.rigid) < bone_error_mm(pair, search_matrix(pair)) + 1 and start.confidence > 1


def test_labels_too_small_to_show_do_not_blind_the_search(pair):
    tiny = torch.zeros_like(pair.moving_labels.data)
    tiny[30:33, 60:63, 80:83] = 1
    images = searchable(pair.fixed, "mr"), searchable(pair.moving, "ct")
    found = search(images[0], pair.fixed.grid, images[1], pair.moving.grid, tiny)
    assert bone_error_mm(pair, found.rigid) < 4


def test_A1_the_search_turns_with_the_world(pair):
    """A1: both headers turned alike, the same alignment turned along."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_rotvec([0.2, -0.3, 0.25]).as_matrix()
    images = searchable(pair.fixed, "mr"), searchable(pair.moving, "ct")
    grids = pair.fixed.grid, pair.moving.grid
    turned = [Grid(g.shape, turn @ g.affine) for g in grids]
    here = search(images[0], grids[0], images[1], grids[1], pair.moving_labels.data).rigid
    there = search(images[0], turned[0], images[1], turned[1], pair.moving_labels.data).rigid
    assert np.abs(np.linalg.inv(turn) @ there @ turn - here).max() < 0.02


def test_A4_images_that_do_not_meet_are_an_error_with_both_boxes(pair):
    """A4: under 5 % overlap nothing is started; auto finds a way, header and search do not pretend."""
    away = np.eye(4)
    away[:3, 3] = [0, 0, 2000]
    there = moved_header(pair, away)
    for how in ("header", "search"):
        with pytest.raises(InputError, match=r"overlap by 0%.*fixed x.*moving x") as caught:
            rigid_start(there, how)
        assert "centres" in str(caught.value)
    assert bone_error_mm(there, rigid_start(there, "auto").rigid) < 4
    assert bone_error_mm(there, rigid_start(there._replace(fixed_labels=None), "auto").rigid) < 30


def test_a_transform_file_is_taken_as_it_is(pair, tmp_path):
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = Rotation.from_rotvec([0.02, 0.01, 0]).as_matrix(), [1, 2, 3]
    path = write_itk(tmp_path / "start.tfm", itk_affine(matrix))
    assert np.allclose(rigid_start(pair, str(path)).rigid, matrix, atol=1e-6)


@pytest.mark.parametrize(("content", "word"), [("missing", "no such file"), ("scaled", "scales"), ("field", "not linear")])
def test_a_file_that_is_no_rigid_transform_is_refused(pair, tmp_path, content, word):
    path = tmp_path / "start.h5"
    if content == "scaled":
        write_itk(path, itk_affine(np.diag([1.1, 1, 1, 1])))
    if content == "field":
        write_itk(path, sitk.DisplacementFieldTransform(sitk.Image([4, 4, 4], sitk.sitkVectorFloat64, 3)))
    with pytest.raises(InputError, match=word):
        rigid_start(pair, str(path))


def test_labels_are_needed_for_labels(pair):
    with pytest.raises(InputError, match="needs the labels of both"):
        rigid_start(pair._replace(fixed_labels=None), "labels")


def test_no_interpolation_happens_on_the_way_in(pair, folder):
    import nibabel as nib

    stored = nib.load(folder / "ct.nii.gz")
    data, grid = to_ras(np.asarray(stored.dataobj), stored.affine)
    assert grid.same_as(pair.moving.grid, 0.01)
    assert np.array_equal(data.astype(np.float32), pair.moving.data.numpy())


@pytest.mark.parametrize("shift", [0, 1, -1])
def test_B2_labels_that_count_one_level_off_are_told(pair, shift):
    """B2: a map whose names are one level off, cut vertebrae and all."""
    order = ("T10", *pair.moving_labels.names, "S")
    renamed = replace(pair.fixed_labels, names=tuple(order[order.index(name) + shift] for name in pair.fixed_labels.names))
    assert numbering_shift(renamed, pair.moving_labels, search_matrix(pair)) == -shift
    assert numbering_shift(renamed, renamed, np.eye(4)) == 0


def search_matrix(pair):
    "Closest rigid motion of the landmarks on bone."
    bone = torch.tensor([v != "" for v in pair.landmarks.vertebra])
    return fit_points(pair.landmarks.fixed_mm[bone], pair.landmarks.moving_mm[bone])


def test_B2_auto_says_that_the_labels_are_one_level_off(pair):
    """B2: the search aligns the images, the names disagree, and it is said."""
    order = ("T10", *pair.moving_labels.names, "S")
    up = tuple(order[order.index(name) - 1] for name in pair.fixed_labels.names)
    (notice,) = rigid_start(pair._replace(fixed_labels=replace(pair.fixed_labels, names=up)), "auto").notices  # and no doubt about the search
    assert "on the one below it in the moving image" in notice.text


def test_A4_labels_without_a_common_name_leave_auto_the_centres(pair):
    away = np.eye(4)
    away[:3, 3] = [900, 0, 0]
    strangers = replace(pair.fixed_labels, names=tuple(f"C{n + 1}" for n in range(len(pair.fixed_labels.names))))
    start = rigid_start(moved_header(pair, away)._replace(fixed_labels=strangers), "auto")
    assert start.overlap_before == 0 and "centres" in start.how


@pytest.mark.parametrize("seed", [0, 1])
def test_A3_the_search_does_not_run_away_from_a_small_overlap(pair, seed):
    """A3: the fixed image shows the upper quarter of the spine only; fewer points agree by chance, and must not win."""
    fixed, moving = searchable(pair.fixed, "mr"), searchable(pair.moving, "ct")
    true, n = search_matrix(pair), fixed.shape[2]
    low = n - n // 4
    part = crop_grid(pair.fixed.grid, [0, 0, low], pair.fixed.grid.shape)
    off = np.eye(4)
    off[:3, 3] = [4, -4, 3]
    found = search(fixed[:, :, low:], part, moving, pair.moving.grid, pair.moving_labels.data, start=off @ true, seed=seed).rigid
    index = transform_points(np.linalg.inv(part.affine), pair.landmarks.fixed_mm)
    seen = torch.tensor([v != "" for v in pair.landmarks.vertebra]) & ((index >= 0) & (index <= torch.tensor(part.shape) - 1)).all(1)
    left = (transform_points(found, pair.landmarks.fixed_mm[seen]) - pair.landmarks.moving_mm[seen]).norm(dim=1)
    assert seen.sum() >= 10 and left.mean() < 2
    assert overlap(part, pair.moving.grid, found) > 0.9 * overlap(part, pair.moving.grid, true)
