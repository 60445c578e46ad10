"Every vertebra searched for itself, and the map that is built on them."

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from spinereg import register
from spinereg.files.pairs import read_pair
from spinereg.losses.similarity import LNCC
from spinereg.registration.bones_first import bones_first, find_bones
from spinereg.registration.poses import find_poses, joint_cost, make_side, sides_of
from spinereg.registration.prealign import rigid_start, searchable
from spinereg.registration.scene import make_scene, working_grid
from spinereg.registration.search import motion_about
from spinereg.space.fields import warp
from spinereg.space.geometry import Grid, crop_grid, transform_points
from spinereg.space.images import label_centres_mm
from spinereg.space.polyrigid import Polyrigid, distance_map, flow_on
from spinereg.space.rigid import rotation_angle_deg

SAMPLES = Path(__file__).parent.parent / "data_samples/test"


@pytest.fixture(scope="module")
def pair():
    folder = SAMPLES / "clinical_0"
    return read_pair(folder / "mr_t1.nii.gz", folder / "ct.nii.gz", folder / "ct_mask.nii.gz")


@pytest.fixture(scope="module")
def start(pair):
    "The rigid start of that pair."
    return rigid_start(pair, "search").rigid


@pytest.fixture(scope="module")
def easy():
    "A pair whose bones are nearly in place, and its rigid start."
    pair = read_pair(*(SAMPLES / "easy_0" / name for name in ("mr_t1.nii.gz", "ct.nii.gz", "ct_mask.nii.gz")))
    return pair, rigid_start(pair).rigid


def errors(pair, poses, truth):
    "Mean distance of each vertebra's bone from its true place, mm, and the angle, degrees."
    found = []
    for k, (pose, true) in enumerate(zip(poses, truth), start=1):
        y = transform_points(pair.moving.grid.affine, (pair.moving_labels.data == k).nonzero().double())
        x = transform_points(np.linalg.inv(true), y)
        angle = rotation_angle_deg((pose @ torch.from_numpy(np.linalg.inv(true)))[:3, :3])
        found.append(((transform_points(pose.numpy(), x) - y).norm(dim=1).mean().item(), float(angle)))
    return np.array(found)


def images(pair):
    return sides_of(pair, torch.device("cpu"))


def test_every_vertebra_of_the_sample_is_found_to_a_fraction_of_a_millimetre(pair, start):
    """C7: oblique thick slices; the true motions are those that the case was made with."""
    names = pair.moving_labels.names
    truth = {row["name"]: np.array(row["matrix"]) for row in json.loads((SAMPLES / "clinical_0/truth.json").read_text())["vertebrae"]}
    found = find_poses(*images(pair), pair.moving_labels.data, len(names), start)
    whole = found.share.numpy() > 0.9
    rigid, true = torch.from_numpy(start).expand(len(names), 4, 4), [truth[name] for name in names]
    before, now = (errors(pair, poses, true)[whole] for poses in (rigid, found.poses))
    assert whole.sum() >= 4 and before[:, 0].mean() > 1.5
    assert now[:, 0].max() < 0.25 and now[:, 0].mean() < 0.15 and now[:, 1].max() < 0.6


def test_joints_that_turned_by_twelve_degrees_each_are_followed_along_the_spine(pair):
    """The CT itself, bent by an exact polyrigid map whose end vertebrae are centimetres from where any rigid motion puts them."""
    labels, grid, n = pair.moving_labels.data, pair.moving.grid, 4
    names = pair.moving_labels.names[1 : n + 1]
    labels = torch.where((labels >= 2) & (labels <= n + 1), labels - 1, 0)
    centres = label_centres_mm(labels, grid, n)
    poses = [np.eye(4)]
    for upper, lower in zip(centres, centres[1:]):
        turn, joint = np.eye(4), (upper + lower) / 2
        turn[:3, :3] = Rotation.from_rotvec(np.deg2rad([12.0, 2.0, 0.0])).as_matrix()
        turn[:3, 3] = joint - turn[:3, :3] @ joint
        poses.append(turn @ poses[-1])
    maps = tuple(distance_map(labels == k, grid) for k in range(1, n + 1))
    bent = Polyrigid(maps, torch.from_numpy(np.stack(poses)), torch.from_numpy(poses[1]))
    moving = searchable(pair.moving, "ct")
    fixed = warp(moving[None, None], grid, grid, flow_on(bent, grid), poses[1])[0, 0]
    found = find_poses(make_side(fixed, grid, "ct"), make_side(moving, grid, "ct"), labels, n, poses[1])
    there = pair._replace(moving_labels=replace(pair.moving_labels, data=labels, names=names))
    off = errors(there, found.poses, poses)[found.share.numpy() > 0.95]
    assert len(off) >= 3 and errors(there, torch.from_numpy(poses[1]).expand(n, 4, 4), poses)[:, 0].max() > 8
    assert off[:, 0].max() < 0.4 and np.median(off[:, 1]) < 0.2


def test_poses_turn_with_the_world(pair, start):
    turn = np.eye(4)
    turn[:3, :3], turn[:3, 3] = Rotation.from_rotvec([0.2, -0.3, 0.25]).as_matrix(), [30, -20, 10]
    labels, (fixed, moving), keep = pair.moving_labels.data, images(pair), 3  # whole vertebrae
    labels = torch.where((labels >= 3) & (labels < 3 + keep), labels - 2, 0)
    here = find_poses(fixed, moving, labels, keep, start).poses
    turned = [side._replace(grid=Grid(side.grid.shape, turn @ side.grid.affine)) for side in (fixed, moving)]
    there = find_poses(*turned, labels, keep, turn @ start @ np.linalg.inv(turn)).poses
    assert (torch.from_numpy(np.linalg.inv(turn)) @ there @ torch.from_numpy(turn) - here).abs()[:, :3, :3].max() < 5e-3


def test_what_a_joint_costs_does_not_depend_on_where_both_went():
    generator = torch.Generator().manual_seed(0)
    joint, D = torch.tensor([[5.0, -60, 20]]).double(), motion_about(torch.tensor([[0.03, -0.02, 0.01, 1, 2, -1]]).double(), torch.zeros(3).double())
    costs = [joint_cost(M, M @ D, joint) for M in motion_about(torch.randn(5, 6, generator=generator).double(), torch.zeros(3).double())[:, None]]
    assert torch.allclose(torch.cat(costs), joint_cost(torch.eye(4)[None].double(), D, joint).expand(5))


def test_b5_c7_a_map_with_bones_first_is_rigid_in_them_and_needs_labels(tmp_path):
    folder = SAMPLES / "easy_0"
    files = {"fixed": folder / "mr_t1.nii.gz", "moving": folder / "ct.nii.gz", "landmarks": folder / "landmarks.csv"}
    quick = {"method": "polyrigid", "spacing_mm": 2.0, "levels": (2,), "steps": (20,), "device": "cpu"}
    with pytest.raises(ValueError, match="expected moving_labels"):
        register(**files, **quick)
    with pytest.raises(ValueError, match="weight_oc with method=.polyrigid.: bone is rigid without them"):
        register(**files, **quick, moving_labels=folder / "ct_mask.nii.gz", weight_oc=1.0)
    result = register(**files, **quick | {"method": "auto"}, moving_labels=folder / "ct_mask.nii.gz", out_dir=tmp_path)
    bone = next(gain for gain in result.metrics.landmarks if gain.now.group == "bone")
    assert bone.now.mean_mm < 0.25 < 1 < bone.prealigned_mean_mm
    assert result.vertebrae.residual_max_mm.max() < 1e-3 and result.metrics.field.n_folds == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["prealign"]["confidence"] > 1


def test_a_vertebra_out_of_view_is_told_and_one_barely_in_view_rides_rigidly_with_its_neighbour(easy):
    """The MR without its lower half: the bone at the cut is held as exactly as the others, after the motion of the one above it."""
    pair, rigid = easy
    grid = pair.fixed.grid
    part = crop_grid(grid, [0, 0, 72], grid.shape)
    pair = pair._replace(fixed=replace(pair.fixed, data=pair.fixed.data[:, :, 72:], grid=part))
    scene = make_scene(pair, rigid, torch.device("cpu"))
    found = bones_first(pair, scene, working_grid(scene, 3.0), LNCC(), levels=(2.0,), steps=(5,))
    names, poses, riding, unseen = found.bones
    assert riding and unseen and set(riding) < set(names) and not set(unseen) & set(names)
    for name in riding:
        k = names.index(name)
        assert found.bones.poses.share[k] < 0.1 and torch.equal(poses.poses[k], poses.poses[k - 1])
        y = transform_points(scene.labels.grid.affine, (scene.labels.data == scene.labels.names.index(name) + 1).nonzero()[::7].double())
        off = (transform_points(poses.poses[k].numpy(), found.transform.inverse_points(y)) - y).norm(dim=1)
        assert off.quantile(0.98) < 1e-4
    given = find_bones(pair, scene, {riding[0]: rigid})
    assert np.abs(given.poses.poses[given.names.index(riding[0])].numpy() - rigid).max() < 1e-4 and riding[0] not in given.riding
    told = " ".join(notice.text for notice in found.notices)
    assert f"going with their neighbours: {', '.join(riding)}" in told and f"out of the fixed image: {', '.join(unseen)}" in told


def test_one_vertebra_alone_is_found(easy):
    """Labels of one vertebra only: it has no neighbour, and no joint."""
    pair, start = easy
    alone = replace(pair.moving_labels, data=(pair.moving_labels.data == 4).to(pair.moving_labels.data), names=("L2",), values=(21,))
    truth = {row["name"]: np.array(row["matrix"]) for row in json.loads((SAMPLES / "easy_0/truth.json").read_text())["vertebrae"]}
    bones = find_bones(pair._replace(moving_labels=alone), make_scene(pair._replace(moving_labels=alone), start, torch.device("cpu")))
    (off,) = errors(pair._replace(moving_labels=alone), bones.poses.poses, [truth["L2"]])
    assert bones.names == ("L2",) and off[0] < 0.3 and off[1] < 1
