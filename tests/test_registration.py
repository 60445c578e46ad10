"Register and apply from files to files: outputs, headers, reproducibility, orientations, arguments. Few steps on coarse grids."

import json
import shutil
import subprocess
import time
import weakref
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import binary_erosion
from scipy.spatial.transform import Rotation

import spinereg
from spinereg.apps.paths import given_parameters
from spinereg.files.nifti import NativeSpace
from spinereg.files.pairs import read_pair
from spinereg.files.problems import InputError
from spinereg.files.transforms import SpineTransform, read_transform
from spinereg.files.volumes import Labels
from spinereg.losses.objective import TERMS, Weights
from spinereg.losses.similarity import LNCC
from spinereg.registration.apply import apply
from spinereg.registration.optimise import make_transform, optimise, parameter_grid
from spinereg.registration.prealign import rigid_start
from spinereg.registration.register import RegisterSettings, find_velocity, prepare, register
from spinereg.registration.report import label_doubts, say_dice
from spinereg.registration.results import measure_labels
from spinereg.registration.run import choose_device
from spinereg.registration.scene import Scene, make_batch, make_scene, overlap_mask, working_grid
from spinereg.space.geometry import Grid, transform_points
from spinereg.space.images import label_centres_mm

SAMPLES = Path(__file__).parent.parent / "data_samples"
QUICK = {"method": "optimise", "spacing_mm": 3.0, "levels": (2, 1), "steps": (15, 10), "device": "cpu"}


def files(case):
    names = {"fixed": "mr_t1", "moving": "ct", "moving_labels": "ct_mask", "fixed_labels": "mr_mask"}
    folder = SAMPLES / "test" / case
    return {key: folder / f"{name}.nii.gz" for key, name in names.items()} | {"landmarks": folder / "landmarks.csv"}


EASY = files("easy_0") | QUICK | {"prealign": "header"}  # no search for a rigid start
UNMEASURED = {key: value for key, value in EASY.items() if key not in ("fixed_labels", "landmarks")}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return register(**files("clinical_0"), out_dir=out, **QUICK), out


@pytest.fixture(scope="module")
def easy():
    return register(**EASY)


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


def test_E4_every_promised_file_is_there_and_nothing_else(done):
    """E4, C11, C13: transforms, images, labels, table, figures, pictures."""
    result, out = done
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    names = {"transform.h5", "inverse.h5", "disp.nii.gz", "moved.nii.gz", "moved_labels.nii.gz", "vertebrae.csv"}
    names |= {"metrics.json", "overview.png", "planes.webp"}
    assert found == names | {"history.csv", "manifest.json"} | {f"vertebrae/{name}.tfm" for name in result.vertebrae.index}
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"field", "landmarks", "labels", "contacts", "motions", "prealign", "parameters", "seconds", "environment", "summary"} <= set(metrics)
    assert metrics["parameters"]["spacing_mm"] == 3.0


def test_A14_outputs_keep_the_fixed_header(done):
    """A14: shape, both affines and their codes are those of the fixed file."""
    _, out = done
    fixed = nib.load(files("clinical_0")["fixed"])
    for name in ("moved", "moved_labels", "disp"):
        image = nib.load(out / f"{name}.nii.gz")
        assert image.shape[:3] == fixed.shape
        assert np.allclose(image.affine, fixed.affine, atol=1e-6)
        assert [int(image.header[c]) for c in ("sform_code", "qform_code")] == [int(fixed.header[c]) for c in ("sform_code", "qform_code")]


def test_B6_moved_labels_are_whole_and_known(done):
    """B6: an integer type without scaling, values a subset of the input's."""
    _, out = done
    image = nib.load(out / "moved_labels.nii.gz")
    assert image.get_data_dtype().kind in "iu"
    assert image.header.get_slope_inter()[0] in (None, 1.0)
    values = set(np.unique(voxels(out / "moved_labels.nii.gz")))
    assert len(values) > 3
    assert values <= set(np.unique(voxels(files("clinical_0")["moving_labels"])))


def test_A7_ITK_makes_the_same_moved_image_from_the_file(done):
    """A7, A2: to 1e-4 of the range, on the MR's oblique thick slices; by the composite and by disp.nii.gz."""
    _, out = done
    fixed, moving = (sitk.ReadImage(str(files("clinical_0")[name]), sitk.sitkFloat64) for name in ("fixed", "moving"))
    ours = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "moved.nii.gz")))
    scale = np.ptp(sitk.GetArrayFromImage(moving))
    field = sitk.DisplacementFieldTransform(sitk.ReadImage(str(out / "disp.nii.gz"), sitk.sitkVectorFloat64))
    for transform, tolerance in ((sitk.ReadTransform(str(out / "transform.h5")), 1e-4), (field, 1e-3)):
        by_itk = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, 1e6))
        inside = binary_erosion(by_itk < 1e5)
        assert inside.mean() > 0.4
        assert np.abs(by_itk - ours)[inside].max() < tolerance * scale


def test_A8_the_registration_moves_landmarks_the_right_way(done):
    """A8: fixed landmarks sent through transform.h5 come closer to the moving ones."""
    result, out = done
    marks = result.pair.landmarks
    bone = torch.tensor([bool(v) for v in marks.vertebra])
    before = (marks.fixed_mm - marks.moving_mm)[bone].norm(dim=1).mean()
    after = (read_transform(out).points(marks.fixed_mm) - marks.moving_mm)[bone].norm(dim=1).mean()
    assert after < 1.5 < 6 < before


def test_vertebra_transforms_are_the_motions_of_the_table(done):
    result, out = done
    truth = json.loads((SAMPLES / "test/clinical_0/truth.json").read_text())["vertebrae"]
    for name, matrix in result.metrics.motions.items():
        transform = sitk.ReadTransform(str(out / "vertebrae" / f"{name}.tfm"))
        here = np.array([5.0, -30, -280])
        there = np.array(transform.TransformPoint((here * [-1, -1, 1]).tolist())) * [-1, -1, 1]
        assert np.allclose(there, np.array(matrix)[:3, :3] @ here + np.array(matrix)[:3, 3], atol=1e-4)
    known = {v["name"]: np.array(v["matrix"]) for v in truth}
    name = result.vertebrae.index[len(result.vertebrae) // 2]
    turn = Rotation.from_matrix((np.linalg.inv(known[name]) @ result.metrics.motions[name])[:3, :3])
    assert np.rad2deg(turn.magnitude()) < 3


def test_C11_two_runs_agree_bit_for_bit(done):
    """C11: same seed, same machine, same numbers, from the search for the rigid start on."""
    again = register(**files("clinical_0"), **QUICK)
    assert np.array_equal(done[0].start.rigid, again.start.rigid) and again.start.confidence is not None
    assert torch.equal(done[0].transform.disp, again.transform.disp)
    assert torch.equal(done[0].moved, again.moved)
    pd.testing.assert_frame_equal(done[0].history, again.history)


def test_B4_labels_of_the_moving_image_are_enough_and_none_also_run(tmp_path, capsys):
    """B4, C6: without any labels it runs, and says that rigidity is off."""
    given = files("easy_0")
    result = register(given["fixed"], given["moving"], out_dir=tmp_path, **QUICK)
    printed = capsys.readouterr().out
    assert "rigidity off: no labels" in printed
    assert all(str(notice) in printed for notice in result.pair.notices)
    assert [notice["name"] for notice in json.loads((tmp_path / "metrics.json").read_text())["notices"]] == ["fixed", "moving"]
    assert "Rigidity is off: no labels" in result.summary()
    assert not (tmp_path / "moved_labels.nii.gz").exists()
    labelled = register(**UNMEASURED)
    assert len(labelled.vertebrae) > 3
    assert "dice" not in labelled.vertebrae


def test_B5_the_rigidity_terms_have_an_effect(easy):
    """B5: they lower the worst in-bone residual of a run with the same seed by more than half."""
    free = register(**UNMEASURED, weight_oc=0.0, weight_pc=0.0, weight_rf=0.0)
    assert easy.vertebrae.residual_rms_mm.mean() < 0.5 * free.vertebrae.residual_rms_mm.mean()
    assert easy.vertebrae.volume_change_percent.abs().mean() < 0.5 * free.vertebrae.volume_change_percent.abs().mean()


def test_every_term_of_the_objective_can_be_weighed():
    "The rigid Dice, off by default, counts where it is given a weight."
    result = register(**UNMEASURED | {"levels": (1,), "steps": (2,)}, weight_rd=0.1)
    terms = result.history[list(TERMS)].iloc[-1]
    weights = result.history[[f"weight_{name}" for name in TERMS]].iloc[-1]
    assert result.history.weight_rd.tolist() == [0.1, 0.1] and terms.rd > 0
    assert result.history.loss.iloc[-1] == pytest.approx(terms.to_numpy() @ weights.to_numpy(), rel=1e-5)


@pytest.mark.parametrize("levels", [(1.0,), (1.0, 1.0, 1.0)], ids=["polish", "levels"])
def test_a_level_keeps_what_was_found_before_it(levels):
    "Adam's steps are at most as long as it is told, so a rough velocity stays what it was to that length: nothing else is done to it."
    grid, generator = Grid((20, 22, 24), np.diag([1.0, 1.0, 1.0, 1.0])), torch.Generator().manual_seed(0)
    fixed, moving = torch.rand(2, 1, 1, *grid.shape, generator=generator)
    place = parameter_grid(grid)
    start = torch.randn(1, 3, *place.shape, generator=generator)
    scene = Scene(fixed, grid, moving, grid, np.eye(4), None)
    found = optimise(scene, grid, LNCC(), Weights(diffusion=3.0), levels, (2,) * len(levels), 1e-3, start=(start, place))
    assert found.grid.same_as(place)
    assert 0 < (found.velocity - start).abs().max() < 2e-3 * len(levels) * 1.01


def stored_as(source, target, codes=None, world=None):
    "A copy of a NIfTI file with other axes, or elsewhere in the world."
    image = nib.load(source)
    if codes:
        start, end = nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes)
        image = image.as_reoriented(nib.orientations.ornt_transform(start, end))
    affine = image.affine if world is None else world @ image.affine
    copy = nib.Nifti1Image(np.asarray(image.dataobj), affine)
    copy.set_sform(affine, 1)
    copy.set_qform(affine, 1)
    nib.save(copy, target)
    return target


def pair_as(folder, codes=None, world=None):
    given = files("clinical_0")
    return {key: stored_as(given[key], folder / f"{key}.nii.gz", codes, world) for key in ("fixed", "moving", "moving_labels")}


TURNS = [
    Rotation.from_rotvec(np.deg2rad(a) * np.array(v) / np.linalg.norm(v)).as_matrix()
    for a, v in ((10, (1, 0, 0)), (15, (0, 1, 1)), (20, (0, 0, 1)), (25, (1, 1, 0)), (12, (1, -2, 3)))
]


def turned(matrix):
    world = np.eye(4)
    world[:3, :3] = matrix
    return world


@pytest.mark.parametrize("variant", ["LPI", "SRA", "AIL", 0, 3, 4])
def test_A1_the_same_pair_stored_otherwise_registers_alike(variant, tmp_path, upright):
    """A1: other axis orders and flips, or both headers turned: working images equal to 1e-5, displacement to 0.05 mm at 200 world points."""
    world = np.eye(4) if isinstance(variant, str) else turned(TURNS[variant])
    given = pair_as(tmp_path, variant if isinstance(variant, str) else None, world)
    level, grid = working_level(given)
    assert np.abs(np.linalg.inv(world) @ grid.affine - upright["grid"].affine).max() < 1e-4
    for name in ("fixed", "moving", "mask"):
        assert torch.allclose(getattr(level, name), getattr(upright["level"], name), atol=1e-5)
    there = found_map(given).points(transform_points(world, upright["points"]))
    back = transform_points(np.linalg.inv(world), there)
    assert (back - upright["map"].points(upright["points"])).norm(dim=1).max() < 0.05


def found_map(given):
    "The map that `register` finds, which is not measured here."
    asked = RegisterSettings(**given, **QUICK, prealign="header")
    prepared = prepare(asked)
    found = find_velocity(asked, prepared)
    return make_transform(found.velocity, found.grid, prepared.start.rigid)


def working_level(given):
    pair = read_pair(**given)
    scene = make_scene(pair, rigid_start(pair, "header").rigid, torch.device("cpu"))
    grid = working_grid(scene, 2.0)
    return make_batch(scene, grid, 2.0, 2), grid


@pytest.fixture(scope="module")
def upright(tmp_path_factory):
    given = pair_as(tmp_path_factory.mktemp("upright"))
    level, grid = working_level(given)
    index = torch.tensor(np.random.default_rng(0).uniform(0, 1, (200, 3))) * torch.tensor(grid.shape)
    return {"level": level, "grid": grid, "map": found_map(given), "points": transform_points(grid.affine, index)}


def test_A10_E4_apply_carries_images_labels_and_points_both_ways(done, tmp_path):
    result, out = done
    given = files("clinical_0")
    moved = apply(out, given["moving"], tmp_path / "moved.nii.gz", onto=given["fixed"])
    assert np.abs(voxels(moved) - voxels(out / "moved.nii.gz")).max() < 1e-3 * np.ptp(voxels(given["moving"]))
    labels = apply(out, given["moving_labels"], tmp_path / "labels.nii.gz", onto=given["fixed"], labels=True)
    assert (voxels(labels) != voxels(out / "moved_labels.nii.gz")).mean() < 1e-4
    back = apply(out / "transform.h5", labels, tmp_path / "back.nii.gz", onto=given["moving"], to="moving", labels=True)
    both = (voxels(back) > 0) & (voxels(given["moving_labels"]) > 0)
    assert (voxels(back) == voxels(given["moving_labels"]))[both].mean() > 0.95
    points = tmp_path / "points.csv"
    pd.DataFrame({"name": "p", "x_mm": [3.0], "y_mm": [-40.0], "z_mm": [-280.0]}).to_csv(points, index=False)
    there = pd.read_csv(apply(out, points, tmp_path / "there.csv"))
    again = pd.read_csv(apply(out, tmp_path / "there.csv", tmp_path / "again.csv", to="moving"))
    assert not np.allclose(there[["x_mm", "y_mm", "z_mm"]], [[3, -40, -280]], atol=1)
    assert np.allclose(again[["x_mm", "y_mm", "z_mm"]], [[3, -40, -280]], atol=0.3)


def test_apply_refuses_what_it_cannot_do(done, tmp_path):
    _, out = done
    with pytest.raises(ValueError, match="onto=None"):
        apply(out, files("clinical_0")["moving"], tmp_path / "x.nii.gz")
    with pytest.raises(ValueError, match="to='source'"):
        apply(out, files("clinical_0")["moving"], tmp_path / "x.nii.gz", to="source")
    (tmp_path / "p.csv").write_text("x,y,z\n1,2,3\n")
    with pytest.raises(InputError, match=r"p\.csv.*x_mm"):
        apply(out, tmp_path / "p.csv", tmp_path / "q.csv")


@pytest.mark.parametrize(
    ("argument", "value"),
    [("method", "magic"), ("similarity", "nmi"), ("spacing_mm", 0.0), ("steps", (3,)), ("levels", ()), ("weight_oc", -1.0), ("device", "cuda:9")]
    + [("prealign", "seek"), ("prealign", "labels"), ("fixed_modality", "MR"), ("steps", (60, 60, 2.5))]
    + [("moving_scheme", "verse2020"), ("fixed_scheme", "spider")],
)
def test_D6_a_wrong_value_fails_before_any_file_is_opened(argument, value):
    """D6: the files do not even exist."""
    if argument == "device" and torch.cuda.is_available():
        pytest.skip("a CUDA GPU is here")
    with pytest.raises(ValueError, match=argument):
        register("no.nii.gz", "nothing.nii.gz", **{argument: value})


def test_D6_the_app_knows_its_parameters():
    """D6: a misspelt name or a value of another kind fails before anything runs."""
    good = {"fixed": "a", "moving": "b", "spacing_mm": 2, "steps": [3, 2, 1]}
    assert given_parameters(good | {"__name__": "x", "In": [], "Path": Path, "result": object()}, spinereg.register) == good
    assert given_parameters(good | {"moving_scheme": {1: "L5"}}, spinereg.register)["moving_scheme"] == {1: "L5"}
    for wrong in ({"spacingmm": 2}, {"spacing_mm": "2"}, {"seed": True}, {"seed": 1.5}, {"steps": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            given_parameters(good | wrong, spinereg.register)


def test_bad_pairs_are_one_error_before_any_work(tmp_path):
    with pytest.raises(InputError) as caught:
        register(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", tmp_path / "c.nii.gz")
    assert len(caught.value.problems) >= 3


@pytest.mark.skipif(not (Path(__file__).parents[2] / "shared/data/lumbar_mr_pair").is_dir(), reason="the real MR pair is not on this machine")
def test_a_real_pair_from_a_start_14_mm_off(tmp_path):
    """T2 onto T1 of one person, moving labels only: the body centroids meet."""
    folder = Path(__file__).parents[2] / "shared/data/lumbar_mr_pair"
    names = {"fixed": "fixed_t1", "moving": "moving_t2", "moving_labels": "moving_labels", "fixed_labels": "fixed_labels"}
    result = register(**{key: folder / f"{name}.nii.gz" for key, name in names.items()}, **(QUICK | {"spacing_mm": 2.0}))
    fixed, moved, names = result.pair.fixed_labels, result.moved_labels, result.pair.moving_labels.names
    at_fixed, at_moved = label_centres_mm(fixed.data, fixed.grid, len(fixed.names)), label_centres_mm(moved, fixed.grid, len(names))
    apart_mm = [np.linalg.norm(at_fixed[fixed.names.index(name)] - at_moved[names.index(name)]) for name in fixed.names]
    assert np.mean(apart_mm) < 1.5
    assert result.metrics.field.regularity.n_folded == 0


def test_B4_a_case_without_labels_never_gets_another_cases(tmp_path):
    """B4: `make run` names every optional file, None where there is none, and the app's own defaults are all None."""
    (tmp_path / "case").mkdir()
    makefile = Path(__file__).parent.parent / "Makefile"
    if shutil.which("make") is None:
        pytest.skip("make is not on this machine")
    command = ["make", "-n", "run", f"CASE={tmp_path}/case"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=makefile.parent, check=True).stdout
    for name in ("moving_labels", "fixed_labels", "landmarks"):
        assert f"-p {name} None" in " ".join(shown.split())


def test_saving_again_leaves_no_file_of_an_earlier_run(tmp_path):
    short = UNMEASURED | {"levels": (1,), "steps": (2,), "out_dir": tmp_path}
    register(**short)
    assert (tmp_path / "moved_labels.nii.gz").exists() and list((tmp_path / "vertebrae").iterdir())
    register(**short | {"moving_labels": None})
    assert not (tmp_path / "moved_labels.nii.gz").exists()
    assert not list((tmp_path / "vertebrae").iterdir())


def test_A6_thin_stacks_of_thick_slices_keep_their_overlap():
    """A6: 8 to 14 slices of 3 to 5 mm; never an empty mask, for any similarity."""
    moving = Grid((100, 100, 100), np.array([[1.0, 0, 0, -50], [0, 1, 0, -50], [0, 0, 1, -50], [0, 0, 0, 1]]))
    for slices, spacing in ((8, 4.0), (10, 3.3), (12, 3.5), (9, 5.0), (14, 4.4)):
        affine = np.diag([spacing, 0.8, 0.8, 1])
        affine[:3, 3] = [-spacing * (slices - 1) / 2, -40, -40]
        fixed = Grid((slices, 100, 100), affine)
        scene = Scene(torch.rand(1, 1, *fixed.shape), fixed, torch.rand(1, 1, *moving.shape), moving, np.eye(4), None)
        for spacing_mm in (4.0, 2.0, 1.0):
            for reach in (0, 2, 4):
                mask = make_batch(scene, working_grid(scene, 1.0), spacing_mm, reach).mask[0, 0].amax((1, 2))
                assert mask.sum() * spacing_mm >= 0.3 * slices * spacing


def cropped(path, out, low, high):
    "The file with only the slices low ... high - 1 of its superior axis."
    image = nib.load(path)
    axis = next(n for n, code in enumerate(nib.aff2axcodes(image.affine)) if code in "SI")
    cut = [slice(None)] * 3
    cut[axis] = slice(low, high)
    nib.save(image.slicer[tuple(cut)], out)
    return out


def test_A3_what_the_moving_image_does_not_show_changes_little(tmp_path):
    """A3: the moving image without its lower 40 %; where both show the body, the displacement changes by less than 0.5 mm."""
    given = files("easy_0")
    height = nib.load(given["moving"]).shape[2]
    keep = {name: cropped(given[name], tmp_path / f"{name}.nii.gz", int(0.4 * height), height) for name in ("moving", "moving_labels")}
    finer = QUICK | {"spacing_mm": 2.0, "steps": (30, 15), "prealign": "header"}
    whole = register(given["fixed"], given["moving"], given["moving_labels"], **finer)
    part = register(given["fixed"], keep["moving"], keep["moving_labels"], **finer)
    grid = whole.pair.fixed.grid
    points = grid.points_mm(torch.zeros(1, dtype=torch.float64))[10:-10:4, 10:-10:4, int(0.4 * height) + 20 : -10 : 4].reshape(-1, 3)
    change = (whole.transform.points(points) - part.transform.points(points)).norm(dim=1)
    assert change.mean() < 0.5
    below = grid.points_mm(torch.zeros(1, dtype=torch.float64))[10:-10:4, 10:-10:4, : int(0.4 * height) - 20 : 4].reshape(-1, 3)
    seen, longest = ((part.transform.points(p) - p).norm(dim=1).max() for p in (points, below))
    assert longest <= seen


def test_B2_a_sliver_of_a_vertebra_has_no_row_and_is_named(tmp_path):
    """B2: less than a fifth of a vertebra in view says nothing about its motion."""
    labels = nib.load(EASY["fixed_labels"])
    data = np.asarray(labels.dataobj)
    lowest = int(data[data > 0].max())
    first, last = np.flatnonzero((data == lowest).any((0, 1)))[[0, -1]]
    cut = int(last - 0.15 * (last - first))
    fixed = cropped(EASY["fixed"], tmp_path / "mr.nii.gz", cut, data.shape[2])
    result = register(**UNMEASURED | {"fixed": fixed, "prealign": "auto", "out_dir": tmp_path / "out"})
    slivers = {name: seen for name, seen in result.metrics.seen_percent.items() if 0 < seen < 20}
    assert slivers and not set(slivers) & set(result.vertebrae.index)
    assert all(f"{name} (" in result.summary() for name in slivers)
    assert {p.stem for p in (tmp_path / "out/vertebrae").glob("*.tfm")} == set(result.vertebrae.index)


def test_the_rigid_dice_of_a_rigid_result_is_one(done):
    result, _ = done
    assert 0.96 < result.metrics.rigidity.rigid_dice <= 1
    assert result.metrics.local_correlation.now > result.metrics.local_correlation.prealigned


def test_A3_filled_voxels_are_no_data(tmp_path):
    """A3: a frame of NaN around a CT, and the corners of a sheared one, are left out of the overlap."""
    given = files("easy_0")
    image = nib.load(given["moving"])
    data = np.asarray(image.dataobj).astype(np.float32)
    data[:, :, -30:] = np.nan
    sheared = image.affine.copy()
    sheared[0, 2] += 0.1
    nib.save(nib.Nifti1Image(data, image.affine), tmp_path / "nan.nii.gz")
    tilted = nib.Nifti1Image(np.asarray(image.dataobj), None)
    tilted.set_sform(sheared, 1)
    nib.save(tilted, tmp_path / "sheared.nii.gz")
    for name, expected in (("nan", 1 - 30 / data.shape[2]), ("sheared", 0.85)):
        pair = read_pair(given["fixed"], tmp_path / f"{name}.nii.gz", moving_modality="ct", fixed_modality="mr")
        scene = make_scene(pair, np.eye(4), torch.device("cpu"))
        share = overlap_mask(scene, pair.fixed.grid).mean()
        assert abs(share - expected) < 0.1 and share < 0.95, name
    whole = read_pair(given["fixed"], given["moving"], moving_modality="ct", fixed_modality="mr")
    assert whole.moving.measured is None


def test_a_failed_registration_does_not_read_like_a_good_one(tmp_path):
    """C14: started 70 mm off, the result says so first, and names the vertebrae that are gone."""
    given = files("easy_0")
    off = sitk.TranslationTransform(3, (0.0, 0.0, 70.0))
    sitk.WriteTransform(sitk.AffineTransform(np.eye(3).ravel().tolist(), off.GetOffset()), str(tmp_path / "off.tfm"))
    labels, marks = given["moving_labels"], given["landmarks"]
    result = register(given["fixed"], given["moving"], labels, given["fixed_labels"], marks, prealign=str(tmp_path / "off.tfm"), **QUICK)
    text = result.summary()
    assert text.startswith("NOT TO BE TRUSTED") and "further apart" in text and "n_missing" in text
    gone = set(result.metrics.seen_percent) - set(result.vertebrae.index)
    assert gone and all(f"{name} (" in text for name in gone)


def test_what_the_headers_are_off_is_in_one_column_and_not_in_the_summary(tmp_path):
    """The CT's header shifted by 600 mm, and the pre-alignment with it: the same words and motions, but for the distance by the headers."""
    few = {key: value for key, value in UNMEASURED.items() if key != "prealign"} | {"spacing_mm": 4.0, "levels": (1,), "steps": (3,)}
    turn, shift = np.eye(4), np.eye(4)
    turn[:3, :3], turn[:3, 3], shift[2, 3] = Rotation.from_rotvec([2, 0, 0], degrees=True).as_matrix(), [0, -9, 2], 600
    for name in ("moving", "moving_labels"):
        image = nib.load(few[name])
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), shift @ image.affine), tmp_path / f"{name}.nii.gz")
    there, flip = {name: tmp_path / f"{name}.nii.gz" for name in ("moving", "moving_labels")}, np.diag([-1.0, -1, 1, 1])
    for name, start in (("near", flip @ turn @ flip), ("far", flip @ shift @ turn @ flip)):
        sitk.WriteTransform(sitk.AffineTransform(start[:3, :3].ravel().tolist(), start[:3, 3].tolist()), str(tmp_path / f"{name}.tfm"))
    one, other = (register(**few | given, prealign=str(tmp_path / f"{name}.tfm")) for name, given in (("near", {}), ("far", there)))
    assert one.summary() == other.summary() and "against the rigid pre-alignment" in one.summary()
    columns = [name for name in one.vertebrae if name.startswith(("aligned_", "relative_")) and name != "relative_to"]
    assert len(columns) == 16 and np.allclose(one.vertebrae[columns], other.vertebrae[columns], atol=0.02, equal_nan=True)
    assert np.allclose(other.vertebrae.superior_mm - one.vertebrae.superior_mm, 600, atol=0.02) and other.vertebrae.distance_mm.min() > 500
    assert {"aligned_distance_mm", "aligned_angle_deg", "relative_distance_mm", "relative_angle_deg"} <= set(one.table())


def blocks(up):
    "Labels of two vertebrae, the upper one moved up by as many slices, as far as the image goes."
    grid, data = Grid((10, 10, 40), np.eye(4)), torch.zeros(10, 10, 40 + up, dtype=torch.int16)
    data[5:8, 2:8, 26 + up : 36 + up], data[2:5, 2:8, 5:15] = 1, 2
    native = NativeSpace(Path("labels.nii.gz"), nib.Nifti1Image(np.zeros(grid.shape, np.uint8), grid.affine).header, grid.affine, grid)
    return Labels(data[:, :, :40], ("L1", "L2"), (20, 21), grid, native)


@pytest.mark.parametrize("up", [0, 2, 5, 9, 25])
def test_C14_pushing_a_vertebra_out_of_view_gains_nothing(up):
    """C14: which vertebrae are cut, the label maps say as they were given; one that a map moves over the border counts as before."""
    labels, empty, shift = blocks(0), torch.zeros(1, 1, 10, 10, 40), np.eye(4)
    disp = torch.zeros(1, 3, 10, 10, 40)
    disp[:, 2, 5:] = -float(up)
    scene = Scene(empty, labels.grid, empty, labels.grid, shift, labels)
    moved = blocks(up).data
    rows, found = measure_labels(labels, scene, SpineTransform(labels.grid, disp, disp, shift), labels.grid, moved)
    share = 2 * max(0, 10 - up) / (10 + min(10, max(0, 14 - up)))
    assert found.whole.vertebrae == ("L1", "L2") and found.cut is None
    assert rows.dice["L1"] == pytest.approx(share, abs=1e-6) and found.whole.dice == found.now.dice == pytest.approx((share + 1) / 2, abs=1e-6)
    assert found.missing == (("L1",) if up > 13 else ()) and (found.whole.start_dice, found.whole.prealigned_dice) == (1, 1)


def test_C14_what_a_border_cuts_is_compared_with_itself():
    """Cut in one of the two label maps: apart from the mean, over the same vertebrae at the start and now."""
    labels, cut, still = blocks(0), blocks(12), np.eye(4)
    empty, rest = torch.zeros(1, 1, 10, 10, 40), torch.zeros(1, 3, 10, 10, 40)
    for moving, fixed in ((labels, cut), (cut, labels)):
        scene = Scene(empty, moving.grid, empty, moving.grid, still, moving)
        rows, found = measure_labels(fixed, scene, SpineTransform(moving.grid, rest, rest, still), moving.grid, moving.data)
        assert found.whole == (("L2",), 1, 1, 1) and found.cut == (("L1",), 0, 0, 0) and found.now.dice == 0.5 and rows.dice["L1"] == 0
        assert label_doubts(found) == [] and "1.00 now (1 of 2 vertebrae; 0.00 over L1, cut by" in say_dice(found)
        (doubt,) = label_doubts(found._replace(whole=None))
        assert (doubt.value, doubt.threshold) == (0, 0.5)


def test_C15_auto_is_a_cuda_gpu_or_else_the_cpu(monkeypatch):
    """C15: nothing has to be said on a machine without a GPU, and a GPU that is not there is refused in words."""
    for there, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto").type == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees 0 CUDA GPUs here, numbered from 0; use 'auto' or 'cpu'"):
        choose_device("cuda")


def test_numbers_of_numpy_are_settings_too(tmp_path):
    numbers = {"levels": tuple(np.array([2, 1])), "steps": tuple(np.array([2, 2])), "spacing_mm": np.float64(4.0)}
    result = register(**UNMEASURED | numbers, out_dir=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["parameters"]["steps"] == [2, 2]
    assert result.metrics.parameters["levels"] == (2.0, 1.0)


def test_X22_F14_a_folder_that_cannot_be_written_is_said_before_any_work(tmp_path):
    (tmp_path / "out").write_text("a file")
    given = files("easy_0")
    began = time.perf_counter()
    with pytest.raises(InputError, match="out_dir .*out is no folder"):
        register(given["fixed"], given["moving"], out_dir=tmp_path / "out" / "deeper", **QUICK)
    assert time.perf_counter() - began < 5


# watched and steered


def test_d3_a_stop_ends_the_registration_with_a_result_that_says_so(easy, tmp_path):
    """D3: no step after the stop; what was found until then is measured and written."""

    def stop(step):
        step.stop = step.row["step"] == 3 and step.row["level_mm"] == 3.0

    stopped = register(**EASY, out_dir=tmp_path, on_step=stop)
    pd.testing.assert_frame_equal(stopped.history, easy.history.iloc[:19])
    assert stopped.metrics.run == (19, True, ()) and not easy.metrics.run.stopped
    assert "it was stopped after 19 steps" in json.loads((tmp_path / "metrics.json").read_text())["summary"]


def test_a_changed_weight_counts_from_the_next_step_and_is_recorded(easy):
    def ease(step):
        if step.row["step"] == 4 and step.row["level_mm"] == 6.0:
            step.weights.diffusion = 0.1

    eased = register(**EASY, on_step=ease)
    assert eased.metrics.as_dict()["run"]["weights_changed"] == [{"step": 5, "term": "diffusion", "before": 3.0, "after": 0.1}]
    pd.testing.assert_frame_equal(eased.history.iloc[:5], easy.history.iloc[:5])
    assert eased.history.similarity.iloc[7] != easy.history.similarity.iloc[7] and "weights were changed on the way (diffusion)" in eased.summary()


def test_a_look_while_it_runs_shows_the_present_field():
    seen = []
    result = register(**EASY, on_step=lambda step: seen.append((step.done, *step.look())))
    done, view, figures = seen[-1]
    assert done == 1.0 and view.names == result.view.names and figures["residual_median_mm"] < 0.5
    assert (view.jacobian_det - 1).abs().mean() > (seen[0][1].jacobian_det - 1).abs().mean()


def test_d5_a_registration_that_fails_lets_go_of_its_memory():
    """D5: the exception lives on, as the last one does in a notebook; the images do not."""
    held = []

    def fails(step):
        held.append(weakref.ref(step.look.args[2].moving))
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory") as caught:
        register(**EASY, on_step=fails)
    assert caught.value.__traceback__ is not None and held[0]() is None
