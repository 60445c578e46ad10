"How sure each vertebra is, and what is doubted."

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from spinereg.files.pairs import read_pair
from spinereg.registration.certainty import certainty, far_joints, joint_information, judge_bones
from spinereg.registration.poses import JOINT_DEG, joint_cost, sides_of
from spinereg.registration.search import motion_about
from spinereg.space.geometry import Grid

FOLDER = Path(__file__).parent.parent / "data_samples/test/easy_0"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair():
    return read_pair(*(FOLDER / f"{name}.nii.gz" for name in ("mr_t1", "ct", "ct_mask")))


@pytest.fixture(scope="module")
def truth():
    return {row["name"]: np.array(row["matrix"]) for row in json.loads((FOLDER / "truth.json").read_text())["vertebrae"]}


def moved(pose, twist, pair, name):
    "A pose after a turn (degrees) about its vertebra's centre, and a shift (mm), in the moving world."
    place = (pair.moving_labels.data == pair.moving_labels.names.index(name) + 1).nonzero().double().mean(0).numpy()
    centre = pair.moving.grid.affine[:3, :3] @ place + pair.moving.grid.affine[:3, 3]
    twist = torch.tensor([*np.deg2rad(twist[:3]), *twist[3:]]).double()
    return motion_about(twist[None], torch.from_numpy(centre))[0].numpy() @ pose


def test_what_the_joints_say_is_the_curvature_of_what_they_cost():
    """Against autograd, in float64, of the cost of two joints around a vertebra; at rest, where it has its curvature."""
    joints = torch.tensor([[2.0, -8, 17], [1, -9, -18]]).double()

    def cost(twist):
        own = motion_about(twist[None], torch.zeros(3).double())[0]
        still = torch.eye(4).double()
        return joint_cost(still, own, joints[0]) + joint_cost(own, still, joints[1])

    curvature = torch.autograd.functional.hessian(cost, torch.full((6,), 1e-6).double())
    said = joint_information(joints[None], torch.ones(1, 2).double())[0]
    assert torch.allclose(said, curvature, rtol=1e-3, atol=1e-3)
    assert said[0, 0] > 2 / np.deg2rad(JOINT_DEG) ** 2


def test_how_far_joints_turned_is_scipys_angle():
    rng = np.random.default_rng(0)
    poses = np.tile(np.eye(4), (4, 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = Rotation.random(4, rng).as_matrix(), rng.normal(size=(4, 3))
    found = far_joints(torch.from_numpy(poses), torch.zeros(3, 3).double())
    turns = Rotation.from_matrix(poses[:-1, :3, :3]) * Rotation.from_matrix(poses[1:, :3, :3]).inv()
    assert np.allclose([turn for turn, _ in found], np.rad2deg(turns.magnitude()), atol=1e-6)


def test_what_is_said_turns_with_the_world(pair, truth):
    """A covariance in the axes of the fixed world: the same one in turned axes."""
    labels, names = pair.moving_labels.data, pair.moving_labels.names
    sides = sides_of(pair, CPU)
    poses, numbers = torch.from_numpy(np.stack([truth[name] for name in names[2:5]])), range(3, 6)
    turn = np.eye(4)
    turn[:3, :3], turn[:3, 3] = Rotation.from_rotvec([0.4, -0.3, 0.6]).as_matrix(), [30, -20, 10]
    here = certainty(*sides, labels, numbers, poses)
    fixed = sides[0]._replace(grid=Grid(sides[0].grid.shape, turn @ sides[0].grid.affine))
    there = certainty(fixed, sides[1], labels, numbers, poses @ torch.from_numpy(np.linalg.inv(turn)))
    R = torch.block_diag(*[torch.from_numpy(turn[:3, :3])] * 2)
    assert torch.allclose(R @ here.covariance @ R.T, there.covariance, rtol=0.1, atol=0.02)
    assert torch.allclose(here.error_mm, there.error_mm, rtol=0.05) and torch.allclose(here.error_deg, there.error_deg, rtol=0.1)


def test_a_vertebra_that_is_five_millimetres_off_is_doubted_and_true_ones_are_not(pair, truth):
    """C13: each of four inner vertebrae in turn, 5 mm off along one axis: it is doubted; and there is no doubt where all are right."""
    whole = ("T12", "L1", "L2", "L3", "L4", "L5")
    motions = {name: truth[name] for name in whole}
    assert (judge_bones(pair, motions, CPU).table.doubt == "").all()
    for name, shift in zip(whole[1:5], ([5.0, 0, 0], [0, -5.0, 0], [0, 0, 5.0], [-5.0, 0, 0])):
        table = judge_bones(pair, motions | {name: moved(truth[name], [0, 0, 0, *shift], pair, name)}, CPU).table
        assert table.doubt[name], (name, shift, table.loc[name].to_dict())


def test_a_spine_that_is_one_level_off_is_doubted_in_most_of_its_vertebrae(pair, truth):
    motions = {name: moved(truth[name], [0, 0, 0, 0, 0, 34.0], pair, name) for name in ("L1", "L2", "L3", "L4")}
    assert (judge_bones(pair, motions, CPU).table.doubt != "").mean() > 0.5
