"The motion of every vertebra: angles and discs against closed forms, poses that a hand gave, and the widget around them."

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

import spinereg
from spinereg.interactive.motion import LiveMotion, VertebraMotion, keep_outlines, middle_voxel
from spinereg.interactive.spine import (
    Bone,
    Edit,
    Placed,
    body_of,
    check_edit,
    cut_bone,
    disc_height_mm,
    make_spine,
    motion_by_hand,
    own_motion,
    place,
    spine_of,
)
from spinereg.interactive.stack import vertebrae_at
from spinereg.interactive.viewers import PLANES
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
    below = body_of(lower).centre_mm
    above, normal = there[:3, :3] @ below + there[:3, 3], there[:3, 2]
    middle, along = (above + below) / 2, Rotation.from_euler("x", -deg / 2, degrees=True).apply([0, 0, 1])
    known = (face - middle) @ normal / (along @ normal) - (top[2] - middle[2]) / along[2]
    axes = np.stack([there[:3, :3], np.eye(3)])
    found = disc_height_mm((lower, lower), np.stack([np.linalg.inv(there), np.eye(4)]), np.stack([above, below]), axes, 10.0)
    assert found == pytest.approx(known, abs=0.05)


@pytest.mark.parametrize("down_mm", [0, 10, 20, 25, 30, 35, 60])
def test_a_disc_is_as_low_as_the_upper_block_is_pushed_into_and_beyond_the_lower_one(down_mm):
    """Blocks 25 mm high, 10 mm apart, so 35 mm from centre to centre: every mm down is a mm less, also where the centres meet and beyond."""
    grid = Grid((60, 60, 80), np.diag([1.0, 1.0, 1.0, 1.0]))
    bones = tuple(block((10, 10, low), (50, 50, low + 25), grid) for low in (40, 5))
    spine = make_spine(("L1", "L2"), bones, np.eye(4), np.stack([np.eye(4)] * 2))
    table = place(spine, {"L1": Edit("L1", shift_mm=(0, 0, -down_mm))}).table
    assert table.disc_before_mm["L1"] == pytest.approx(10, abs=1e-4) and table.disc_now_mm["L1"] == pytest.approx(10 - down_mm, abs=1e-4)


@pytest.mark.parametrize("turn_deg", [(180, 0, 0), (0, 180, 0), (90, 0, 0)])
def test_a_disc_beside_a_vertebra_on_its_head_is_no_error(turn_deg):
    grid = Grid((60, 60, 80), np.eye(4))
    bones = tuple(block((10, 10, low), (50, 50, low + 25), grid) for low in (40, 5))
    spine = make_spine(("L1", "L2"), bones, np.eye(4), np.stack([np.eye(4)] * 2))
    assert np.isfinite(place(spine, {"L1": Edit("L1", turn_deg)}).table.disc_now_mm["L1"])


@pytest.mark.parametrize(
    ("names", "measured"),
    [
        (("L1", "L2", "L3"), (True, True)),
        (("L1", "L3", "L4"), (False, True)),
        (("C1", "C2", "C3"), (False, True)),
        (("T12", "T13", "L1"), (True, True)),
        (("T12", "L1", "L2"), (True, True)),
        (("L5", "L6", "S"), (True, True)),
        (("L4", "L5", "S"), (True, True)),
        (("L3", "L4", "S"), (True, False)),
    ],
)
def test_a_disc_lies_between_neighbours_only(names, measured):
    grid = Grid((40, 40, 120), np.eye(4))
    bones = tuple(block((5, 5, low), (35, 35, low + 25), grid) for low in (75, 40, 5))
    spine = make_spine(names, bones, np.eye(4), np.stack([np.eye(4)] * 3))
    assert [np.isfinite(mm) for mm in spine.heights_mm(spine.found)] == [*measured, False]


def test_the_disc_of_a_small_vertebra_is_measured_within_its_body():
    """Two bodies of a neck, 13 mm high, 4 mm apart, with lips 6 mm high at either side of the lower one; the mean is of what lies between."""
    grid = Grid((40, 40, 50), np.eye(4))
    body = torch.cartesian_prod(torch.arange(10, 30), torch.arange(12, 27), torch.arange(5, 18))
    lips = [torch.cartesian_prod(torch.arange(x, x + 3), torch.arange(12, 27), torch.arange(18, 24)) for x in (10, 27)]
    bones = cut_bone(body + torch.tensor([0, 0, 17]), grid), cut_bone(torch.cat([body, *lips]), grid)
    spine = make_spine(("C4", "C5"), bones, np.eye(4), np.stack([np.eye(4)] * 2))
    assert spine.heights_mm(spine.found)[0] == pytest.approx(4, abs=0.1)


def test_a_disc_beside_a_bone_that_is_cut_or_out_of_reach_has_no_height():
    grid = Grid((40, 40, 60), np.eye(4))
    one, other, cut = block((5, 5, 35), (35, 35, 55), grid), block((5, 5, 5), (35, 35, 25), grid), block((5, 5, 0), (35, 35, 25), grid)
    poses, centres, axes = np.stack([np.eye(4)] * 2), np.stack([body_of(bone).centre_mm for bone in (one, other)]), np.stack([np.eye(3)] * 2)
    assert disc_height_mm((one, other), poses, centres, axes, 10.0) == pytest.approx(10, abs=0.1)
    assert cut.cut and np.isnan(disc_height_mm((one, cut), poses, centres, axes, 10.0))
    assert np.isnan(disc_height_mm((one, other), poses, centres + 100, axes, 10.0))


@pytest.fixture(scope="module")
def result(shared):
    "The sample, its vertebrae searched for, its tissue hardly; made by the first of several workers, and read by the others."
    folder = shared / "moved_vertebrae"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            return spinereg.register(**FILES, prealign="header", spacing_mm=4.0, levels=(1,), steps=(1,), out_dir=folder)
        return spinereg.load(folder)


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
        shift = row[["right_mm", "anterior_mm", "superior_mm"]].to_numpy()
        if spine.bones[spine.names.index(name)].cut:
            assert np.isnan(shift).all(), "the centre of its body is not known"
        else:
            np.testing.assert_allclose(axes @ shift, after - before, atol=1e-6)
    still = Placed(spine, spine.before)
    assert np.nanmax(np.abs(still.table.iloc[:, :6].to_numpy())) < 1e-6 and still.table.disc_before_mm.equals(still.table.disc_now_mm)


def test_the_table_of_the_result_tells_the_way_back(result):
    """Same names, opposite sign: `aligned_*` leads from the MR to the CT."""
    table, back = VertebraMotion(result).placed.table, result.vertebrae
    moved = table.index[(table.flexion_deg.abs() > 2) & table.superior_mm.notna()]
    assert len(moved) >= 3
    np.testing.assert_allclose(table.flexion_deg[moved], -back.aligned_flexion_deg[moved], atol=0.5)
    np.testing.assert_allclose(table.superior_mm[moved], -back.aligned_superior_mm[moved], atol=2)


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
    """L3 of a result lies 15 mm too low, and stays there when `register` begins there; lifted by 13 mm, it is within 1 mm of where it is."""
    spine = spine_of(result)
    astray = place(spine, {"L3": Edit("L3", shift_mm=(0, 0, -15))}).poses[spine.names.index("L3")]
    spoiled = replace(result, metrics=replace(result.metrics, motions=result.metrics.motions | {"L3": astray}))
    viewer = VertebraMotion(spoiled)
    assert viewer.placed.table.disc_now_mm["L3"] < 0
    viewer.move("L3", shift_mm=(0, 0, 13))
    values, affine = (image := nib.load(FILES["moving_labels"])).get_fdata(), image.affine
    few = FILES | {"moving_labels": (np.where((values == 22) | (values == 23), values, 0).astype(np.int16), affine)}  # L3 and L4
    begin = {"left there": {"L3": astray}, "by hand": viewer.poses}
    ended = {way: spinereg.register(**few, prealign="header", spacing_mm=4.0, levels=(1,), steps=(1,), poses=poses) for way, poses in begin.items()}
    there = centre(spine, "L3", result.metrics.motions["L3"])
    off_mm = {way: np.linalg.norm(centre(spine, "L3", one.metrics.motions["L3"]) - there) for way, one in ended.items()}
    assert off_mm["left there"] > 10 and off_mm["by hand"] < 1
    again = VertebraMotion(ended["by hand"])
    again.move("L4", shift_mm=(0, 0, 1))
    assert list(again.poses) == ["L3", "L4"], "what was repaired before is handed on as well"
    np.testing.assert_allclose(again.poses["L3"], ended["by hand"].metrics.motions["L3"], atol=1e-9)


def test_what_cannot_be_done_is_refused_with_what_can(result, viewer):
    with pytest.raises(ValueError, match=r"there is no vertebra 'C1' to move: expected one of T11, T12, L1"):
        viewer.move("C1")
    for wrong in ((1, 2), (0, 0, np.nan), ("a", 0, 0), None, ((1, 2), 3, 4)):
        with pytest.raises(ValueError, match=r"shift_mm=.*expected three numbers, such as \(0, 0, 10\)"):
            check_edit(("L3",), Edit("L3", shift_mm=wrong))
    assert viewer.poses == {}
    bare = replace(result, pair=result.pair._replace(moving_labels=None))
    with pytest.raises(ValueError, match=r"rigidity is off; expected a result of register\(..., moving_labels=...\)"):
        VertebraMotion(bare)
    with pytest.raises(ValueError, match="no vertebra is in view; expected"):
        VertebraMotion(replace(result, metrics=replace(result.metrics, motions={})))


def test_every_slider_moves_the_chosen_vertebra_alone(viewer):
    viewer.jump("L2")
    for n, control in enumerate(viewer.editing.controls[1:]):
        shown, said, slider = viewer.image.value, viewer.figures.value, control.widget
        slider.value = 6.0
        assert viewer.image.value != shown and viewer.figures.value != said and list(viewer.poses) == ["L2"]
        edit = viewer.edits["L2"]
        assert (edit.turn_deg + edit.shift_mm)[n] == 6 and sum(edit.turn_deg + edit.shift_mm) == 6
        assert slider.tooltip and slider.description
        slider.value = 0.0
        assert viewer.poses == {}


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


def press(viewer, *keys):
    for key in keys:
        viewer.events.add({"type": "keydown", "key": key})
    viewer.events.wait()


def test_keys_choose_the_next_vertebra_and_go_to_where_it_is_now_and_the_wheel_does_not(viewer):
    """L2 is moved by 34 mm, onto L3; from L1 the key n leads to L2 there, and again to L3."""
    viewer.move("L2", shift_mm=(0, 0, -34))
    viewer.jump("L1")
    for key, name in (("n", "L2"), ("n", "L3"), ("p", "L2"), ("p", "L1")):
        press(viewer, key)
        assert viewer.placed.chosen == name and viewer.view.at == middle_voxel(viewer.placed, name, viewer.stack.grid)
    press(viewer, *"nn")
    assert viewer.placed.chosen == "L3"
    viewer.change(planes="axial")
    press(viewer, *["ArrowUp"] * 40)
    assert viewer.placed.chosen == "L3" and viewer.placed.at(viewer.stack.grid.affine[:3] @ [*viewer.view.at, 1]) != "L3"


@pytest.mark.parametrize("beside", [(), ("L2", "L4")])
def test_the_moved_image_follows_a_hand_in_every_plane(result, beside):
    """Along the body of L3, up and turned, slices of all three planes show what SciPy reads of the CT; with neighbours on each other's places too."""
    viewer, ct = LiveMotion(result, show="moved"), result.pair.moving
    grid, before = viewer.stack.grid, viewer.stack
    for name, up_mm in (("L3", 12), *((name, 33) for name in beside)):  # 33 mm up, L4 is where L3 was
        viewer.move(name, (10, 0, 5) if name == "L3" else (0, 0, 0), (2, 0, up_mm))
    k = viewer.placed.spine.names.index(beside[-1] if beside else "L3")
    name, (centres, axes), shown = viewer.placed.spine.names[k], viewer.placed.spine.seen(viewer.placed.poses), viewer.stack.images["moved"]
    line = centres[k] + np.arange(-6, 7)[:, None] * axes[k, :, 0]
    voxels = np.linalg.solve(grid.affine[:3, :3], (line - grid.affine[:3, 3]).T).T.round().astype(int)
    there = (np.linalg.inv(ct.grid.affine) @ viewer.poses[name] @ grid.affine @ np.c_[voxels, np.ones(len(voxels))].T)[:3]
    hu = map_coordinates(ct.data.numpy(), there, order=1)
    for axis in range(3):
        read = [float(shown.select(axis, int(at[axis]))[tuple(np.delete(at, axis))]) for at in voxels]
        np.testing.assert_allclose(read, hu, atol=0.5)
    assert np.abs(hu - [float(before.images["moved"][tuple(at.tolist())]) for at in voxels]).max() > 20, "another place of the CT than before"
    assert vertebrae_at(viewer.stack, tuple(voxels[6].tolist()))["moved"] == name


def test_where_a_vertebra_was_it_is_dark_without_a_name_until_it_is_put_back(result):
    viewer = LiveMotion(result, show="moved")
    k, before = viewer.placed.spine.names.index("L3"), viewer.stack
    at = middle_voxel(viewer.placed, "L3", before.grid)
    viewer.move("L3", shift_mm=(0, 0, 30))
    dark = [float(viewer.stack.images["moved"].select(axis, at[axis])[tuple(np.delete(at, axis))]) for axis in range(3)]
    assert dark == [float(result.pair.moving.data.min())] * 3 and "moved" not in vertebrae_at(viewer.stack, at)
    assert viewer.placed.spine.names[k] not in viewer.stack.vertebrae.index
    viewer.move("L3")
    assert viewer.stack.images["moved"] is before.images["moved"] and viewer.stack.labels["moved"] is before.labels["moved"]
    assert viewer.stack.vertebrae.equals(before.vertebrae)


def test_a_jump_draws_once_and_the_words_tell_of_the_crosshair(viewer, monkeypatch):
    drawn, chosen, png = [], [], viewer.live.png
    monkeypatch.setattr(viewer.live, "png", lambda: drawn.append(1) or png())
    viewer.editing.controls[0].widget.observe(lambda change: chosen.append(change["new"]), "value")
    viewer.jump("L4")
    assert len(drawn) == 1 and chosen == ["L4"]
    assert f"voxel {', '.join(map(str, viewer.view.at))}" in viewer.words.value and "fixed" in viewer.words.value


def test_a_slider_reaches_as_far_as_a_program_moved(viewer):
    slider = viewer.editing.controls[6].widget
    viewer.move("L3", (0, 0, -70), (0, 0, 60))
    assert slider.value == 60 and viewer.editing.controls[3].widget.value == -70
    slider.value = 59.5
    assert viewer.edits["L3"] == Edit("L3", (0, 0, -70), (0, 0, 59.5))
    viewer.move("L3")
    assert (slider.min, slider.value, slider.max) == (-40, 0, 40)


def test_slices_alone_follow_a_program_too(result):
    slices = LiveMotion(result, "sagittal")
    slices.box  # noqa: B018  as a notebook would ask for it
    shown = slices.image.value
    slices.move("L3", shift_mm=(0, 0, 10))
    moved = slices.image.value
    slices.move("L3")
    assert shown != moved != slices.image.value


def test_the_menu_of_places_gives_way_to_that_of_the_hand(viewer):
    said = [widget.description for widget in viewer.box.children[0].children]
    assert "vertebra" not in said and {"show", "fade"} <= set(said)


def test_the_stored_table_lies_within_the_figure_below_the_slices(viewer):
    for planes in PLANES:
        viewer.change(planes=planes)
        picture = viewer.picture()
        picture.canvas.draw()
        table, slices = picture.words.get_window_extent(), [panel.ax.get_window_extent() for panel in picture.panels]
        assert table.x0 > 0 and table.y0 > 0 and table.x1 < picture.bbox.x1 and table.y1 < min(each.y0 for each in slices), planes


def test_a_picture_that_is_gone_keeps_no_bone():
    grid = Grid((40, 40, 60), np.eye(4))
    spine = make_spine(("L3",), (block((5, 5, 5), (35, 35, 25), grid),), np.eye(4), np.eye(4)[None])
    gone, kept, where = weakref.ref(spine.bones[0]), keep_outlines(), (grid, PLANES["sagittal"][0], 20)
    assert kept(spine.bones[0], spine.found[0], *where) is kept(spine.bones[0], spine.found[0], *where)
    del spine, kept
    gc.collect()
    assert gone() is None


def test_arrows_of_small_motions_are_enlarged_and_the_title_says_so(viewer):
    """A vertebra that is cut has no arrow, and a long way of it shortens no other."""
    viewer.placed = Placed(viewer.placed.spine, viewer.placed.spine.before, chosen="L3")
    viewer.refresh()
    assert viewer.live.panels[0].ax.title.get_text() == "sagittal, arrows x10"
    poses = viewer.placed.poses.copy()
    poses[0, 2, 3] -= 20
    viewer.placed = replace(viewer.placed, poses=poses)
    viewer.refresh()
    assert viewer.placed.spine.bones[0].cut and viewer.live.panels[0].ax.title.get_text() == "sagittal, arrows x10"
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
