"What is in memory is as good as a file: images of nibabel, SimpleITK and NumPy, and tables."

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

import spinereg
from spinereg.files.nifti import read_nifti
from spinereg.files.pairs import read_landmarks, read_pair, write_landmarks
from spinereg.files.points import AXES, read_points, write_points
from spinereg.files.problems import InputError, InputFile

CASE = Path(__file__).parent.parent / "data_samples/test/easy_0"
FILES = {"fixed": "mr_t1", "moving": "ct", "moving_labels": "ct_mask", "fixed_labels": "mr_mask"}
PATHS = {name: CASE / f"{file}.nii.gz" for name, file in FILES.items()}
KINDS = {
    "nibabel": nib.load,
    "NIfTI-2": lambda path: nib.Nifti2Image.from_image(nib.load(path)),
    "MGH": lambda path: nib.MGHImage(np.asarray(nib.load(path).dataobj).astype(np.int32), nib.load(path).affine),
    "SimpleITK": sitk.ReadImage,
    "array and affine": lambda path: (np.asarray(nib.load(path).dataobj), nib.load(path).affine),
    "tensor and affine": lambda path: (torch.from_numpy(np.asarray(nib.load(path).dataobj).astype(np.int32)), nib.load(path).affine.tolist()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_f11_images_in_memory_are_read_as_their_files_are(kind):
    """F11: the same voxels in the same place, whoever holds them."""
    files = read_pair(**PATHS)
    memory = read_pair(**{name: KINDS[kind](path) for name, path in PATHS.items()})
    for name in ("fixed", "moving", "moving_labels", "fixed_labels"):
        one, other = getattr(files, name), getattr(memory, name)
        assert torch.equal(one.data, other.data) and np.abs(one.grid.corners_mm() - other.grid.corners_mm()).max() < 1e-3
    assert memory.moving_labels.names == files.moving_labels.names and memory.moving_modality == "ct"
    assert "in memory)" in str(memory.notices[0])


@pytest.mark.parametrize(
    "given", [np.zeros((9, 9, 9)), (np.zeros((9, 9, 9)),), (np.zeros((9, 9, 9)), np.eye(3)), 7, ("a", "b")]
)
def test_f11_what_is_no_image_is_refused_in_one_sentence(given):
    """F11: with what was expected."""

    with pytest.raises(InputError, match="in memory\\): it is no image .*Give the path of a NIfTI file, an image of nibabel or SimpleITK"):
        read_nifti(InputFile("fixed", given))


def test_f11_bad_images_in_memory_meet_the_checks_of_files():
    """F11: NaN, no orientation, too few slices."""
    image = nib.load(PATHS["moving"])
    data = np.asarray(image.dataobj).astype(np.float32)
    holes = data.copy()
    holes[20:40, 20:60, 40:90] = np.nan
    nowhere = nib.Nifti1Image(data, None)
    for given, reason in (((holes, image.affine), "NaN or infinite"), (nowhere, "no orientation"), ((data[:5], image.affine), "no volume")):
        with pytest.raises(InputError, match=reason):
            read_pair(PATHS["fixed"], given)


def test_f11_register_and_apply_take_what_is_in_memory(tmp_path):
    """F11: a record that says what it was made of, and a point table carried."""
    table = pd.read_csv(CASE / "landmarks.csv")
    quick = {"spacing_mm": 4.0, "method": "rigid", "prealign": "header", "device": torch.device("cpu")}
    images = {name: KINDS["SimpleITK"](path) for name, path in PATHS.items()}
    result = spinereg.register(**images, landmarks=table, out_dir=tmp_path / "out", **quick)
    record = result.metrics.as_dict()["parameters"]
    assert record["moving"] == "(moving, in memory)" and record["landmarks"] == "(landmarks, in memory)" and record["device"] == "cpu"
    points = pd.DataFrame(result.pair.fixed.grid.centre_mm[None], columns=AXES)
    moved = read_points(spinereg.apply(tmp_path / "out", points, tmp_path / "there.csv", to="moving"))
    assert np.allclose(moved[AXES].to_numpy(), result.transform.points(torch.tensor(points.to_numpy())).numpy(), atol=1e-3)
    ct = nib.load(PATHS["moving"])
    warped = spinereg.apply(tmp_path / "out", ct, tmp_path / "moved.nii.gz", onto=sitk.ReadImage(PATHS["fixed"]))
    assert nib.load(warped).shape == nib.load(PATHS["fixed"]).shape


def test_f6_landmarks_of_slicer_are_two_lists_that_meet_by_name(tmp_path):
    """F6: markups in their own coordinate system, in any order; the vertebra from the name."""
    marks = read_landmarks(CASE / "landmarks.csv")
    names = [f"{bone} {name}" if bone else name for name, bone in zip(marks.names, marks.vertebra)]
    lists = [pd.DataFrame(points.numpy(), columns=AXES).assign(name=names) for points in (marks.fixed_mm, marks.moving_mm)]
    paths = [write_points(tmp_path / f"{side}.mrk.json", table.sample(frac=1, random_state=k)) for k, (side, table) in enumerate(zip("fm", lists))]
    found = read_landmarks(paths)
    order = [names.index(name) for name in found.names]
    assert sorted(order) == list(range(len(names))) and found.vertebra == tuple(marks.vertebra[k] for k in order)
    assert torch.allclose(found.fixed_mm, marks.fixed_mm[order]) and torch.allclose(found.moving_mm, marks.moving_mm[order])
    pair = read_pair(**PATHS, landmarks=paths)
    assert len(pair.landmarks.names) == len(names)
    with pytest.raises(InputError, match="points without a partner: in the fixed image .*of 1.*in the moving one none"):
        read_landmarks((lists[0], lists[1].iloc[1:]))
    with pytest.raises(InputError, match="points of one image.*Give those of both"):
        read_landmarks(paths[0])
    with pytest.raises(InputError, match="points without a name"):
        read_landmarks((lists[0].assign(name="a"), lists[1]))
    with pytest.raises(InputError, match="fixed points lie outside|moving points lie outside"):
        read_pair(**PATHS, landmarks=(lists[0], lists[1].assign(z_mm=lists[1].z_mm + 900)))


def test_f11_names_of_points_stay_as_they_are():
    """F11: leading zeros too; a point without a name has no partner."""
    table = pd.DataFrame([["001", 1.0, 2, 3], ["002", 4, 5, 6]], columns=["name", *AXES])
    assert read_points(table).name.tolist() == ["001", "002"]
    with pytest.raises(InputError, match="points without a name"):
        read_landmarks((table.assign(name=["001", None]), table))


def test_f11_half_floats_and_masks_are_images(tmp_path):
    """F11: types that NIfTI does not know are turned into ones that it does."""
    data = np.random.default_rng(0).integers(0, 2, (9, 9, 9))
    for kind in (np.float16, bool):
        assert np.array_equal(read_nifti(InputFile("fixed", (data.astype(kind), np.eye(4))))[0], data)


def test_f11_landmarks_in_a_table_are_those_of_its_csv(tmp_path):
    """F11: and what is no table is refused."""
    marks = read_landmarks(CASE / "landmarks.csv")
    again = read_landmarks(pd.read_csv(write_landmarks(tmp_path / "again.csv", marks)))
    assert again.names == marks.names and torch.equal(again.fixed_mm, marks.fixed_mm)
    with pytest.raises(InputError, match="columns are missing"):
        read_landmarks(pd.DataFrame({"x": [1]}))


def test_f14_what_is_carried_is_never_replaced(tmp_path):
    """F14: an output that is the input, by whatever way it is spelt; an empty out_dir is no folder."""
    mine = Path(shutil.copy(PATHS["moving"], tmp_path / "ct.nii.gz"))
    (tmp_path / "deep").mkdir()
    with pytest.raises(InputError, match="it is read to be made"):
        spinereg.apply(tmp_path / "no such transform", mine, tmp_path / "deep/../ct.nii.gz", onto=PATHS["fixed"])
    assert mine.read_bytes() == PATHS["moving"].read_bytes()
    with pytest.raises(ValueError, match="out_dir='': expected the path of a folder"):
        spinereg.register(PATHS["fixed"], PATHS["moving"], out_dir="")


def test_f14_the_table_of_a_check_has_a_place_before_a_case_is_read(tmp_path, monkeypatch):
    """F14: a file is no folder."""
    monkeypatch.setattr("spinereg.learning.cases.find_cases", lambda *given: pytest.fail("cases were looked for"))
    (tmp_path / "file").write_text("")
    with pytest.raises((InputError, OSError), match="file"):
        spinereg.check(CASE.parent.parent, out_dir=tmp_path / "file")


@pytest.mark.parametrize("out", ["moved.png", "moved", "folder.nii.gz", "x" * 250 + ".nii.gz", "file.csv/moved.nii.gz"])
def test_f14_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, out):
    """F14: an ending, a folder, a long name, a place that is none; without names of folders of our own."""
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "file.csv").write_text("")
    with pytest.raises((InputError, OSError)) as refused:
        spinereg.apply(tmp_path / "no such transform", PATHS["moving"], tmp_path / out, onto=PATHS["fixed"])
    assert "no such transform" not in str(refused.value) and ".partial" not in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.csv", "folder.nii.gz"]


def test_f10_a_device_in_every_form_that_pytorch_users_write():
    """F10: torch.device, a number, gpu; what is no device of ours is refused with the list of those that are."""
    from spinereg.registration.run import choose_device

    assert choose_device(torch.device("cpu")) == choose_device("cpu") == torch.device("cpu")
    for wrong in ("tpu", "mps", "", -1, True, "cuda:x", torch.device("meta")):
        with pytest.raises(ValueError, match="expected 'auto', 'cpu', 'cuda'"):
            choose_device(wrong)
    if not torch.cuda.is_available():
        for given in ("gpu", "cuda", 0, "gpu:0", torch.device("cuda", 1)):
            with pytest.raises(ValueError, match="sees 0 CUDA GPUs"):
                choose_device(given)
