"""The 3-D view: rays against analytic surfaces, files against other readers, viewers that are not there."""

import base64
import hashlib
import io
import socket
import tarfile
import time
from dataclasses import replace
from types import SimpleNamespace

import nbformat
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from nbclient import NotebookClient
from scipy.spatial.transform import Rotation

from spinereg.interactive import itk_viewer
from spinereg.interactive import view3d as module
from spinereg.interactive.bones import camera, draw_bones, first_hit, shade, trace_rays
from spinereg.interactive.itk_viewer import install_itk_viewer
from spinereg.interactive.stack import Layer, Stack, layers_on
from spinereg.interactive.view3d import choose_viewer, itk_volume, itk_widget, label_colours, nifti_bytes, niivue_widget, view3d
from spinereg.space.geometry import Grid, transform_points


def tilted_grid(shape=(48, 44, 36), spacing=(1.0, 1.1, 1.4)):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (8, -5, 12), degrees=True).as_matrix() * spacing
    affine[:3, 3] = (-30, 12, 40)
    return Grid(shape, affine)


def box_labels(grid, **ranges):
    "Label 1, 2, ... in boxes of the world, each ((low, high) along right, front, top), mm."
    x = grid.points_mm(torch.zeros(1))
    labels = torch.zeros(grid.shape, dtype=torch.int32)
    for k, (low, high) in enumerate(ranges.values(), 1):
        labels[((x > torch.tensor(low)) & (x < torch.tensor(high))).all(-1)] = k
    return labels


UPRIGHT = Grid((40, 40, 40), np.diag([1.0, 1, 1, 1]))


@pytest.mark.parametrize("angles", [(0.0, 0.0), (90.0, 0.0), (180.0, 30.0), (37.0, -20.0)])
def test_depth_of_a_ball_is_the_analytic_one(angles):
    grid, radius = tilted_grid(), 17.0
    ball = ((grid.points_mm(torch.zeros(1)) - torch.from_numpy(grid.centre_mm).float()).norm(dim=-1) < radius).int()
    sight = trace_rays(ball, grid, camera(*angles))
    place = transform_points(np.linalg.inv(sight.grid.affine), torch.from_numpy(grid.centre_mm)[None])[0] * sight.grid.spacing_mm[0]
    x, y = torch.meshgrid(*(torch.arange(n) * sight.grid.spacing_mm[0] for n in sight.label.shape), indexing="ij")
    r = ((x - place[0]) ** 2 + (y - place[1]) ** 2).sqrt()
    inner, outer = r < 0.85 * radius, r > radius + 1.0
    error_mm = (sight.depth_mm - (place[2] - (radius**2 - r**2).sqrt()))[inner]
    assert sight.label[inner].eq(1).all() and sight.label[outer].eq(0).all()
    assert error_mm.abs().mean() < 0.25 and error_mm.abs().max() < 1.2


def test_first_hit_is_where_scipy_like_interpolation_passes_one_half():
    occupancy = torch.rand(6, 5, 40, generator=torch.Generator().manual_seed(0)).cumsum(-1) / 20
    depth = first_hit(occupancy)
    for ray, d in zip(occupancy.reshape(-1, 40).numpy(), depth.flatten().tolist()):
        assert np.interp(d, np.arange(40), ray) == pytest.approx(0.5, abs=1e-4)
        assert (ray[: int(d)] <= 0.5).all()


def test_the_nearer_bone_hides_the_farther_and_right_is_left_from_the_front():
    """Two slabs one behind the other, and a small cube on the patient's right."""
    labels = box_labels(UPRIGHT, front=((10, 25, 10), (30, 32, 30)), behind=((10, 8, 10), (30, 15, 30)), right=((32, 18, 18), (38, 24, 24)))
    front, back, left = (trace_rays(labels, UPRIGHT, camera(azimuth)) for azimuth in (0.0, 180.0, 90.0))
    assert set(front.label.unique().tolist()) == {0, 1, 3} and set(back.label.unique().tolist()) == {0, 2, 3}
    columns = {name: (sight.label == 3).nonzero()[:, 0].float().mean() / sight.label.shape[0] for name, sight in (("front", front), ("back", back))}
    assert columns["front"] < 0.3 and columns["back"] > 0.7
    assert (left.label == 1).nonzero()[:, 0].float().mean() < (left.label == 2).nonzero()[:, 0].float().mean()  # the front is on the left


def test_labels_and_size_of_a_cuboid_agree_with_a_projection_by_hand():
    """Anisotropic voxels: what is drawn is as wide and as high as the box, in mm."""
    grid = Grid((40, 40, 12), np.diag([1.0, 1, 4, 1]))
    labels = box_labels(grid, one=((9.5, 9.5, 6), (29.5, 19.5, 38)))
    sight = trace_rays(labels, grid, camera(0.0))
    spacing = float(sight.grid.spacing_mm[0])
    width, height = (np.ptp((sight.label == 1).nonzero()[:, axis].numpy()) + 1 for axis in (0, 1))
    assert width * spacing == pytest.approx(20, abs=1.1) and height * spacing == pytest.approx(32, abs=2.1)


def test_facing_surfaces_are_brighter_than_slanting_ones():
    labels = box_labels(UPRIGHT, slab=((5, 15, 5), (35, 25, 35)))
    flat, slanting = (shade(trace_rays(labels, UPRIGHT, camera(azimuth)), ("L1",) * int(labels.max())) for azimuth in (0.0, 70.0))
    centre = [colours[colours.shape[0] // 3, colours.shape[1] // 2].sum() for colours in (flat, slanting)]
    assert centre[0] > centre[1]


def test_labels_without_voxels_are_left_out_and_none_at_all_is_said():
    labels = box_labels(UPRIGHT, one=((10, 10, 10), (20, 20, 20)), none=((90, 90, 90), (91, 91, 91)), three=((10, 10, 25), (20, 20, 32)))
    fig = draw_bones(labels, UPRIGHT, ("T12", "L1", "L2"))
    assert {text.get_text() for text in fig.axes[0].texts} == {"T12", "L2"}
    with pytest.raises(ValueError, match="no voxel has a label"):
        draw_bones(torch.zeros(UPRIGHT.shape, dtype=torch.int32), UPRIGHT, ())


def test_files_for_the_viewers_place_voxels_where_simpleitk_does(tmp_path):
    grid = tilted_grid()
    volume = torch.rand(grid.shape)
    (tmp_path / "volume.nii").write_bytes(nifti_bytes(volume, grid))
    read, told = sitk.ReadImage(tmp_path / "volume.nii"), itk_volume(volume, grid, "volume")
    assert told["imageType"]["componentType"] == "float32" and told["size"] == list(read.GetSize())
    assert np.allclose(told["origin"], read.GetOrigin(), atol=1e-4) and np.allclose(told["spacing"], read.GetSpacing(), atol=1e-5)
    assert np.allclose(told["direction"], read.GetDirection(), atol=1e-5)
    assert np.array_equal(np.frombuffer(told["bytes"], np.float32), sitk.GetArrayFromImage(read).ravel())


def test_every_label_has_its_own_entry_in_the_colour_table():
    table = label_colours(tuple(f"T{k}" for k in range(1, 13)))
    assert all(len(column) == 13 for column in table.values()) and table["A"] == [0] + [255] * 12
    assert table["I"] == list(range(13)) and table["labels"][12] == "T12"


# viewers that are there or not


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(itk_viewer, "urlopen", refuse)


def test_d2_what_is_not_installed_is_said_at_once_and_without_the_network(monkeypatch, tmp_path, no_network):
    """D2: never a hang: the check reads folders only, and another viewer or the picture is shown."""
    monkeypatch.setattr(itk_viewer, "jupyter_path", lambda name: [str(tmp_path / name)])
    start = time.perf_counter()
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    engine, words = choose_viewer("niivue")
    assert engine is None and "pip install ipyniivue anywidget" in words
    monkeypatch.setattr(module, "find_spec", lambda name: "here")
    assert choose_viewer("niivue") == ("niivue", "")
    engine, words = choose_viewer("itkwidgets")
    assert engine == "niivue" and "install_itk_viewer()" in words
    assert time.perf_counter() - start < 1
    (tmp_path / "labextensions/itk-vtk-viewer").mkdir(parents=True)
    (tmp_path / "labextensions/itk-vtk-viewer/itkVtkViewer.js").touch()
    assert choose_viewer("itkwidgets") == ("itkwidgets", "")


def packed(files):
    with io.BytesIO() as data:
        with tarfile.open(fileobj=data, mode="w:gz") as tar:
            for name, content in files.items():
                about = tarfile.TarInfo(name)
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
        return data.getvalue()


def test_d2_itk_viewer_is_unpacked_from_a_file_and_replaces_an_older_one(monkeypatch, tmp_path, no_network):
    """D2: a machine without a network gets the viewer by hand; any other file is refused and changes nothing."""
    monkeypatch.setattr(itk_viewer, "jupyter_data_dir", lambda: str(tmp_path / "data"))
    wanted = {"itkVtkViewer.js": b"viewer", "itk/pipeline/Downsample.wasm": b"wasm"}
    left_out = {"package/dist/itk/image-io/big.wasm": b"big", "package/src/index.js": b"source", "package/package.json": b"{}"}
    archive = packed({f"package/dist/{name}": content for name, content in wanted.items()} | left_out)
    (tmp_path / "viewer.tgz").write_bytes(archive)
    monkeypatch.setattr(itk_viewer, "ITK_VIEWER_SHA512", base64.b64encode(hashlib.sha512(archive).digest()).decode())
    old = tmp_path / "data/labextensions/itk-vtk-viewer/old.js"
    old.parent.mkdir(parents=True)
    old.touch()
    (tmp_path / "other.tgz").write_bytes(archive + b"x")
    with pytest.raises(ValueError, match="other.tgz: its SHA-512 is .* expected"):
        install_itk_viewer(tmp_path / "other.tgz")
    assert old.exists()
    folder = install_itk_viewer(tmp_path / "viewer.tgz")
    assert {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == wanted
    assert [path.name for path in folder.parent.iterdir()] == ["itk-vtk-viewer"]


def small_stack():
    labels = box_labels(UPRIGHT, one=((10, 10, 10), (20, 20, 20)), two=((10, 10, 25), (20, 20, 32)))
    images, maps = layers_on(UPRIGHT, {"fixed": torch.rand(UPRIGHT.shape)}), layers_on(UPRIGHT, {"moved": labels})
    return Stack(UPRIGHT, images, {"fixed": "mr"}, maps, ("L1", "L2"), pd.DataFrame())


def test_view3d_refuses_what_is_not_there_and_does_without_labels():
    stack = small_stack()
    for word, value, known in (("image", "moved", "fixed"), ("labels", "fixed", "moved, None"), ("engine", "vtk", "niivue, itkwidgets")):
        with pytest.raises(ValueError, match=f"{word}='{value}': expected one of {known}"):
            view3d(stack, **{word: value})
    assert view3d(stack).png() != view3d(replace(stack, labels={})).png()


def test_the_picture_that_stays_is_drawn_again_only_for_another_choice(monkeypatch):
    """Beside it, without any viewer, the same picture is shown once."""
    monkeypatch.setattr(module, "choose_viewer", lambda engine: (None, "no viewer"))
    viewer, stays, drawn = view3d(small_stack()), [], []
    monkeypatch.setattr(viewer, "png", lambda png=viewer.png: drawn.append(viewer.labels) or png())
    viewer.handle = SimpleNamespace(update=stays.append)
    _, menus, _ = viewer.box.children
    assert drawn == ["moved"] and stays == []
    menus.children[1].value = None
    assert viewer.labels is None and len(stays) == 1


def test_d2_executed_without_a_person_a_notebook_keeps_the_picture_alone():
    """D2: no widget, no state of one, nothing to say about viewers."""
    cell = """
import numpy as np, pandas as pd, torch
from spinereg.space.geometry import Grid
from spinereg.interactive.stack import Stack, layers_on
from spinereg.interactive.view3d import view3d
labels = torch.zeros(20, 20, 20, dtype=torch.int32)
labels[5:15, 5:15, 5:15] = 1
grid = Grid((20, 20, 20), np.eye(4))
images, maps = layers_on(grid, {"fixed": labels.float()}), layers_on(grid, {"moved": labels})
stack = Stack(grid, images, {"fixed": "mr"}, maps, ("L1",), pd.DataFrame())
view3d(stack, engine="itkwidgets")
"""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    NotebookClient(nb, timeout=120).execute()
    (output,) = nb.cells[0].outputs
    assert set(output.data) <= {"image/png", "text/plain"} and base64.b64decode(output.data["image/png"]).startswith(b"\x89PNG")
    assert "widgets" not in nb.metadata


def test_niivue_gets_volumes_with_their_place_names_and_colours():
    pytest.importorskip("ipyniivue")
    grid = tilted_grid()
    labels = (torch.rand(grid.shape) * 3).int()
    legend, viewer, _ = niivue_widget(Layer(torch.rand(grid.shape), grid), Layer(labels, grid), ("L1", "L2")).children
    image, overlay = (nib.Nifti1Image.from_bytes(volume.data) for volume in viewer.volumes)
    assert np.allclose(image.affine, grid.affine, atol=1e-5) and np.array_equal(overlay.dataobj, labels)
    assert viewer.volumes[1].colormap_label.labels == ["", "L1", "L2"] and "L2" in legend.value


def test_d2_a_browser_that_cannot_show_itkwidgets_gets_the_default_viewer():
    """D2: what the widget in the browser reports as `failed` puts the message and NiiVue in its place."""
    pytest.importorskip("ipyniivue")
    box = itk_widget(Layer(torch.rand(UPRIGHT.shape), UPRIGHT), None, ())
    (viewer,) = box.children
    assert viewer.volumes[0]["size"] == [40, 40, 40]
    viewer.failed = "no <WebGL>"
    message, other = box.children
    assert "no &lt;WebGL&gt;" in message.value and type(other.children[1]).__name__ == "NiiVue"
