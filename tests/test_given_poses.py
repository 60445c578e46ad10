"Poses that are given: where they are read from, what is refused, and how a failed level is repaired with them."

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from spinereg import read_poses, register
from spinereg.files.manifest import write_result
from spinereg.files.pairs import read_pair
from spinereg.files.transforms import write_motions
from spinereg.registration.bones_first import place_poses
from spinereg.registration.poses import find_poses, outward, sides_of
from spinereg.registration.register import RegisterSettings
from spinereg.registration.rigidify import pose_bones
from spinereg.space.geometry import Grid, transform_points
from spinereg.space.images import label_centres_mm

CASE = Path(__file__).parent.parent / "data_samples/test/easy_0"
FILES = {"fixed": CASE / "mr_t1.nii.gz", "moving": CASE / "ct.nii.gz", "moving_labels": CASE / "ct_mask.nii.gz"}
NAMES = ("L2", "L3")


def rigid(turn=(0.2, -0.1, 0.3), shift=(3, -20, 31)):
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = Rotation.from_rotvec(turn).as_matrix(), shift
    return matrix


@pytest.fixture(scope="module")
def spine():
    "Both sides of the sample case, two vertebrae of its label map, and their true poses."
    pair = read_pair(*FILES.values())
    sides = sides_of(pair, torch.device("cpu"))
    first = pair.moving_labels.names.index(NAMES[0])
    labels = pair.moving_labels.data - first
    labels = torch.where((labels >= 1) & (labels <= len(NAMES)), labels, 0)
    truth = {row["name"]: np.array(row["matrix"]) for row in json.loads((CASE / "truth.json").read_text())["vertebrae"]}
    return *sides, labels, [truth[name] for name in NAMES]


def off_mm(spine, poses):
    "How far the centre of each vertebra is from its true place."
    _, moving, labels, truth = spine
    y = torch.from_numpy(label_centres_mm(labels, moving.grid, len(NAMES)))
    return [float((transform_points(pose.numpy() @ np.linalg.inv(true), at) - at).norm()) for pose, true, at in zip(poses, truth, y)]


def test_a_level_that_is_missed_is_repaired_by_its_pose(spine):
    """L2 of a result lies one level off, and the search does not get it back from there; its pose does, with 3 mm to spare, and brings L3 along."""
    *images, truth = spine
    lost, near = (rigid((0, 0, 0), (0, 0, far)) @ truth[0] for far in (30.0, 3.0))
    before, now = (off_mm(spine, find_poses(*images, len(NAMES), lost, given).poses) for given in ({0: lost, 1: truth[1]}, {0: near}))
    assert before[0] > 15
    assert max(now) < 0.2


def test_every_vertebra_is_reached_from_the_nearest_that_is_known():
    assert outward([3], 6) == [(2, 3), (4, 3), (1, 2), (5, 4), (0, 1)]
    assert outward({0, 5}, 6) == [(1, 0), (4, 5), (2, 1), (3, 4)]
    assert outward(range(3), 3) == []


@pytest.fixture
def folder(tmp_path):
    "A result folder, as far as poses go."
    motions = {"L3": rigid(), "L2": rigid((0, 0.3, 0))}
    with write_result(tmp_path) as aside:
        write_motions(aside, motions)
        (aside / "metrics.json").write_text(json.dumps({"motions": {name: motion.tolist() for name, motion in motions.items()}}))
        (aside / "vertebrae.csv").write_text("vertebra,distance_mm\nL2,1\nL3,2\n")
    return tmp_path, motions


def same(poses, motions):
    return poses.keys() == motions.keys() and all(np.abs(poses[name] - motions[name]).max() < 1e-6 for name in motions)


def test_poses_of_a_folder_are_read_from_its_transforms_or_its_record(folder, tmp_path):
    place, motions = folder
    assert same(read_poses(place), motions) and same(read_poses(str(place / "vertebrae.csv")), motions)
    write_motions(place, {"L2": rigid((0, 0, 0), (1, 2, 3))})  # set by hand since
    for what in (place, place / "vertebrae.csv"):
        with pytest.raises(ValueError, match="L2.tfm .*changed since it was written"):
            read_poses(what)
    by_hand = tmp_path / "by_hand"
    for name in ("metrics.json", "vertebrae.csv", "vertebrae"):
        (by_hand / name).parent.mkdir(exist_ok=True)
        (shutil.copytree if name == "vertebrae" else shutil.copy)(place / name, by_hand / name)
    assert read_poses(by_hand / "vertebrae.csv")["L2"][:3, 3] == pytest.approx([1, 2, 3])
    shutil.rmtree(by_hand / "vertebrae")
    assert same(read_poses(by_hand / "vertebrae.csv"), motions)


def test_a_row_that_is_gone_from_the_table_is_not_given(folder):
    place, motions = folder
    (place / "vertebrae.csv").write_text("vertebra,distance_mm\nL3,2\n")
    assert same(read_poses(place / "vertebrae.csv"), {"L3": motions["L3"]})


def test_poses_of_a_result_come_back_from_its_folder_and_are_recorded(tmp_path):
    """A whole run that does next to nothing: rigid, on 3 mm."""
    result = register(**FILES, method="rigid", prealign="header", spacing_mm=3.0, device="cpu", out_dir=tmp_path)
    assert len(result.metrics.motions) > 4
    for what in (tmp_path, tmp_path / "vertebrae.csv"):
        assert same(read_poses(what), result.metrics.motions)
    settings = RegisterSettings(**FILES, method="polyrigid", poses=result.metrics.motions)
    record = json.loads(json.dumps(replace(result.metrics, parameters=settings.as_dict()).as_dict()))["parameters"]["poses"]
    assert same(read_poses(record), result.metrics.motions)


SHEARED = rigid() @ np.array([[1, 0.1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
BAD = {
    "shape": (rigid()[:3], "(3, 4)"),
    "ragged": ([[1, 2], [3]], "no matrix"),
    "text": ("straight", "no matrix"),
    "mirror": (np.diag([1.0, 1, -1, 1]), "mirrors"),
    "scale": (np.diag([1.01, 1.01, 1.01, 1]), "scales"),
    "shear": (SHEARED, "scales or shears"),
    "nan": (rigid() * np.nan, "not finite"),
    "infinite": (rigid(shift=(np.inf, 0, 0)), "not finite"),
    "transposed": (rigid().T, "last row"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_pose_is_refused_by_name(what):
    bad, said = BAD[what]
    with pytest.raises(ValueError, match="poses: L3 ") as caught:
        read_poses({"L2": rigid(), "L3": bad})
    assert said in str(caught.value) and "L2" not in str(caught.value) and "Expected a rigid 4x4 matrix" in str(caught.value)
    with pytest.raises(ValueError, match="register: poses: L3 "):
        register(**FILES, method="polyrigid", poses={"L3": bad})


def test_a_pose_rounded_by_hand_becomes_rigid_to_the_last_digit():
    (pose,) = read_poses({"L3": rigid().round(4).tolist()}).values()
    assert np.abs(pose[:3, :3].T @ pose[:3, :3] - np.eye(3)).max() < 1e-12 and np.abs(pose - rigid()).max() < 2e-3


def test_files_without_poses_are_refused(folder, tmp_path):
    place, _ = folder
    (place / "notes.txt").write_text("L3")
    for what in (place / "notes.txt", place / "nothing", place / "nothing.csv"):
        with pytest.raises(ValueError, match=r"register: poses .*no such folder, and no CSV file.* Give a result folder"):
            register(**FILES, method="polyrigid", poses=what)
    (place / "vertebrae.csv").write_text("vertebra\nL2\nL5\n")
    with pytest.raises(ValueError, match="poses .*L5: no motion of that name lies beside the table, only of L2, L3"):
        read_poses(place / "vertebrae.csv")
    (place / "vertebrae.csv").write_text("name\nL2\n")
    with pytest.raises(ValueError, match="no column 'vertebra'"):
        read_poses(place / "vertebrae.csv")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "vertebrae.csv").write_text("vertebra\nL2\n")
    for what in (alone, alone / "vertebrae.csv"):
        with pytest.raises(ValueError, match="expected vertebrae/[*].tfm or a metrics.json with motions .* found neither"):
            read_poses(what)


def test_a_transform_beside_the_table_that_is_not_rigid_is_refused_by_name(folder):
    place, _ = folder
    (place / "manifest.json").unlink()
    write_motions(place, {"L2": np.diag([1.0, 1, 1.2, 1])})
    with pytest.raises(ValueError, match=r"poses .*L2\.tfm: scales, shears or mirrors"):
        read_poses(place / "vertebrae.csv")


def test_a_vertebra_that_the_labels_do_not_have_is_refused():
    assert list(place_poses({"L3": rigid(), "L2": rigid()}, NAMES)) == [1, 0]
    with pytest.raises(ValueError, match="poses: T4, L9: no such vertebra in moving_labels, expected some of L2, L3"):
        place_poses({"T4": rigid(), "L2": rigid(), "L9": rigid()}, NAMES)


def test_a_pose_in_the_place_of_another_vertebra_is_refused_by_name():
    """Two blocks of one shape, the lower of which is put where the upper is."""
    labels, grid = read_pair(*FILES.values()).moving_labels, Grid((20, 20, 30), np.eye(4))
    blocks = torch.zeros(grid.shape, dtype=labels.data.dtype)
    blocks[5:13, 5:13, 4:12], blocks[5:13, 5:13, 18:26] = 2, 1
    labels = replace(labels, data=blocks, grid=grid, names=NAMES)
    poses = torch.from_numpy(np.stack([np.eye(4), rigid((0, 0, 0), (0, 0, -14.0))]))
    with pytest.raises(ValueError, match="the pose of L2, L3 is in the place of another vertebra"):
        pose_bones(labels, NAMES, poses, np.eye(4), grid)


@pytest.mark.parametrize("method", ["optimise", "network", "rigid"])
def test_other_methods_do_not_begin_from_poses(method):
    weights = {"weights": "weights.safetensors"} if method == "network" else {}
    with pytest.raises(ValueError, match=f"poses with method='{method}': expected method='polyrigid'"):
        register(**FILES, **weights, method=method, poses={"L3": rigid()})
