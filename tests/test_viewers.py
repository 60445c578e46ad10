"Viewers: what is drawn is where it is in the world, on any grid; what stays in a notebook is a PNG."

import itertools
import re
import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import nbformat
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot
from PIL import Image
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from spinereg.files.pairs import read_pair
from spinereg.interactive.controls import Control, ControlPanel
from spinereg.interactive.slices import CT_WINDOWS_HU, SlicePicture, describe_point, describe_vertebra, first_view, showable
from spinereg.interactive.stack import Layer, Stack, label_centre, layers_on, pair_stack, result_stack
from spinereg.interactive.viewers import PLANES, SliceViewer, save_menu
from spinereg.registration.register import register
from spinereg.space.geometry import Grid

ROOT = Path(__file__).parent.parent
OBLIQUE = Rotation.from_euler("xyz", [12, -8, 17], degrees=True).as_matrix()


def pixels(png):
    return np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int)


def make_stack(spacing_mm=(4.0, 1.1, 0.7), axes=OBLIQUE, size_mm=88.0, **more):
    "A bright ball of 15 mm about a world point, labelled, on an oblique grid of thick slices."
    shape = tuple(int(size_mm / mm) for mm in spacing_mm)
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing_mm
    affine[:3, 3] = np.array([10.0, -20.0, 30.0]) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    grid = Grid(shape, affine)
    ball = (grid.points_mm(torch.zeros(1, dtype=torch.float64)) - torch.tensor([10.0, -20.0, 30.0])).norm(dim=-1) < 15
    images = layers_on(grid, {"fixed": ball.float() * 100, "moving": ball.float() * 1000})
    return Stack(grid, images, {"fixed": "mr", "moving": "ct"}, layers_on(grid, {"moving": ball.int()}), ("L1",), pd.DataFrame(), **more)


@pytest.mark.parametrize("plane", ["sagittal", "coronal", "axial"])
def test_a_ball_is_drawn_round_and_as_large_as_it_is(plane):
    """Physical aspect ratio: on an oblique grid of thick slices, a ball of 30 mm is a disc of 30 mm in every plane."""
    stack = make_stack()
    picture = SlicePicture(stack, first_view(stack, show="fixed", outlined=(), crosshair=False), PLANES[plane], words=False)
    picture.png()
    ax = picture.panels[0].ax
    mm = ax.bbox.width / abs(ax.get_xlim()[1] - ax.get_xlim()[0])
    top, bottom, left, right = (int(n) for n in (picture.bbox.height - ax.bbox.y1, picture.bbox.height - ax.bbox.y0, ax.bbox.x0, ax.bbox.x1))
    rows, columns = np.nonzero(pixels(picture.png())[top + 20 : bottom - 20, left + 20 : right - 20].min(-1) > 200)
    spacing = stack.grid.spacing_mm
    for found, axis in ((columns, PLANES[plane][0].across), (rows, PLANES[plane][0].up)):
        assert np.ptp(found) / mm == pytest.approx(30, abs=spacing[axis] + 1)


@pytest.mark.parametrize("plane", ["sagittal", "coronal", "axial"])
def test_the_letters_tell_the_truth_on_an_oblique_grid(plane):
    """A step in the picture towards the right-hand letter is a step in the world towards that side."""
    stack, way = make_stack(), {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    picture = SlicePicture(stack, first_view(stack), PLANES[plane], words=False)
    picture.png()
    box, panel = picture.panels[0].ax.bbox, picture.panels[0]
    middle = (box.x0 + box.x1) / 2, picture.bbox.height - (box.y0 + box.y1) / 2

    def world(dx, dy):
        place_mm = picture.place_at(middle[0] + dx, middle[1] + dy, picture.view)[1]
        return stack.grid.affine[:3] @ [*(place_mm / stack.grid.spacing_mm - 0.5), 1]

    shown = {text.get_text(): text.get_position() for text in panel.ax.texts if text.get_text() in way}
    assert set(shown) == set(panel.plane.letters)
    for letter, (x, y) in shown.items():
        towards = world(*(100 * np.sign(np.round([x - 0.5, 0.5 - y], 1)))) - world(0, 0)
        axis, sign = way[letter]
        assert towards[axis] * sign > 0 and abs(towards[axis]) == abs(towards).max()


def test_the_crosshair_names_its_place_its_values_and_its_vertebra():
    stack = make_stack()
    at = label_centre(stack, "L1")
    said = describe_point(stack, at)
    x, y, z = map(float, re.match(r"R (\S+)   A (\S+)   S (\S+) mm", said).groups())
    assert np.abs(np.array([x, y, z]) - [10, -20, 30]).max() < 2.1 and "fixed 100   moving 1000 HU" in said and "moving: L1" in said


def test_a_pair_is_shown_where_its_headers_put_it(tmp_path):
    """The moving image, stored in another order on another oblique grid, is drawn where it is in the world."""
    one, other = make_stack(), make_stack((1.5, 0.9, 2.0), axes=Rotation.from_euler("xyz", [-10, 5, 3], degrees=True).as_matrix(), size_mm=110.0)
    scans = [(layer.whole + torch.rand(layer.whole.shape)).numpy() for layer in (one.images["fixed"], other.images["moving"])]
    nib.save(nib.Nifti1Image(scans[0], one.grid.affine), tmp_path / "fixed.nii")
    turned = nib.Nifti1Image(scans[1], other.grid.affine).as_reoriented(nib.orientations.axcodes2ornt("IPR"))
    nib.save(turned, tmp_path / "moving.nii")
    stack = pair_stack(read_pair(tmp_path / "fixed.nii", tmp_path / "moving.nii", moving_modality="ct", fixed_modality="mr"))
    whole = {name: torch.stack([layer.select(0, i) for i in range(stack.grid.shape[0])]) for name, layer in stack.images.items()}
    both = [(whole[name] > half).float() for name, half in (("fixed", 50), ("moving", 500))]
    assert 2 * (both[0] * both[1]).sum() / (both[0].sum() + both[1].sum()) > 0.93


def test_a_vertebra_is_said_to_move_against_the_pre_alignment_and_its_neighbour():
    """Not by the headers, which may be 600 mm apart; the lowest has no neighbour below."""
    stack = make_stack()
    stack = replace(stack, labels=stack.labels | {"moved": stack.labels["moving"]})
    figures = {"distance_mm": 623.0, "angle_deg": 40.0, "aligned_distance_mm": 2.0, "aligned_angle_deg": 3.0, "residual_rms_mm": 0.0}
    figures |= {"relative_distance_mm": 0.7, "relative_angle_deg": 1.1, "volume_change_percent": 0.0}
    for below, against in (("L2", ", 0.7 mm and 1.1 degrees against L2"), (None, "")):
        told = replace(stack, vertebrae=pd.DataFrame(figures | {"relative_to": below}, index=["L1"]))
        said = describe_vertebra(told, label_centre(told, "L1"))
        assert said.startswith(f"L1: 2.0 mm and 3.0 degrees against the pre-alignment{against}; residual")


def test_folds_are_black_and_kept_volume_is_white():
    stack = make_stack()
    det = torch.ones(stack.grid.shape)
    det[:, :, : stack.grid.shape[2] // 2] = -0.2
    still = Layer(torch.zeros(det.shape), stack.grid)
    stack = replace(stack, jacobian_det=Layer(det, stack.grid), disp=(still,) * 3, images=stack.images | {"moved": stack.images["moving"]})
    stack.modalities["moved"] = "ct"
    picture = SlicePicture(stack, first_view(stack, show="jacobian", fade=1.0, outlined=(), crosshair=False), PLANES["coronal"], words=False)
    shown, box = pixels(picture.png()), picture.panels[0].ax.bbox
    x, rows = int(box.x0 + 0.3 * box.width), (picture.bbox.height - np.array([box.y0 + 0.25 * box.height, box.y0 + 0.75 * box.height])).astype(int)
    assert shown[rows[0], x].max() == 0 and shown[rows[1], x].min() > 240


def test_near_the_border_a_slice_is_moved_as_the_transform_moves_points():
    """The working grid ends around the bones; beyond it the moved image and the displacement go on, and det J is not known."""
    files = [ROOT / "data_samples/test/clinical_0" / f"{name}.nii.gz" for name in ("mr_t1", "ct", "ct_mask")]
    result = register(*files, method="optimise", prealign="header", spacing_mm=4.0, levels=(1,), steps=(10,))
    stack, moving, front = result_stack(result), result.pair.moving, result.pair.fixed.grid.shape[1] - 12
    at = np.stack(np.meshgrid(range(0, stack.grid.shape[0], 3), [front], range(0, stack.grid.shape[2], 3), indexing="ij"), -1).reshape(-1, 3)
    x = torch.from_numpy(at @ stack.grid.affine[:3, :3].T + stack.grid.affine[:3, 3])
    y = result.transform.points(x).numpy()
    read = np.linalg.inv(moving.grid.affine)[:3] @ np.vstack([y.T, np.ones(len(y))])
    inside = ((read >= 0) & (read <= np.array(moving.grid.shape)[:, None] - 1)).all(0)
    known = map_coordinates(moving.data.numpy().astype(float), read, order=1)[inside]
    rows, columns = at[inside][:, [0, 2]].T
    assert inside.sum() > 100 and np.abs(stack.images["moved"].select(1, front).numpy()[rows, columns] - known).max() < 0.1
    u = np.stack([component.select(1, front).numpy()[at[:, 0], at[:, 2]] for component in stack.disp], -1) @ stack.grid.axes.T
    assert np.allclose(u, y @ np.linalg.inv(result.transform.rigid)[:3, :3].T + np.linalg.inv(result.transform.rigid)[:3, 3] - x.numpy(), atol=1e-3)
    assert np.linalg.norm(u, axis=1).max() > 1
    assert stack.jacobian_det.select(1, front).isnan().all() and "det J not known" in describe_point(stack, tuple(at[len(at) // 2].tolist()))
    assert stack.jacobian_det.select(1, stack.grid.shape[1] // 2).isfinite().any()


@pytest.mark.parametrize("which", [None, "moved", "jacobian", "gone"])
def test_what_cannot_be_shown_is_refused_with_what_can(which):
    stack = make_stack()
    if which is None:
        assert showable(stack) == ["fixed", "moving", "blend", "colours", "checkerboard", "difference"]
        return
    with pytest.raises(ValueError, match=f"show='{which}': expected one of fixed, moving, blend"):
        SliceViewer(stack, show=which)


# the widget


@pytest.fixture
def viewer():
    stack = make_stack()
    stack.images["fixed"].whole.add_(torch.linspace(0, 20, stack.grid.shape[2]))
    viewer = SliceViewer(stack)
    viewer.box  # noqa: B018  as a notebook would ask for it
    return viewer


def control(viewer, name):
    return next(control.widget for control in viewer.controls.controls if control.widget.description == name)


def test_every_control_changes_the_picture_and_follows_the_program(viewer):
    changes = {"left - right": 3, "foot - head": 60, "show": "difference", "fade": 0.9, "outlines": (), "CT window": CT_WINDOWS_HU["soft tissue"]}
    changes |= {"fixed MR %": (2.0, 99.5), "back - front": 20}
    viewer.change(show="blend")
    for name, value in changes.items():
        if name == "fade":
            viewer.change(show="blend", at=label_centre(viewer.stack, "L1"))
        before, view = viewer.image.value, viewer.view
        control(viewer, name).value = value
        assert viewer.view != view, name
        assert viewer.image.value != before, name
    viewer.change(fade=0.25, show="blend")
    assert control(viewer, "fade").value == 0.25 and control(viewer, "show").value == "blend"


def do(viewer, **event):
    "Tell a viewer of an event, and wait until it has followed."
    viewer.events.add(event)
    viewer.events.wait()


def test_wheel_click_and_keys(viewer):
    picture, start = viewer.live, viewer.view.at
    box = picture.panels[1].ax.bbox
    place = {"dataX": box.x0 + 0.25 * box.width, "dataY": picture.bbox.height - (box.y0 + 0.75 * box.height)}
    do(viewer, type="wheel", deltaY=-120.0, **place)
    assert viewer.view.at == (start[0], start[1] + 1, start[2]), "the wheel moves the plane under the mouse"
    do(viewer, type="click", **place)
    i, _, k = viewer.view.at
    assert np.allclose([i, k], 0.75 * np.array(viewer.stack.grid.shape)[[0, 2]], atol=1), "the patient's right is on the left"
    changes = {"4": ("show", "colours"), "o": ("outlined", ()), "c": ("crosshair", False), "n": ("at", label_centre(viewer.stack, "L1"))}
    for key, (name, value) in changes.items():
        do(viewer, type="keydown", key=key)
        assert getattr(viewer.view, name) == value
    for key in itertools.chain(["PageUp"] * 40, ["ArrowUp"] * 3, ["x", "Shift", "9"]):
        do(viewer, type="keydown", key=key)
    assert viewer.view.at[1] == viewer.stack.grid.shape[1] - 1


def mouse(viewer, panel, across, up, kind, **event):
    "An event at a part of a slice, from its left and from its bottom."
    picture, box = viewer.live, viewer.live.panels[panel].ax.bbox
    place = {"dataX": box.x0 + across * box.width, "dataY": picture.bbox.height - (box.y0 + up * box.height)}
    return {"type": kind, "buttons": int(kind == "mousedown")} | place | event


@pytest.mark.parametrize("what", ["drag", "wheel and click", "zoom and click"])
def test_events_that_come_together_mean_what_they_mean_one_by_one(what):
    views = []
    for together in (True, False):
        viewer = SliceViewer(make_stack(), zoom=2.0)
        viewer.box  # noqa: B018  as a notebook would ask for it
        moves = [mouse(viewer, 2, 0.5, 0.5 + 0.08 * n, "mousemove", buttons=1) for n in range(1, 5)]
        wheel = mouse(viewer, 0, 0.3, 0.6, "wheel", deltaY=-100.0, ctrlKey=what.startswith("zoom"))
        drag = [mouse(viewer, 2, 0.5, 0.5, "mousedown"), *moves, mouse(viewer, 2, 0.5, 0.82, "mouseup")]
        events = drag if what == "drag" else [wheel, wheel, mouse(viewer, 0, 0.4, 0.7, "click")]
        for batch in [events] if together else [[event] for event in events]:
            viewer.follow(batch)
        views.append(viewer.view)
    assert views[0] == views[1] != SliceViewer(make_stack(), zoom=2.0).view


def test_keys_move_through_the_plane_that_the_mouse_is_over(viewer):
    """Also after a button was let go beside the picture; pointing alone draws nothing."""
    do(viewer, **mouse(viewer, 0, 0.5, 0.5, "mousedown"))
    before, shown, at = viewer.view, viewer.image.value, viewer.view.at
    do(viewer, **mouse(viewer, 1, 0.3, 0.3, "mousemove"))
    assert viewer.view is before and viewer.image.value is shown
    do(viewer, type="keydown", key="ArrowUp")
    assert viewer.view.at == (at[0], at[1] + 1, at[2])


def test_the_middles_of_all_vertebrae_are_found_once_and_only_where_they_are_asked_for():
    """The full moving labels, which may have millions of voxels, are left alone where the moved ones say all."""

    class Unasked(Layer):
        voxels = property(lambda self: pytest.fail("asked"))

    stack = make_stack()
    layer = stack.labels["moving"]
    stack = replace(stack, labels={"moved": layer, "moving": Unasked(layer.whole, layer.grid)})
    assert stack.centres is stack.centres and stack.centres == {"L1": label_centre(stack, "L1")}
    assert label_centre(stack, "L1") == label_centre(make_stack(), "L1")


def test_a_burst_of_events_is_followed_to_its_end(viewer):
    """None is lost, although not every one is drawn."""
    viewer.change(at=(5, 5, 5))
    for _ in range(50):
        viewer.events.add({"type": "keydown", "key": "ArrowUp"})
    viewer.events.wait()
    assert viewer.view.at[0] == min(55, viewer.stack.grid.shape[0] - 1) and control(viewer, "left - right").value == viewer.view.at[0]


def test_planes_can_be_changed_and_the_live_picture_is_the_recorded_one(viewer):
    viewer.change(planes="axial")
    assert len(viewer.live.panels) == 1 and viewer.choice.value == "axial"
    live, same = pixels(viewer.image.value), viewer.live
    np.testing.assert_array_equal(live, pixels(same.png()))
    whole = pixels(same._repr_png_())
    assert live.shape == whole.shape and (np.abs(live - whole).max(-1) > 30).mean() < 0.01
    assert pixels(viewer.png()).shape[0] > live.shape[0], "the words lie below"


def test_a_view_that_cannot_be_shown_is_refused_and_not_kept(viewer):
    before = viewer.view, viewer.planes, viewer.hand, viewer.image.value
    numbers = {"zoom": (0.0, 0.5, np.nan), "fade": (5.0, -0.1), "half_range": (0.0, np.inf), "middle": ((1.0, np.nan, 2.0),), "at": ((9999, 0, 0),)}
    windows = ({"fixed": (0.0, 1.0)}, viewer.view.windows | {"moving": (500.0, 100.0)}, viewer.view.windows | {"moved": (0.0, 1.0)})
    words = {"outlined": (("moved",),), "lines": ("grid",), "windows": windows, "planes": ("oblique",)}
    for field, values in (numbers | words).items():
        for value in values:
            with pytest.raises(ValueError, match=f"{field}=.*: expected"):
                viewer.change(**{field: value})
    viewer.png()
    assert before == (viewer.view, viewer.planes, viewer.hand, viewer.image.value)
    assert SliceViewer(make_stack(), windows={"fixed": (0.0, 50.0)}).view.windows["moving"] == CT_WINDOWS_HU["spine"]


def test_a_hand_is_followed_after_a_view_that_controls_could_not_show(viewer):
    def read(view):
        return view.zoom + 1 / (view.zoom - 2)

    told, slider = [], control(viewer, "zoom")
    panel = ControlPanel([Control(slider, read, lambda view, zoom: zoom)], told.append, viewer.lock)
    with pytest.raises(ZeroDivisionError):
        panel.show(replace(viewer.view, zoom=2.0))
    slider.value = 4.0
    assert told == [4.0]


def test_a_picture_that_cannot_be_saved_is_told_and_can_be_tried_again(monkeypatch, tmp_path):
    def save(path):
        if refused:
            raise refused.pop()
        return path

    monkeypatch.chdir(tmp_path)
    refused = [PermissionError("no room")]
    menu, said = save_menu(save).children
    menu.value = ".png"
    assert said.value == "not saved: no room" and menu.value == ""
    menu.value = ".png"
    assert said.value == str(tmp_path / "slices_1.png") and menu.value == ""


def test_vertebrae_outside_the_grid_are_not_offered(tmp_path):
    """A CT covers more levels than the MR; one that is not in view is no choice, and an image without any is shown all the same."""
    files = [ROOT / "data_samples/test/easy_0" / f"{name}.nii.gz" for name in ("mr_t1", "ct", "ct_mask")]
    mr = nib.load(files[0])
    axis = int(np.argmax(np.abs(mr.affine[2, :3])))
    cut = [slice(None)] * 3
    cut[axis] = slice(0, int(0.4 * mr.shape[axis]))
    nib.save(mr.slicer[tuple(cut)], tmp_path / "low.nii.gz")
    pair = read_pair(tmp_path / "low.nii.gz", *files[1:])
    stack = pair_stack(pair)
    assert 0 < len(stack.names) < len(pair.moving_labels.names)
    viewer = SliceViewer(stack)
    for name in stack.names:
        viewer.jump(name)
        assert stack.labels["moving"][viewer.view.at] == stack.names.index(name) + 1, "the middle of a vertebra is in it"
    far = nib.load(files[1])
    for image, name in ((far, "ct"), (nib.load(files[2]), "ct_mask")):
        affine = image.affine.copy()
        affine[2, 3] += 500
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), affine), tmp_path / f"{name}.nii.gz")
    alone = SliceViewer(read_pair(files[0], tmp_path / "ct.nii.gz", tmp_path / "ct_mask.nii.gz"))
    assert alone.stack.names == () and alone.png()


def test_an_error_while_following_is_told(viewer, capsys):
    viewer.events.add({"type": "wheel", "deltaY": 1.0, "dataX": None, "dataY": 1})
    viewer.events.wait()
    assert "Traceback" in capsys.readouterr().err


# what stays

EVERY = """
import spinereg
from spinereg.interactive.monitor import TrainingMonitor
from spinereg.files.pairs import read_pair
from spinereg.interactive.view3d import view3d
from spinereg.interactive.display import Interactive
from spinereg.interactive.motion import VertebraMotion
from spinereg.interactive.viewers import DeformedGrid, JacobianMap, Quiver, SliceViewer
from spinereg.measure.pictures import Picture
files = [f"{samples}/test/easy_0/{name}.nii.gz" for name in ("mr_t1", "ct", "ct_mask")]

def draw(width):
    return Picture(figsize=(width, 1))
"""
CELLS = [
    "result = spinereg.register(*files, method='optimise', prealign='header', spacing_mm=4.0, levels=(1,), steps=(10,), on_step=TrainingMonitor())",
    "SliceViewer(read_pair(*files))",
    "SliceViewer(result)",
    "JacobianMap(result)",
    "DeformedGrid(result)",
    "Quiver(result, 'sagittal')",
    "VertebraMotion(result)",
    "view3d(result)",
    "view3d(result, engine='itkwidgets')",
    "Interactive(draw, width=(1, 3, 2))",
]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    "A notebook with every viewer, executed by papermill."
    path = tmp_path_factory.mktemp("executed") / "every.ipynb"
    setup = nbformat.v4.new_code_cell(f"samples = {str(ROOT / 'data_samples')!r}" + EVERY)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=[setup, *map(nbformat.v4.new_code_cell, CELLS)], metadata={"kernelspec": kernel})
    nbformat.write(notebook, path)
    subprocess.run([sys.executable, "-m", "papermill", path, path, "--kernel", "python3", "--no-progress-bar"], check=True, capture_output=True)
    return path


def test_d1_what_papermill_leaves_of_every_viewer_is_a_png_and_no_widget(executed):
    """D1: no widget view, no widget state; one PNG per viewer."""
    notebook = nbformat.read(executed, 4)
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells[1:]:
        shown = [set(output.data) for output in cell.outputs if output.output_type in ("display_data", "execute_result")]
        assert sum("image/png" in data for data in shown) == 1, cell.source
        assert not any("application/vnd.jupyter.widget-view+json" in data for data in shown), cell.source


def test_d1_the_page_made_of_it_shows_every_picture(executed):
    """D1: nbconvert to HTML: as many pictures as viewers, no widget, no error."""
    subprocess.run([sys.executable, "-m", "jupyter", "nbconvert", "--to", "html", executed], check=True, capture_output=True)
    page = executed.with_suffix(".html").read_text()
    assert page.count("<img") == len(CELLS) == len(re.findall(r'<img[^>]*src="data:image/png;base64', page))
    assert "Error displaying widget" not in page and "widget-view" not in page.replace("jupyter-widgets/html-manager", "")


def test_d4_no_figure_stays_open():
    """D4: pictures are drawn without pyplot."""
    SliceViewer(make_stack()).box  # noqa: B018
    assert pyplot.get_fignums() == []


def test_reading_a_sample_gives_a_stack_with_one_name_per_vertebra():
    files = [ROOT / "data_samples/test/clinical_0" / f"{name}.nii.gz" for name in ("mr_t1", "ct", "ct_mask", "mr_mask")]
    stack = pair_stack(read_pair(*files))
    for which, pair_labels in (("fixed", read_pair(*files).fixed_labels),):
        for number, name in enumerate(pair_labels.names, start=1):
            assert torch.equal(stack.labels[which].whole == stack.names.index(name) + 1, pair_labels.data == number)
