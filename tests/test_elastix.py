"The baseline: elastix in a process of its own, its parameters, its penalty, its result. Few steps on coarse grids."

import inspect
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
import torch
from scipy.interpolate import BSpline
from scipy.ndimage import gaussian_filter, map_coordinates

from spinereg.compare.elastix import (
    ElastixError,
    ElastixSettings,
    bone_mask,
    bone_numbers,
    parameter_map,
    read_disp,
    read_history,
    register_elastix,
    run_child,
    solve,
    whole_transform,
    write_inputs,
)
from spinereg.files.nifti import NativeSpace
from spinereg.files.transforms import write_motions
from spinereg.files.volumes import Labels
from spinereg.losses.objective import batch_on_grid
from spinereg.registration.register import Inputs, prepare
from spinereg.registration.scene import Scene
from spinereg.space.fields import determinant, jacobian, warp
from spinereg.space.geometry import Grid

ROOT = Path(__file__).resolve().parent.parent
CASE = ROOT / "data_samples/test/easy_0"
USUAL = {"fixed": "mr.nii.gz", "moving": "ct.nii.gz", "spacing_mm": 2.0, "seed": 0}
USUAL |= {"grid_spacing_mm": 8.0, "iterations": 30, "samples": 4096, "weight_similarity": 0.1, "timeout_s": 300.0}


def installed():
    try:
        return bool(version("itk-elastix")) and find_spec("itk") is not None
    except PackageNotFoundError:
        return False


needs_elastix = pytest.mark.skipif(not installed(), reason='itk-elastix is not installed: pip install ".[elastix]"')


# without elastix


def test_e2_elastix_is_imported_in_its_child_alone():
    """E2: an extra is never loaded with the package."""
    code = "import sys, spinereg.compare.elastix; print('itk' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_e2_missing_extra_is_an_error_with_the_pip_line(monkeypatch):
    """E2: said before any file is opened."""

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("spinereg.compare.elastix.version", missing)
    with pytest.raises(ElastixError, match=r'pip install "spinereg\[elastix\]"'):
        register_elastix("no.nii.gz", "such.nii.gz")


def test_settings_that_make_no_sense_are_refused_by_name():
    with pytest.raises(ValueError, match=r"(?s)iterations=0.*samples=99.*grid_spacing_mm=3\.0.*weight_similarity=0\.0:.*timeout_s=0"):
        ElastixSettings(**USUAL | {"iterations": 0, "samples": 99, "grid_spacing_mm": 3.0, "weight_similarity": 0.0, "timeout_s": 0.0})
    with pytest.raises(ValueError, match=r"weight_rigidity=-1.*penalty='soft': expected one of conditions, distances"):
        ElastixSettings(**USUAL | {"weight_rigidity": -1.0, "penalty": "soft"})


def test_defaults_are_the_same_wherever_they_stand():
    """A setting that is left out means the same to `register_elastix`, to its settings and to the words for elastix."""
    usual, settings = inspect.signature(register_elastix).parameters, ElastixSettings(fixed="mr.nii.gz", moving="ct.nii.gz")
    for name, parameter in list(usual.items())[2:]:
        assert getattr(settings, name) == parameter.default, name
    for name, parameter in inspect.signature(parameter_map).parameters.items():
        assert parameter.default == usual[name].default, name


@pytest.mark.parametrize(
    ("does", "limit_s", "said"),
    [
        ("import ctypes; ctypes.string_at(0)", 60.0, "signal 11 .SIGSEGV." if os.name == "posix" else "exit code"),
        ("raise RuntimeError('no memory left')", 60.0, r"(?s)exit code 1;.*no memory left"),
        ("import time; time.sleep(60)", 0.5, "stopped after 0.5 s"),
    ],
    ids=["crash", "error", "time-out"],
)
def test_what_happens_to_the_child_is_an_error_here(tmp_path, does, limit_s, said):
    """A crash inside elastix must not take the caller with it: here another `itk` crashes, fails or hangs."""
    (tmp_path / "itk.py").write_text(does)
    with pytest.raises(ElastixError, match=said):
        run_child(tmp_path, 1, limit_s)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child whose parent is gone")
@pytest.mark.parametrize("how", ["kill", "terminate"])
def test_child_ends_with_a_parent_that_is_killed(tmp_path, how):
    """D-kill: nothing may go on computing when the process that waits for it is gone: here another `itk` writes down who it is, and hangs.

    Where the parent is told to end (SIGTERM), it does not leave that to Linux, so the child may ask Linux not to end it.
    """
    alone = "import ctypes; ctypes.CDLL(None).prctl(1, 0)\n" if how == "terminate" else ""
    (tmp_path / "itk.py").write_text(f"{alone}import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)")
    code = "import sys, pathlib; from spinereg.compare.elastix import run_child; run_child(pathlib.Path(sys.argv[1]), 1, 60.0)"
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    written = tmp_path / "pid"
    while not (written.exists() and written.read_text()):
        assert parent.poll() is None
        time.sleep(0.1)
    child = psutil.Process(int(written.read_text()))
    getattr(parent, how)()
    assert parent.wait() == (-signal.SIGKILL if how == "kill" else -signal.SIGTERM)
    gone, _ = psutil.wait_procs([child], timeout=10)
    assert gone or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("size_mm", [1.0, 60.0], ids=["small", "large"])
def test_map_of_the_whole_world_keeps_the_field_ends_at_zero_and_folds_nothing(size_mm):
    """Also where the displacement at the border is larger than the usual fade; and the inverse undoes it."""
    grid = Grid((9, 11, 7), np.diag([2.0, 3.0, 2.0, 1.0]))
    disp = size_mm * torch.tensor([0.6, -0.64, 0.48])[None, :, None, None, None].expand(1, 3, *grid.shape)
    full = whole_transform(disp, grid, np.eye(4))
    start = np.round(np.linalg.inv(full.grid.affine) @ grid.affine)[:3, 3].astype(int)
    inner = tuple(slice(s, s + n) for s, n in zip(start, grid.shape))
    assert torch.equal(full.disp[(slice(None), slice(None), *inner)], disp)
    outside = full.disp.clone()
    outside[(slice(None), slice(None), *(slice(1, -1),) * 3)] = 0
    assert not outside.any()
    assert determinant(jacobian(full.disp, full.grid)).min() > 0
    points = grid.points_mm(torch.zeros(1, dtype=torch.float64)).reshape(-1, 3)
    assert (full.inverse_points(full.points(points)) - points).norm(dim=-1).max() < 0.1


def test_mask_is_the_moving_bone_after_pre_alignment():
    """B5: the labels of the moving image, carried to the fixed grid by the rigid map alone."""
    grid = Grid((12, 12, 12), np.eye(4))
    data = torch.zeros(12, 12, 12, dtype=torch.int64)
    data[4:8, 4:8, 4:8] = 2
    rigid = np.eye(4)
    rigid[:3, 3] = [2.0, 0.0, -1.0]
    empty = torch.zeros(1, 1, 12, 12, 12)
    labels = Labels(data, ("L1", "L2"), (20, 21), grid, NativeSpace(Path("labels.nii.gz"), nib.Nifti1Header(), grid.affine, grid))
    mask = bone_mask(Scene(empty, grid, empty, grid, rigid, labels), grid)
    assert torch.equal(mask.nonzero().amin(0), torch.tensor([2, 4, 5])) and mask.sum() == 64 and mask.max() == 1
    assert bone_mask(Scene(empty, grid, empty, grid, rigid, None), grid) is None
    assert bone_numbers(Scene(empty, grid, empty, grid, rigid, None), grid) is None


def test_no_two_neighbours_have_the_same_number_and_none_is_above_five():
    """elastix leaves numbers above five soft, and reads beside a point at the face without asking whether anything is there."""
    grid = Grid((12, 12, 60), np.eye(4))
    data = torch.arange(60).div(5, rounding_mode="floor").add(1).expand(12, 12, 60)
    names = tuple(f"T{n}" for n in range(1, 13))
    empty, space = torch.zeros(1, 1, *grid.shape), NativeSpace(Path("labels.nii.gz"), nib.Nifti1Header(), grid.affine, grid)
    labels = Labels(data, names, tuple(range(8, 20)), grid, space)
    numbers = bone_numbers(Scene(empty, grid, empty, grid, np.eye(4), labels), grid)
    points = numbers[::4, ::4, ::4]
    faces = torch.ones_like(points, dtype=torch.bool)
    faces[1:-1, 1:-1, 1:-1] = False
    assert not points[faces].any()
    line = numbers[4, 4, 4:53]
    assert set(line.tolist()) == {1, 2, 3, 4, 5} and (line[5:] != line[:-5]).all(), "bones of five voxels each"


# with elastix


GRID = Grid((30, 28, 26), np.array([[1.6, -1.2, 0, 5], [1.2, 1.6, 0, -7], [0, 0, -2, 9], [0, 0, 0, 1]]))
TRUTH = torch.zeros(1, 3, *GRID.shape)
TRUTH[:, 0] = 3 + 0.25 * 2 * (torch.arange(30.0) - 14.5)[:, None, None]  # 3 mm off and stretched by a quarter, along the first axis
TRUTH[:, 1] = -2.0
SETTINGS = parameter_map(iterations=30, samples=4096)
QUICK = {"spacing_mm": 3.0, "iterations": 20, "samples": 2048}


def pair():
    "Blobs on a tilted grid that TRUTH carries onto their fixed image, which has the contrast turned round."
    moving = torch.from_numpy(gaussian_filter(np.random.default_rng(3).normal(size=GRID.shape), 2.0)).float()[None, None]
    moving = (moving - moving.min()) / (moving.max() - moving.min())
    fixed = 1 - warp(moving, GRID, GRID, TRUTH)
    return batch_on_grid(fixed, moving, torch.ones_like(fixed), None, (), GRID)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "The folder of a run on the blobs, with a block of them for bone."
    folder = tmp_path_factory.mktemp("ran")
    bone = torch.zeros(GRID.shape)
    bone[6:22, 5:20, 6:20] = 1
    write_inputs(folder, pair(), bone, SETTINGS | {"WriteTransformParametersEachIteration": ["true"]})
    run_child(folder, 90, 300.0)
    return folder


@needs_elastix
def test_known_displacement_is_found(ran):
    """moved(x) = moving(x + disp(x)), mm along the axes of a tilted grid."""
    off_mm = (read_disp(ran) - TRUTH)[0, :, 6:-6, 6:-6, 6:-6].norm(dim=0)
    assert off_mm.mean() < 0.25 * TRUTH.norm(dim=1).mean()


@needs_elastix
def test_c11_same_seed_same_field(ran):
    """C11: to the last bit, in another process."""
    bone = torch.zeros(GRID.shape)
    bone[6:22, 5:20, 6:20] = 1
    again = solve(pair(), bone, SETTINGS)
    assert torch.equal(again.disp, read_disp(ran))
    assert list(again.history) == ["level_mm", "step", "similarity", "oc", "pc"]
    assert list(again.history.level_mm.unique()) == [8.0, 4.0, 2.0] and len(again.history) == 90


def at_control_points(coefficients, spacing):
    "u and I + grad u at the inner control points, from the B-spline coefficients (3, i, j, k), by scipy's cubic B-spline."
    basis = BSpline.basis_element(np.arange(-2.0, 3.0))
    value, slope = (np.array([spline(x) for x in (1.0, 0.0, -1.0)]) for spline in (basis, basis.derivative()))
    around = {at: tuple(slice(a, n - 2 + a) for a, n in zip(at, coefficients.shape[1:])) for at in np.ndindex(3, 3, 3)}

    def mix(weights):
        return sum(np.prod([w[a] for w, a in zip(weights, at)]) * coefficients[(slice(None), *there)] for at, there in around.items())

    grad = [mix([slope / spacing[a] if a == axis else value for a in range(3)]) for axis in range(3)]
    return np.moveaxis(mix([value] * 3), 0, -1), np.moveaxis(np.stack(grad, 1), (0, 1), (-2, -1)) + np.eye(3)


@needs_elastix
def test_b5_penalty_is_that_of_the_field_where_the_moving_mask_is(ran):
    """B5: OC and PC as elastix reports them are those of its spline at the control points that land in the mask, and nowhere else."""
    lines = (ran / "TransformParameters.0.R2.It0000028.txt").read_text().splitlines()  # what step 29 began with
    words = {line[1:-1].split()[0]: line[1:-1].split()[1:] for line in lines if line.startswith("(")}
    size, spacing, origin = (np.array(words[f"Grid{name}"], float) for name in ("Size", "Spacing", "Origin"))
    coefficients = np.array(words["TransformParameters"], float).reshape(3, *size[::-1].astype(int)).transpose(0, 3, 2, 1)
    u, J = at_control_points(coefficients, spacing)
    landed = np.rint((origin + spacing * (1 + np.stack(np.indices(u.shape[:3]), -1)) + u) / GRID.spacing_mm).astype(int)
    c = ((landed >= [6, 5, 6]) & (landed < [22, 20, 20])).all(-1)
    excess = np.triu(J[c].swapaxes(-1, -2) @ J[c] - np.eye(3))
    last = read_history(ran, 2.0).iloc[-1]
    assert c.sum() > 20
    assert np.square(excess).sum((1, 2)).mean() == pytest.approx(last.oc, rel=1e-6)
    assert np.square(np.linalg.det(J[c]) - 1).mean() == pytest.approx(last.pc, rel=1e-6)


SLABS = torch.zeros(GRID.shape)
SLABS[6:22, 6:20, 4:12], SLABS[6:22, 6:20, 12:20] = 1, 2  # two bones that touch


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    "The folder of a short run that keeps distances in two bones."
    folder = tmp_path_factory.mktemp("kept")
    settings = parameter_map(iterations=8, samples=4096, penalty="distances", spacing_mm=2.0, weight_rigidity=0.01)
    write_inputs(folder, pair(), SLABS, settings | {"WriteTransformParametersEachIteration": ["true"]})
    run_child(folder, 24, 300.0)
    return folder


@needs_elastix
def test_b5_distances_are_those_of_neighbours_in_one_bone(kept):
    """B5: what elastix reports is the change of the distances between points 4 mm apart, each with its neighbours in the same bone."""
    lines = (kept / "TransformParameters.0.R2.It0000006.txt").read_text().splitlines()  # what step 7 began with
    words = {line[1:-1].split()[0]: line[1:-1].split()[1:] for line in lines if line.startswith("(")}
    size, spacing, origin = (np.array(words[f"Grid{name}"], float) for name in ("Size", "Spacing", "Origin"))
    coefficients = np.array(words["TransformParameters"], float).reshape(3, *size[::-1].astype(int)).transpose(0, 3, 2, 1)
    number = SLABS[::2, ::2, ::2].numpy()
    x = np.stack(np.indices(number.shape), -1) * 4.0
    u = [map_coordinates(c, ((x - origin) / spacing).transpose(3, 0, 1, 2), order=3, prefilter=False, mode="nearest") for c in coefficients]
    there, means = x + np.stack(u, -1), []
    for at in zip(*np.nonzero(number)):
        near = [tuple(np.add(at, step) - 1) for step in np.ndindex(3, 3, 3)]
        near = [n for n in near if number[n] == number[at]]
        changes = [((there[n] - there[at]) ** 2).sum() - ((x[n] - x[at]) ** 2).sum() for n in near]
        means.append(np.mean(np.square(changes)))
    last = read_history(kept, 2.0).iloc[-1]
    assert len(means) > 200 and last.distances_mm4 > 0.01
    assert np.mean(means) == pytest.approx(last.distances_mm4, rel=1e-5)


def strain(result):
    "Of the moved vertebrae, by differences."
    J = jacobian(result.transform.disp_on(result.view.grid), result.view.grid)[0][result.view.labels > 0]
    return (J.mT @ J - torch.eye(3)).square().sum((1, 2)).mean()


def bone_of(result):
    "Landmarks on bone."
    return next(gain for gain in result.metrics.landmarks if gain.now.group == "bone")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    "The arguments of `register_elastix` for a case whose rigid start has been found."
    names = {"fixed": "mr_t1", "moving": "ct", "moving_labels": "ct_mask", "fixed_labels": "mr_mask"}
    files = {key: CASE / f"{name}.nii.gz" for key, name in names.items()} | {"landmarks": CASE / "landmarks.csv"}
    folder = tmp_path_factory.mktemp("start")
    write_motions(folder, {"rigid": prepare(Inputs(**files, prealign="labels", device="cpu")).start.rigid})
    return files | QUICK | {"prealign": folder / "vertebrae/rigid.tfm"}


@pytest.fixture(scope="module")
def free(case):
    "It registered without a penalty."
    return register_elastix(**case, weight_rigidity=0.0)


@needs_elastix
def test_b5_penalty_halves_the_strain_of_bone_and_files_are_those_of_register(case, free, tmp_path):
    """B5: the same seed without and with it; the strain of the moved vertebrae, by differences, falls to less than half.

    The files are those of `register`; the history tells of the penalty only where there is one.
    """
    result = register_elastix(**case, out_dir=tmp_path)
    assert strain(result) < 0.5 * strain(free)
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    whole = {"transform.h5", "inverse.h5", "disp.nii.gz", "moved.nii.gz", "moved_labels.nii.gz", "vertebrae.csv"}
    whole |= {"metrics.json", "overview.png", "planes.webp"}
    assert found == whole | {"history.csv", "manifest.json"} | {f"vertebrae/{name}.tfm" for name in result.vertebrae.index}
    assert result.metrics.parameters["itk_elastix"] == version("itk-elastix")
    assert list(free.history) == ["level_mm", "step", "similarity"]
    assert bone_of(result).now.mean_mm < 0.7 * bone_of(result).start_mean_mm


@needs_elastix
def test_b5_keeping_distances_halves_the_strain_too_though_the_images_change_places(case, free):
    """B5: the map is still fixed -> moving, and it and its inverse undo each other."""
    result = register_elastix(**case | {"spacing_mm": 4.0}, penalty="distances")  # voxels as far apart as its points
    assert strain(result) < 0.5 * strain(free)
    assert list(result.history) == ["level_mm", "step", "similarity", "distances_mm4"]
    assert bone_of(result).now.mean_mm < 0.7 * bone_of(result).start_mean_mm
    assert result.metrics.field.inverse_after_forward.mean_mm < 0.05
