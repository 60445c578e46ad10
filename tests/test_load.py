"""A saved result is opened again: the same object, from the same inputs and no others."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from test_elastix import needs_elastix

import spinereg
from spinereg.files.manifest import MANIFEST, describe, read_manifest, write_manifest
from spinereg.files.pairs import read_landmarks
from spinereg.files.points import AXES
from spinereg.files.problems import InputError, Notice
from spinereg.interactive.stack import as_stack
from spinereg.measure.motion import Contact
from spinereg.registration.load import load, metrics_back
from spinereg.registration.networks import UNet, save_weights
from spinereg.registration.report import DiceGain, LabelFigures, RunRecord
from spinereg.registration.run import WeightChange

CASE = Path(__file__).resolve().parent.parent / "data_samples/test/easy_0"
QUICK = {"prealign": "header", "spacing_mm": 4.0, "device": "cpu"}
FEW = {"levels": (1,), "steps": (2,)}
PICTURES = {"transform.h5", "inverse.h5", MANIFEST}  # ITK notes the time, and the manifest their hash


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A folder with a case of two labelled vertebrae; results go beside it."
    folder = tmp_path_factory.mktemp("study")
    for name in ("mr_t1.nii.gz", "ct.nii.gz", "mr_mask.nii.gz", "landmarks.csv"):
        shutil.copy(CASE / name, folder)
    mask = nib.load(CASE / "ct_mask.nii.gz")
    data = np.asarray(mask.dataobj)
    nib.save(nib.Nifti1Image(np.where((data == 21) | (data == 22), data, 0).astype(data.dtype), mask.affine), folder / "ct_mask.nii.gz")
    return folder


@pytest.fixture(scope="module")
def images(study):
    return {"fixed": study / "mr_t1.nii.gz", "moving": study / "ct.nii.gz"}


@pytest.fixture(scope="module")
def files(study, images):
    return images | {"moving_labels": study / "ct_mask.nii.gz", "fixed_labels": study / "mr_mask.nii.gz", "landmarks": study / "landmarks.csv"}


@pytest.fixture(scope="module")
def polyrigid(study, files):
    "A result with everything in it, and its folder."
    near = dict.fromkeys(("L2", "L3"), np.eye(4))  # where the search begins, which is then short
    return spinereg.register(**files, **QUICK, **FEW, poses=near, out_dir=study / "out"), study / "out"


@pytest.fixture(scope="module")
def plain(study, images):
    "A result with little in it, and its folder."
    return spinereg.register(**images, **QUICK, **FEW, method="optimise", out_dir=study / "plain"), study / "plain"


@pytest.fixture
def copied(study, plain, tmp_path):
    "A copy of the study with that result, and nothing where it was."
    place, away = tmp_path / "copied", study.with_name("away")
    shutil.copytree(study, place)
    study.rename(away)
    yield place
    away.rename(study)


def plainly(metrics):
    return json.loads(json.dumps(metrics.as_dict()))


def same(one, other):
    "Whether two results are one, voxel by voxel and figure by figure."
    assert plainly(one.metrics) == plainly(other.metrics)
    assert one.summary() == other.summary() and one.figures().equals(other.figures()) and one.table().astype(str).equals(other.table().astype(str))
    pd.testing.assert_frame_equal(one.history, other.history, check_exact=True)
    for name in ("moved", "moved_labels"):
        a, b = getattr(one, name), getattr(other, name)
        assert a is b is None or (torch.equal(a, b) and a.dtype == b.dtype)
    for a, b in zip(one.view, other.view):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or a.same_as(b, 1e-6)
    x = torch.rand(4000, 3, dtype=torch.float64) * torch.tensor(one.transform.grid.size_mm) + torch.tensor(one.transform.grid.corners_mm().min(0))
    for way in ("points", "inverse_points"):
        assert (getattr(one.transform, way)(x) - getattr(other.transform, way)(x)).abs().max() < 1e-4
    return True


def test_E4_a_result_with_rigid_bones_comes_back_as_it_was(polyrigid, tmp_path):
    """E4: figures, map, images and pictures; bones are as rigid as they were; saved again it is the same folder."""
    result, out = polyrigid
    again = load(out)
    assert same(again, result) and again.transform.bones is not None and len(again.history) == 2
    at = transform_of_bone(result)
    assert torch.equal(again.transform.points(at), result.transform.points(at)) and len(at) > 1000
    stored = as_stack(again)
    assert all(torch.equal(stored.images[name].whole, image.whole) for name, image in as_stack(result).images.items())
    again.save(tmp_path)
    names = {path.relative_to(out) for path in out.rglob("*") if path.is_file() and path.name not in PICTURES}
    assert {path.name for path in names} >= {"bones.safetensors", "history.csv", "moved_labels.nii.gz", "overview.png", "L2.tfm"}
    assert all((tmp_path / name).read_bytes() == (out / name).read_bytes() for name in names)
    assert spinereg.read_poses(tmp_path).keys() == result.metrics.motions.keys()


def transform_of_bone(result):
    "Points of the fixed world that the map holds rigid."
    y = result.pair.moving_labels.data.nonzero().double() @ torch.tensor(result.pair.moving_labels.grid.affine[:3, :3].T)
    x = result.transform.inverse_points(y + torch.tensor(result.pair.moving_labels.grid.affine[:3, 3]))
    return x[result.transform.bones.bone_at(x) > 0]


def test_E4_apply_makes_the_voxels_of_the_result_through_its_bones(polyrigid, files, tmp_path):
    """E4: not one voxel of the CT or of the labels differs from what register wrote; the field alone differs at bone."""
    _, out = polyrigid
    for name in ("transform.h5", "inverse.h5"):
        shutil.copy(out / name, tmp_path)
    for name, what in (("moved", "moving"), ("moved_labels", "moving_labels")):
        by_apply = spinereg.apply(out, files[what], tmp_path / f"{name}.nii.gz", onto=files["fixed"])
        assert np.array_equal(nib.load(by_apply).dataobj, nib.load(out / f"{name}.nii.gz").dataobj)
    alone = nib.load(spinereg.apply(tmp_path / "transform.h5", files["moving"], tmp_path / "alone.nii.gz", onto=files["fixed"]))
    assert np.abs(np.asarray(alone.dataobj) - np.asarray(nib.load(out / "moved.nii.gz").dataobj)).max() > 1


def test_E4_without_labels_and_from_a_network_and_from_another_tool(plain, polyrigid, images, study, tmp_path):
    """E4: every function that saves a result; with steps and without."""
    result, out = plain
    assert same(load(out), result) and load(out).moved_labels is None
    save_weights(tmp_path / "net.safetensors", UNet(False), 4.0, {"epoch": 1})
    asked = spinereg.register(**images, **QUICK, method="network", weights=tmp_path / "net.safetensors", out_dir=tmp_path / "network")
    assert same(load(tmp_path / "network"), asked) and not (tmp_path / "network/history.csv").exists()
    measured = spinereg.evaluate_transform(polyrigid[1], **images, spacing_mm=4.0, out_dir=tmp_path / "measured")
    assert same(load(tmp_path / "measured"), measured) and measured.transform.bones is not None


@needs_elastix
def test_E4_a_result_of_elastix_comes_back(images, tmp_path):
    """E4: with the history that elastix wrote."""
    given = {"prealign": "header", "spacing_mm": 4.0, "grid_spacing_mm": 16.0, "iterations": 2, "samples": 2000}
    result = spinereg.register_elastix(**images, **given, out_dir=tmp_path)
    assert same(load(tmp_path), result) and len(result.history) == 6


def test_E4_in_a_new_process(polyrigid):
    """E4: the words are the same, viewers draw, and nothing is registered."""
    result, out = polyrigid
    code = """
import sys, spinereg
result = spinereg.load(sys.argv[1])
viewers = [spinereg.SliceViewer(result), spinereg.JacobianMap(result), spinereg.DeformedGrid(result), spinereg.Quiver(result)]
assert all(viewer.png().startswith(b"\\x89PNG") for viewer in viewers)
print(result.summary())
"""
    done = subprocess.run([sys.executable, "-c", code, out], capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.stdout.strip() == result.summary()


# figures


def test_E4_every_figure_survives_json(polyrigid, plain):
    """E4: what is seldom there as well: contacts, changed weights, a stop, labels that share nothing, columns without a value."""
    full, bare = polyrigid[0].metrics, plain[0].metrics
    labels = full.labels
    kinds = [
        bare,
        full,
        replace(full, contacts=(Contact("L2", "L3", *range(len(Contact._fields) - 2)),), landmarks=full.landmarks[:1]),
        replace(full, run=RunRecord(7, True, (WeightChange(3, "oc", 1.0, 0.5),)), labels=LabelFigures(("L1",), ("C1",))),
        replace(full, labels=labels._replace(whole=None, cut=DiceGain(("L2", "L3"), 0.1, 0.2, 1 / 3))),
        replace(full, labels=labels._replace(working_grid=None), notices=(Notice("moving", "ct.nii.gz", "odd", True),)),
        replace(full, vertebrae=full.vertebrae.assign(dice=np.nan, error_mm=[np.nan, 1 / 3]), levels={}),
        replace(full, prealign=full.prealign._replace(reasons={"steep": 0.4}, notices=(Notice("prealign", "ct.nii.gz", "not sure"),))),
        replace(full, vertebrae=full.vertebrae[:0], motions={}, covariance={}, rigidity=None),
    ]
    for metrics in kinds:
        again = metrics_back(plainly(metrics))
        assert plainly(again) == plainly(metrics) and list(again.vertebrae) == list(metrics.vertebrae)
        assert again.vertebrae.to_csv() == metrics.vertebrae.to_csv()


# inputs


def test_E4_a_folder_that_was_moved_as_a_whole_is_found(copied):
    """E4: no absolute path is right any more; the files beside the result are what they were."""
    again = load(copied / "plain")
    assert again.pair.fixed.native.path == copied / "mr_t1.nii.gz"


def test_E4_inputs_that_are_gone_or_changed_are_named_all_at_once(copied, tmp_path):
    """E4: which file, what was expected, what to do; a new path will do if the content is the same."""
    (copied / "ct.nii.gz").rename(tmp_path / "here.nii.gz")
    shutil.copy(copied / "mr_mask.nii.gz", copied / "mr_t1.nii.gz")
    with pytest.raises(InputError) as caught:
        load(copied / "plain", fixed=copied / "mr_t1.nii.gz")
    fixed, moving = caught.value.problems
    assert (fixed.name, moving.name) == ("fixed", "moving") and "another file or was changed; expected the" in fixed.reason
    assert "no such file; expected the" in moving.reason and 'moving="new/path"' in moving.fix
    shutil.copy(CASE / "mr_t1.nii.gz", copied / "mr_t1.nii.gz")
    assert load(copied / "plain", moving=tmp_path / "here.nii.gz").pair.moving.native.path == tmp_path / "here.nii.gz"
    with pytest.raises(InputError, match="in memory"):
        load(copied / "plain", moving=nib.load(tmp_path / "here.nii.gz"))
    with pytest.raises(InputError, match="made without landmarks"):
        load(copied / "plain", moving=tmp_path / "here.nii.gz", landmarks=copied / "landmarks.csv")


def test_E4_F11_what_was_in_memory_must_be_given_and_be_the_same(files, tmp_path):
    """E4, F11: images and tables; the same values from a file will do; a scheme that was a dictionary is one again."""
    marks = read_landmarks(files["landmarks"])
    tables = [pd.DataFrame(points.numpy(), columns=AXES).assign(name=marks.names) for points in (marks.fixed_mm, marks.moving_mm)]
    moving, mask = nib.load(files["moving"]), nib.load(files["moving_labels"])
    mask = nib.Nifti1Image(np.where(np.asarray(mask.dataobj) == 22, 22, 0).astype("uint8"), mask.affine)
    nib.save(mask, tmp_path / "mask.nii.gz")
    held = {"moving": (np.asarray(moving.dataobj), moving.affine), "landmarks": tuple(tables)}
    asked = {"fixed": files["fixed"], "moving_labels": mask, "moving_scheme": {22: "T2"}, "method": "rigid"}
    result = spinereg.register(**held, **asked, **QUICK, out_dir=tmp_path / "out")
    with pytest.raises(InputError) as caught:
        load(tmp_path / "out")
    assert [problem.name for problem in caught.value.problems] == ["moving", "moving_labels", "landmarks"]
    assert all("in memory" in problem.reason and "Give it" in problem.fix for problem in caught.value.problems)
    assert same(load(tmp_path / "out", **held, moving_labels=mask), result)
    again = load(tmp_path / "out", moving=files["moving"], moving_labels=tmp_path / "mask.nii.gz", landmarks=held["landmarks"])
    assert again.pair.moving_labels.names == ("T2",) and torch.equal(again.moved_labels, result.moved_labels)
    there = moving.affine + np.pad([[3.0], [0], [0]], ((0, 1), (3, 0)))
    for values, affine in ((held["moving"][0] + 1, moving.affine), (held["moving"][0], there)):
        with pytest.raises(InputError, match="not those that were in memory"):
            load(tmp_path / "out", moving=(values, affine), moving_labels=(mask.dataobj, affine), landmarks=held["landmarks"])


def test_E4_two_lists_of_landmarks_are_two_files(images, files, tmp_path):
    """E4: each is compared; new places are given as they were given at first."""
    marks, places = read_landmarks(files["landmarks"]), [tmp_path / f"{name}.csv" for name in ("mr", "ct")]
    for points, path in zip((marks.fixed_mm, marks.moving_mm), places):
        pd.DataFrame(points.numpy(), columns=AXES).assign(name=marks.names).to_csv(path, index=False)
    result = spinereg.register(**images, landmarks=tuple(places), **QUICK, method="rigid", out_dir=tmp_path / "out")
    assert same(load(tmp_path / "out"), result)
    elsewhere = shutil.copy(places[1], tmp_path / "points.csv")
    places[1].write_text("another")
    with pytest.raises(InputError, match="ct.csv"):
        load(tmp_path / "out")
    assert load(tmp_path / "out", landmarks=(places[0], elsewhere)).pair.landmarks.names == result.pair.landmarks.names


# results


def rewritten(folder, place, change):
    "A copy of a result whose metrics.json says something else, with a manifest that knows it."
    shutil.copytree(folder, place)
    said = json.loads((place / "metrics.json").read_text())
    change(said)
    (place / "metrics.json").write_text(json.dumps(said))
    write_manifest(place, read_manifest(place)["files"] | {"metrics.json": describe(place / "metrics.json")}, whole=True)
    return place


def test_E4_D_manifest_what_is_no_whole_result_of_this_version_is_refused(plain, tmp_path):
    """E4, D-manifest: damaged, incomplete, older, a map alone, no folder at all."""
    out = plain[1]
    for name, word in (("moved.nii.gz", "changed since it was written"), (MANIFEST, "expected a manifest.json")):
        place = Path(shutil.copytree(out, tmp_path / name))
        (place / name).write_bytes(b"nothing")
        with pytest.raises(InputError, match=word):
            load(place)
    older = rewritten(out, tmp_path / "older", lambda said: [said.pop(name) for name in ("inputs", "vertebrae")])
    with pytest.raises(InputError, match=r"no inputs and no vertebrae: spinereg .* did not write down .* Register again"):
        load(older)
    alone = rewritten(out, tmp_path / "map", lambda said: None)
    (alone / "metrics.json").unlink()
    write_manifest(alone, {name: said for name, said in read_manifest(alone)["files"].items() if name != "metrics.json"}, whole=True)
    with pytest.raises(InputError, match="no metrics.json.*read_transform"):
        load(alone)
    with pytest.raises(InputError, match="no such folder"):
        load(tmp_path / "nowhere")


def test_E4_a_result_without_figures_of_this_version_is_refused_and_measured_anew(polyrigid, plain, files, tmp_path):
    """E4: says which figures it lacks and how to have them; without labels there is nothing to lack."""
    fewer = rewritten(polyrigid[1], tmp_path / "fewer", lambda said: [said["vertebrae"].pop("aligned_distance_mm"), said["labels"].pop("whole")])
    with pytest.raises(InputError, match=r"no aligned_distance_mm and no whole: spinereg .* Measure its map anew, evaluate_transform\("):
        load(fewer)
    anew = spinereg.evaluate_transform(fewer, **files, spacing_mm=4.0)
    columns = ["aligned_distance_mm", "aligned_angle_deg", "relative_distance_mm"]
    assert np.allclose(anew.vertebrae[columns], polyrigid[0].vertebrae[columns], atol=0.05, equal_nan=True)
    assert anew.metrics.labels == polyrigid[0].metrics.labels
    none = {"vertebrae": {"distance_mm": {}}, "labels": {"only_moving": [], "only_fixed": [], "missing": []}, "certainty": {}}
    assert load(rewritten(polyrigid[1], tmp_path / "none", lambda said: said.update(none))).metrics.labels == LabelFigures((), ())
    assert load(rewritten(plain[1], tmp_path / "plain", lambda said: None)).summary() == plain[0].summary()
