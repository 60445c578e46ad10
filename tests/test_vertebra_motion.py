"The motion of every vertebra: angles and discs against closed forms, poses that a hand gave, and the widget around them."

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

import spinereg
from spinereg.interactive.motion import Edit, VertebraMotion, place
from spinereg.interactive.spine import (
    Bone,
    Placed,
    body_centre_mm,
    cut_bone,
    disc_height_mm,
    make_spine,
    motion_by_hand,
    own_motion,
    spine_of,
)
from spinereg.space.geometry import Grid

CASE = Path(__file__).parent.parent / "data_samples/test/easy_0"
FILES = {"fixed": CASE / "mr_t1.nii.gz", "moving": CASE / "ct.nii.gz", "moving_labels": CASE / "ct_mask.nii.gz"}
OBLIQUE = Rotation.from_euler("xyz", [12, -8, 17], degrees=True).as_matrix()
three = st.tuples(*[st.floats(-40, 40)] * 3)


@given(three, three)
def test_angles_are_those_of_scipy_about_the_vertebras_own_axes(turn_deg, shift_mm):
    """Flexion about left (the front goes down), then lateral bend about the turned front, then axial rotation about the turned up."""
    centre = np.array([10.0, -20, 30])
    made = motion_by_hand(turn_deg, shift_mm, centre, OBLIQUE)
    flexion, bend, rotation = turn_deg
    turns = (Rotation.from_rotvec(deg * axis, degrees=True) for deg, axis in zip((-flexion, bend, rotation), np.eye(3)))
    own = Rotation.from_matrix(OBLIQUE.T @ made[:3, :3] @ OBLIQUE)
    assert (own.inv() * np.prod(list(turns))).magnitude() < 1e-9
    np.testing.assert_allclose(own_motion(made, centre, OBLIQUE), [*turn_deg, *shift_mm], atol=1e-6)


def block(low, high, grid):
    return cut_bone(torch.cartesian_prod(*(torch.arange(a, b) for a, b in zip(low, high))), grid)


@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (0.8, 0.5, 2)])
@pytest.mark.parametrize("deg", [0, 4, -10, 15])
@pytest.mark.parametrize("gap_mm", [8.0, -2.0])
def test_a_disc_between_two_blocks_is_as_high_as_it_is(spacing_mm, deg, gap_mm):
    """Of two blocks, 8 mm apart or 2 mm in one another, the upper one is tilted about its lower face; the mean is what the middle ray meets."""
    grid = Grid((60, 90, 50), np.diag([*spacing_mm, 1.0]))
    lower = block((10, 20, 5), (50, 70, 15), grid)
    lift = np.eye(4)
    lift[2, 3] = 10 * spacing_mm[2] + gap_mm
    top, bottom = (np.array([30, 45, k]) * spacing_mm - np.array(spacing_mm) / 2 for k in (15, 5))
    face = bottom + lift[:3, 3]
    there = motion_by_hand((deg, 0, 0), (0, 0, 0), face, np.eye(3)) @ lift
    below = body_centre_mm(lower)
    above = there[:3, :3] @ below + there[:3, 3]
    along, normal = (below - above) / np.linalg.norm(below - above), there[:3, 2]
    known = (top[2] - above[2]) / along[2] - (face - above) @ normal / (along @ normal)
    found = disc_height_mm((lower, lower), np.stack([np.linalg.inv(there), np.eye(4)]), np.stack([above, below]))
    assert found == pytest.approx(known, abs=0.05)


def test_a_disc_beside_a_bone_that_is_cut_or_out_of_reach_has_no_height():
    grid = Grid((40, 40, 60), np.eye(4))
    one, other, cut = block((5, 5, 35), (35, 35, 55), grid), block((5, 5, 5), (35, 35, 25), grid), block((5, 5, 0), (35, 35, 25), grid)
    poses, centres = np.stack([np.eye(4)] * 2), np.stack([body_centre_mm(one), body_centre_mm(other)])
    assert disc_height_mm((one, other), poses, centres) == pytest.approx(10, abs=0.1)
    assert cut.cut and np.isnan(disc_height_mm((one, cut), poses, centres)) and np.isnan(disc_height_mm((one, other), poses, centres + 100))


@pytest.fixture(scope="module")
def result():
    "The sample, its vertebrae searched for, its tissue hardly."
    return spinereg.register(**FILES, prealign="header", spacing_mm=3.0, levels=(1,), steps=(3,))


@pytest.fixture
def viewer(result):
    viewer = VertebraMotion(result)
    viewer.box  # noqa: B018  as a notebook would ask for it
    return viewer


def centre(spine, name, pose):
    "Where the body of a vertebra is in the fixed image."
    return (np.linalg.inv(pose) @ [*spine.centres_mm[spine.names.index(name)], 1])[:3]


def test_before_and_after_are_where_the_pre_alignment_and_the_poses_say(result):
    spine = spine_of(result)
    placed = Placed(spine, spine.found)
    for name, row in placed.table.iterrows():
        before, after = centre(spine, name, result.start.rigid), centre(spine, name, result.metrics.motions[name])
        axes = result.start.rigid[:3, :3].T @ spine.axes[spine.names.index(name)]
        np.testing.assert_allclose(axes @ row[["right_mm", "front_mm", "up_mm"]].to_numpy(), after - before, atol=1e-6)
    still = Placed(spine, spine.before)
    assert np.abs(still.table.iloc[:, :6].to_numpy()).max() < 1e-6 and still.table.disc_before_mm.equals(still.table.disc_now_mm)


def test_undone_is_as_it_was(viewer):
    found, shown = viewer.placed.poses.copy(), viewer.image.value
    viewer.move("L3", (3, 4, 5), (6, 7, 8))
    viewer.move("L2", shift_mm=(0, 0, 1))
    assert list(viewer.poses) == ["L2", "L3"] and viewer.image.value != shown
    viewer.move("L3")
    viewer.move("L2", (0, 0, 0), (0, 0, 0))
    assert viewer.poses == {} and (viewer.placed.poses == found).all()


def test_up_in_the_mr_is_a_pose_that_reads_further_down(viewer):
    """A pose leads from the MR to the CT; so a vertebra that is moved up by 10 mm is one whose pose reads 10 mm lower."""
    spine = viewer.placed.spine
    k = spine.names.index("L3")
    viewer.move("L3", shift_mm=(0, 0, 10))
    up = np.linalg.inv(spine.found[k])[:3, :3] @ spine.axes[k][:, 2]
    step = centre(spine, "L3", viewer.poses["L3"]) - centre(spine, "L3", spine.found[k])
    np.testing.assert_allclose(step, 10 * up, atol=1e-9)
    assert up[2] > 0.9
    there = np.array([*centre(spine, "L3", spine.found[k]), 1])
    np.testing.assert_allclose((viewer.poses["L3"] @ there)[:3] - spine.centres_mm[k], -10 * spine.axes[k][:, 2], atol=1e-9)
    outline = spine.bones[k].share(there[None, :3] + step, viewer.poses["L3"])
    assert outline[0] == pytest.approx(spine.bones[k].share(there[None, :3], spine.found[k])[0], abs=1e-6)


def test_a_level_that_is_missed_is_repaired_by_hand(result):
    """L3 of a result lies 15 mm too low; lifted by 13 mm and given to `register`, it is within 1 mm of where it is."""
    spine = spine_of(result)
    astray = place(spine, {"L3": Edit("L3", shift_mm=(0, 0, -15))}).poses[spine.names.index("L3")]
    spoiled = replace(result, metrics=replace(result.metrics, motions=result.metrics.motions | {"L3": astray}))
    viewer = VertebraMotion(spoiled)
    assert viewer.placed.table.disc_now_mm["L3"] < 0
    viewer.move("L3", shift_mm=(0, 0, 13))
    repaired = spinereg.register(**FILES, prealign="header", spacing_mm=3.0, levels=(1,), steps=(3,), poses=viewer.poses)
    off = centre(spine, "L3", repaired.metrics.motions["L3"]) - centre(spine, "L3", result.metrics.motions["L3"])
    assert np.linalg.norm(off) < 1


def test_what_cannot_be_done_is_refused_with_what_can(result, viewer):
    with pytest.raises(ValueError, match=r"there is no vertebra 'C1' to move: expected one of T11, T12, L1"):
        viewer.move("C1")
    for wrong in ((1, 2), (0, 0, np.nan)):
        with pytest.raises(ValueError, match=r"shift_mm=.*expected three numbers, such as \(0, 0, 10\)"):
            viewer.move("L3", shift_mm=wrong)
    assert viewer.poses == {}
    bare = replace(result, pair=result.pair._replace(moving_labels=None))
    with pytest.raises(ValueError, match=r"rigidity is off; expected a result of register\(..., moving_labels=...\)"):
        VertebraMotion(bare)
    with pytest.raises(ValueError, match="no vertebra is in view; expected"):
        VertebraMotion(replace(result, metrics=replace(result.metrics, motions={})))


@pytest.mark.parametrize("n", range(1, 7))
def test_every_slider_moves_the_chosen_vertebra_alone(viewer, n):
    viewer.jump("L2")
    shown, said, slider = viewer.image.value, viewer.words.value, viewer.editing.controls[n].widget
    slider.value = 6.0
    assert viewer.image.value != shown and viewer.words.value != said and list(viewer.poses) == ["L2"]
    edit = viewer.edits["L2"]
    assert (edit.turn_deg + edit.shift_mm)[n - 1] == 6 and sum(edit.turn_deg + edit.shift_mm) == 6
    assert slider.tooltip and slider.description


def test_menu_and_button_follow(viewer):
    menu, *sliders = (control.widget for control in viewer.editing.controls)
    viewer.move("L3", (1, 2, 3), (4, 5, 6))
    assert menu.value == "L3" and [slider.value for slider in sliders] == [1, 2, 3, 4, 5, 6]
    menu.value = "L1"
    assert viewer.placed.chosen == "L1" and {slider.value for slider in sliders} == {0.0} and list(viewer.poses) == ["L3"]
    at = np.linalg.solve(viewer.stack.grid.affine, [*centre(viewer.placed.spine, "L1", viewer.placed.poses[menu.options.index("L1")]), 1])[:3]
    assert np.abs(at - viewer.view.at).max() <= 0.5
    menu.value = "L3"
    (back,) = [child for child in viewer.box.children[1].children[1].children[0].children[0].children if child.description == "put it back"]
    back.click()
    assert viewer.poses == {} and {slider.value for slider in sliders} == {0.0}


def test_a_key_that_goes_to_a_vertebra_chooses_it_and_the_wheel_does_not(viewer):
    viewer.jump("L2")
    viewer.events.add({"type": "keydown", "key": "n"})
    viewer.events.wait()
    assert viewer.placed.chosen == "L3"
    viewer.change(planes="axial")
    for _ in range(40):
        viewer.events.add({"type": "keydown", "key": "ArrowUp"})
    viewer.events.wait()
    assert viewer.placed.chosen == "L3" and viewer.placed.at(viewer.stack.grid.affine[:3] @ [*viewer.view.at, 1]) != "L3"


def test_arrows_of_small_motions_are_enlarged_and_the_title_says_so(viewer):
    viewer.placed = Placed(viewer.placed.spine, viewer.placed.spine.before, chosen="L3")
    viewer.refresh()
    assert viewer.live.panels[0].ax.title.get_text() == "sagittal, arrows x10"
    viewer.move("L3", shift_mm=(0, 0, 20))
    assert viewer.live.panels[0].ax.title.get_text() == "sagittal"


def test_a_spine_of_one_vertebra_and_one_that_is_cut_has_axes():
    grid = Grid((40, 40, 60), np.eye(4))
    for low in (0, 5):
        bone = block((5, 5, low), (35, 35, 25), grid)
        spine = make_spine(("L3",), (bone,), np.eye(4), np.eye(4)[None])
        assert isinstance(bone, Bone) and np.allclose(spine.axes, np.eye(3)) and np.isnan(Placed(spine, spine.found).table.disc_now_mm["L3"])


def test_a_click_that_meets_no_vertebra_changes_nothing(viewer):
    chosen = viewer.placed.chosen
    viewer.change(at=(0, 0, 0))
    viewer.follow([{"type": "click", "dataX": -1.0, "dataY": -1.0}])
    assert viewer.placed.chosen == chosen and viewer.placed.at(np.array([1e4, 0, 0])) == ""


def test_labels_on_a_grid_of_their_own_are_outlined_where_they_are(result):
    """A label map stored on a turned grid has its bones at the same places of the world."""
    pair = result.pair
    turn = np.eye(4)
    turn[:3, :3] = OBLIQUE
    labels = replace(pair.moving_labels, grid=Grid(pair.moving_labels.grid.shape, turn @ pair.moving_labels.grid.affine))
    motions = {name: turn @ pose for name, pose in result.metrics.motions.items()}
    metrics = replace(result.metrics, motions=motions, prealign=result.start._replace(rigid=turn @ result.start.rigid))
    other = spine_of(replace(result, pair=pair._replace(moving_labels=labels), metrics=metrics))
    spine = spine_of(result)
    np.testing.assert_allclose(Placed(other, other.found).table.to_numpy(), Placed(spine, spine.found).table.to_numpy(), atol=1e-4)
    np.testing.assert_allclose(other.seen(other.found)[0], spine.seen(spine.found)[0], atol=1e-6)
