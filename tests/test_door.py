"""At the door: files that claim too much, hold something else, have odd names, or lie in ~; each is read right, or refused by name."""

import contextlib
import errno
import gzip
import os
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pandas as pd
import psutil
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spinereg
from spinereg.files.foreign import read_itk, read_map
from spinereg.files.manifest import check_room, write_result
from spinereg.files.nifti import open_nifti, read_nifti, write_image
from spinereg.files.pairs import COORDINATES, read_landmarks, read_pair
from spinereg.files.points import read_points, write_points
from spinereg.files.problems import InputError, InputFile, write_atomic
from spinereg.files.transforms import read_rigid, read_transform, write_itk
from spinereg.files.volumes import read_image
from spinereg.learning.cases import check, find_cases
from spinereg.registration.prealign import prealign_fault

VOXELS = np.random.default_rng(0).normal(100, 20, (10, 12, 14)).astype("float32")
SPACE = np.array([[-1.2, 0, 0, 7], [0, 1.5, 0, -8], [0, 0, 2, 9], [0, 0, 0, 1]])
POINTS = f"name,vertebra,{','.join(COORDINATES)}\ntip,L3,1,2,3,4,5,6\n"


def content(**fields):
    "The bytes of a NIfTI file whose header says something else in some fields."
    image = nib.Nifti1Image(VOXELS, SPACE)
    image.set_qform(SPACE, 1)
    raw = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    return bytes(header.binaryblock) + bytes(raw[348:])


def refused(read, *parts):
    "The text of the InputError."
    with pytest.raises(InputError) as caught:
        read()
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    return str(caught.value)


def opened(path, raw):
    "What is read of bytes, and what was noticed about them."
    path.write_bytes(raw)
    file = InputFile("moving", path)
    data, native = read_nifti(file)
    return data, native, [notice.text for notice in file.notices]


# ~


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A home folder, and another one to work in."
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "home"
    assert not list((tmp_path / "work").iterdir())


def test_F1_inputs_may_lie_in_the_home_folder(home):
    (home / "ct.nii").write_bytes(content())
    (home / "marks.csv").write_text(POINTS)
    (home / "points.csv").write_text("x_mm,y_mm,z_mm\n1,2,3\n")
    write_itk(home / "start.tfm", sitk.Euler3DTransform())
    assert read_image("~/ct.nii").native.path == home / "ct.nii"
    assert read_landmarks("~/marks.csv").names == ("tip",)
    assert len(read_points("~/points.csv")) == 1
    assert np.allclose(read_rigid(InputFile("prealign", "~/start.tfm")), np.eye(4))
    assert not prealign_fault("~/start.tfm")
    assert read_itk("~/start.tfm").GetDimension() == 3


def test_F1_results_go_to_the_home_folder(home):
    (home / "ct.nii").write_bytes(content())
    data, native = read_nifti(InputFile("moving", "~/ct.nii"))
    assert write_image("~/out/again.nii.gz", torch.from_numpy(data), native) == home / "out/again.nii.gz"
    assert write_points("~/out/a.csv", pd.DataFrame([[1.0, 2, 3]], columns=["x_mm", "y_mm", "z_mm"])).parent == home / "out"
    check_room("~/run", ["moved.txt"])
    with write_result("~/run") as aside:
        (aside / "moved.txt").write_text("1")
    refused(lambda: check_room("~/run", ["moved.txt"], ["~/run/moved.txt"]), "the run reads that")
    assert sorted(path.name for path in (home / "run").iterdir()) == ["manifest.json", "moved.txt"]


def test_F1_a_split_may_lie_in_the_home_folder(home):
    (home / "data/val/one").mkdir(parents=True)
    for name in ("ct", "mr"):
        (home / f"data/val/one/{name}.nii").write_bytes(content())
    assert [case.name for case in find_cases("~/data", "val")[0]] == ["one"]


# what a header claims


@pytest.mark.parametrize("excess", [1.0, 1 + 2e-7, 1 + 1e-6, 1.005])
def test_F8_a_quaternion_that_rounding_made_too_long_is_read(tmp_path, excess):
    "The same 180 degree turn as with a quaternion of length 1; what is written with it is read by nibabel."
    turned = {"sform_code": 0, "quatern_b": 0, "quatern_c": excess, "quatern_d": 0}
    data, native, said = opened(tmp_path / "ct.nii", content(**turned))
    assert said == []
    _, exact, _ = opened(tmp_path / "exact.nii", content(**turned | {"quatern_c": 1}))
    assert np.allclose(native.affine, exact.affine, atol=1e-5)
    written = nib.load(write_image(tmp_path / "out.nii", torch.from_numpy(data), native))
    assert np.allclose(written.affine, exact.affine, atol=1e-5)


def test_F8_what_never_was_a_quaternion_is_refused(tmp_path):
    (tmp_path / "ct.nii").write_bytes(content(sform_code=0, quatern_b=0, quatern_c=1.1, quatern_d=0))
    refused(lambda: read_image(tmp_path / "ct.nii"), "ct.nii", "not finite")


@pytest.mark.parametrize(("unit", "factor"), [(1, 1e-3), (3, 1e3)])
@pytest.mark.parametrize("kind", ["sform", "qform", "both"])
def test_F17_metres_and_micrometres_are_what_they_say(tmp_path, unit, factor, kind):
    "As ITK reads them; a result written in that space is in mm."
    scaled = SPACE * np.array([[factor]] * 3 + [[1]])
    image = nib.Nifti1Image(VOXELS, None)
    image.set_sform(scaled, int(kind != "qform"))
    image.set_qform(scaled, int(kind != "sform"))
    image.header["xyzt_units"] = unit | 8
    nib.save(image, tmp_path / "ct.nii")
    data, native, said = opened(tmp_path / "ct.nii", (tmp_path / "ct.nii").read_bytes())
    assert np.allclose(native.affine, SPACE, atol=1e-4)
    assert len(said) == 1
    out = write_image(tmp_path / "out.nii", torch.from_numpy(data), native)
    assert nib.load(out).header.get_xyzt_units() == ("mm", "sec")
    assert np.allclose(nib.load(out).affine, SPACE, atol=1e-4)
    _, again, nothing = opened(tmp_path / "again.nii", out.read_bytes())
    assert again.grid.same_as(native.grid, 1e-4)
    assert nothing == []
    assert np.allclose(sitk.ReadImage(str(out)).GetSpacing(), sitk.ReadImage(str(tmp_path / "ct.nii")).GetSpacing(), rtol=1e-4)


@pytest.mark.parametrize("unit", [1, 3])
def test_F17_a_wrong_unit_is_taken_for_mm_and_not_handed_on(tmp_path, unit):
    data, native, said = opened(tmp_path / "ct.nii", content(xyzt_units=unit))
    assert np.allclose(native.affine, SPACE, atol=1e-5)
    assert "1.2 x 1.5 x 2 mm" in said[0]
    assert nib.load(write_image(tmp_path / "out.nii", torch.from_numpy(data), native)).header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize("unit", [0, 2, 10, 7])
def test_F17_mm_and_no_unit_are_mm_without_a_word(tmp_path, unit):
    _, native, said = opened(tmp_path / "ct.nii", content(xyzt_units=unit))
    assert np.allclose(native.affine, SPACE, atol=1e-5)
    assert said == []


def test_F17_a_unit_that_makes_no_spine_is_refused(tmp_path):
    raw = content(xyzt_units=1, srow_x=[30, 0, 0, 0], srow_y=[0, 30, 0, 0], srow_z=[0, 0, 30, 0])
    (tmp_path / "ct.nii").write_bytes(raw[:76] + np.array([1, 30, 30, 30], "float32").tobytes() + raw[92:])
    refused(lambda: read_image(tmp_path / "ct.nii"), "ct.nii", "metres")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("side", [40, 2000, 32767])
def test_header_claims_are_compared_with_the_file_before_memory_is_taken(tmp_path, side, packed):
    raw = content(dim=[3, side, side, side, 1, 1, 1, 1])
    path = tmp_path / "ct.nii"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    before, start = psutil.Process().memory_info().rss, time.monotonic()
    refused(lambda: read_image(path, "moving"), "moving", "ct.nii", f"{side} x {side} x {side}" if side > 40 else "its header says")
    assert psutil.Process().memory_info().rss - before < 50e6
    assert time.monotonic() - start < 2


def test_X21_header_claims_that_fit_the_file_but_not_the_memory(tmp_path, monkeypatch):
    (tmp_path / "ct.nii").write_bytes(content())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 1000}))
    refused(lambda: read_image(tmp_path / "ct.nii"), "ct.nii", "of memory", "Crop it")


def test_X21_a_gzip_bomb_is_not_unpacked(tmp_path):
    "100 MB of zeros behind the voxels; and 300 MB before them are skipped without being kept."
    (tmp_path / "ct.nii.gz").write_bytes(gzip.compress(content()) + gzip.compress(bytes(10**8), 1))
    far = content(vox_offset=352 + 2**28)[:352], bytes(2**28), VOXELS.tobytes(order="F")
    (tmp_path / "far.nii.gz").write_bytes(b"".join(gzip.compress(part, 1) for part in far))
    before = psutil.Process().memory_info().rss
    refused(lambda: read_image(tmp_path / "ct.nii.gz"), "ct.nii.gz", "more than 4096 follow")
    assert np.array_equal(open_nifti(InputFile("moving", tmp_path / "far.nii.gz"))[1], VOXELS)
    assert psutil.Process().memory_info().rss - before < 50e6


def test_padding_is_noticed_and_more_is_refused(tmp_path):
    data, _, said = opened(tmp_path / "ct.nii", content() + bytes(160))
    assert said == ["160 bytes behind the last voxel are not read"]
    assert np.array_equal(data, VOXELS[::-1])
    (tmp_path / "ct.nii").write_bytes(content() + bytes(5000))
    refused(lambda: read_image(tmp_path / "ct.nii"), "ct.nii", "more than 4096 follow")


@pytest.mark.parametrize("offset", [np.nan, np.inf, -np.inf, -352, 1, 348, 351, 352.5, 1e30])
def test_voxels_that_begin_nowhere(tmp_path, offset):
    (tmp_path / "ct.nii").write_bytes(content(vox_offset=offset))
    refused(lambda: read_image(tmp_path / "ct.nii"), "ct.nii", "cannot be read as NIfTI")


def test_voxels_that_begin_at_zero_are_read_behind_the_header_if_they_fill_the_file(tmp_path):
    data, _, said = opened(tmp_path / "ct.nii", content(vox_offset=0))
    assert np.array_equal(data, VOXELS[::-1])
    assert "352" in said[0]
    for raw in (content(vox_offset=0) + b"\0", content(vox_offset=0)[:348] + VOXELS.tobytes(order="F")):
        (tmp_path / "ct.nii").write_bytes(raw)
        refused(lambda: read_image(tmp_path / "ct.nii"), "ct.nii", "byte")


DIMENSIONS = [0] * 8, [3, -10, 12, 14, 1, 1, 1, 1], [9, 10, 12, 14, 1, 1, 1, 1]


@pytest.mark.parametrize("fields", [*({"dim": dim} for dim in DIMENSIONS), {"datatype": 1}, {"datatype": 77}])
def test_dimensions_and_types_that_are_none(tmp_path, fields):
    (tmp_path / "ct.nii").write_bytes(content(**fields))
    refused(lambda: read_image(tmp_path / "ct.nii"), "ct.nii", "cannot be read as NIfTI")


def test_a_memory_error_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "ct.nii").write_bytes(content())

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(nib.arrayproxy, "ArrayProxy", full)
    refused(lambda: read_image(tmp_path / "ct.nii", "moving"), "moving", "ct.nii", "memory")


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_headers_with_changed_bytes_are_read_or_refused(tmp_path_factory, changes, packed):
    raw = bytearray(content())
    for place, value in changes:
        raw[place] = value
    path = tmp_path_factory.mktemp("bytes") / "ct.nii"
    path.write_bytes(gzip.compress(raw, 1) if packed else raw)
    with contextlib.suppress(InputError):
        data, native = read_nifti(InputFile("moving", path))
        out = write_image(path.with_name("out.nii"), torch.from_numpy(data.astype("float32")), native)
        assert np.allclose(nib.load(out).affine, native.affine, rtol=1e-4, atol=1e-3)


# tables

TABLES = {
    "long field": POINTS.encode() + b'"' + b"a" * 200_000 + b'",L3,1,2,3,4,5,6\n',
    "zero bytes": POINTS.encode().replace(b"1", b"1\0"),
    "UTF-16": POINTS.encode("utf-16"),
    "spreadsheet": b"PK\x03\x04\x14\x00\x06\x00" * 50,
    "random": np.random.default_rng(0).bytes(5000),
    "gzip": gzip.compress(POINTS.encode()),
}


@pytest.mark.parametrize("what", TABLES)
@pytest.mark.parametrize("ending", ["csv", "fcsv", "mrk.json"])
def test_tables_that_are_none_are_refused_by_name(tmp_path, what, ending):
    path = tmp_path / f"marks.{ending}"
    path.write_bytes(TABLES[what])
    refused(lambda: read_points(path, "what"), "what", f"marks.{ending}")
    refused(lambda: read_landmarks(path), "landmarks", f"marks.{ending}")


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text(POINTS.replace("\n", ",fixed_x_mm\n", 1).replace("6\n", "6,9\n"))
    (tmp_path / "b.csv").write_text("x_mm,y_mm,z_mm,x_mm\n1,2,3,4\n")
    refused(lambda: read_landmarks(tmp_path / "a.csv"), "a.csv", "fixed_x_mm")
    refused(lambda: read_points(tmp_path / "b.csv"), "b.csv", "x_mm.1")


MIXED = '{"markups": [{"coordinateUnits": null, "controlPoints": []}, {"controlPoints": []}]}'


@pytest.mark.parametrize("text", ["[" * 100_000, MIXED, "[]", "3", '{"markups": 3}'], ids=["deep", "mixed", "list", "number", "no list"])
def test_markups_that_are_none_are_refused_by_name(tmp_path, text):
    (tmp_path / "a.mrk.json").write_text(text)
    refused(lambda: read_points(tmp_path / "a.mrk.json"), "a.mrk.json")


# names that are no text


@pytest.fixture
def odd(tmp_path):
    "A data set whose folder, case and files have names that are no UTF-8."
    if sys.platform != "linux":
        pytest.skip("names there are text")
    folder = os.fsencode(tmp_path) + b"/caf\xe9/val/\xffone"
    os.makedirs(folder)
    for name in (b"ct.nii", b"mr.nii", b"\xe9.nii.gz"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(content(xyzt_units=1))
    with open(folder + b"/landmarks.csv", "wb") as file:
        file.write(POINTS.replace("L3", "L99").encode())
    return os.fsdecode(folder)


def test_X22_names_that_are_no_text_are_shown_spelt_out(odd):
    "In every problem and notice; as it is shown, in quotes, the name opens the file."
    for path in (f"{odd}/nothing.nii", os.fsdecode(os.fsencode(odd) + b"/\xe9.nii.gz")):
        text = refused(lambda path=path: read_image(path, "moving"), r"caf\udce9", r"\udcffone")
        text.encode("utf-8")
    image = read_image(f"{odd}/ct.nii")
    "".join(map(str, image.notices)).encode("utf-8")
    for read in (read_landmarks, read_points):
        refused(lambda read=read: read(f"{odd}/landmarks.csv"), r"\udcffone").encode("utf-8")
    with pytest.raises(InputError) as caught:
        read_pair(f"{odd}/mr.nii", f"{odd}/ct.nii", landmarks=f"{odd}/landmarks.csv")
    "".join(map(str, [caught.value, *caught.value.notices])).encode("utf-8")
    refused(lambda: read_rigid(InputFile("prealign", f"{odd}/no.tfm")), r"\udcffone").encode("utf-8")
    refused(lambda: read_itk(f"{odd}/ct.nii"), r"\udcffone").encode("utf-8")


def test_X22_check_lists_cases_whose_names_are_no_text(odd, tmp_path, capsys):
    table = check(os.path.dirname(os.path.dirname(odd)), "val", prealign="header", out_dir=tmp_path / "out")
    assert set(table.case) == {r"val/\udcffone"}
    assert r"\udce9.nii.gz" in set(table.file)
    assert len(pd.read_csv(tmp_path / "out/check.csv")) == len(table)
    "".join(capsys.readouterr()).encode("utf-8")


def test_X22_a_result_folder_whose_name_is_no_text_is_refused_before_the_work(odd):
    refused(lambda: check_room(odd, []), r"\udcffone", "UTF-8").encode("utf-8")


# transforms

HEAD = "#Insight Transform File V1.0\n#Transform 0\n"
EULER, AFFINE = "Transform: Euler3DTransform_double_3_3\n", "Transform: AffineTransform_double_3_3\n"
FIXED = "FixedParameters: 0 0 0\n"
TEXTS = {
    "five of six": EULER + "Parameters: 0 0 0 1 2\n" + FIXED,
    "seven of six": EULER + "Parameters: 0 0 0 1 2 3 4\n" + FIXED,
    "none at all": EULER,
    "no fixed ones": EULER + "Parameters: 0 0 0 1 2 3\n",
    "nothing": "",
    "no class": "Parameters: 0 0 0 1 2 3\n" + FIXED,
    "unknown class": "Transform: FancyTransform_double_3_3\nParameters: 1\n" + FIXED,
    "plane": "Transform: AffineTransform_double_2_2\nParameters: 1 0 0 1 0 0\nFixedParameters: 0 0\n",
    "NaN": AFFINE + "Parameters: 1 0 0 0 1 0 0 0 1 nan 2 3\n" + FIXED,
    "infinite": AFFINE + "Parameters: 1 0 0 0 1 0 0 0 1 1e999 2 3\n" + FIXED,
    "NaN centre": AFFINE + "Parameters: 1 0 0 0 1 0 0 0 1 0 0 0\nFixedParameters: nan 0 0\n",
    "a word": AFFINE + "Parameters: 1 0 0 0 1 0 0 0 1 zero 2 3\n" + FIXED,
    "decimal comma": EULER + "Parameters: 0,5 0 0 1 2 3\n" + FIXED,
    "two": 2 * (EULER + "Parameters: 0 0 0 1 2 3\n" + FIXED),
    "empty composite": "Transform: CompositeTransform_double_3_3\n",
    "short field": f"Transform: DisplacementFieldTransform_double_3_3\nParameters: 0 0 0\nFixedParameters: 9 9 9 0 0 0 1 1 1 {'1 0 0 0 1 0 0 0 1'}\n",
    "short spline": f"Transform: BSplineTransform_double_3_3\nParameters: 0 0 0\nFixedParameters: 4 4 4 0 0 0 1 1 1 {'1 0 0 0 1 0 0 0 1'}\n",
    "zero bytes": "\0" * 50,
}


@pytest.mark.parametrize("what", TEXTS)
def test_text_that_is_no_transform_never_reaches_itk(tmp_path, monkeypatch, what):
    "Some of these end the process, or are read as the identity, when ITK reads them."
    monkeypatch.setattr(sitk, "ReadTransform", lambda path: pytest.fail(f"ITK reads {what}"))
    (tmp_path / "start.tfm").write_text(HEAD + TEXTS[what])
    refused(lambda: read_rigid(InputFile("prealign", tmp_path / "start.tfm")), "prealign", "start.tfm")
    refused(lambda: read_itk(tmp_path / "start.tfm"), "start.tfm")


GOOD = [
    *(sitk.Euler3DTransform((1, 2, 3), 0.1, 0.2, 0.3, (4, 5, 6)), sitk.VersorRigid3DTransform(), sitk.TranslationTransform(3, (1, 2, 3))),
    *(sitk.Transform(3, sitk.sitkIdentity), sitk.AffineTransform(3), sitk.Similarity3DTransform(), sitk.VersorTransform(), sitk.ScaleTransform(3)),
    *(sitk.ScaleVersor3DTransform(), sitk.ScaleSkewVersor3DTransform(), sitk.BSplineTransform(3, 3)),
    sitk.DisplacementFieldTransform(sitk.Image([4, 4, 4], sitk.sitkVectorFloat64, 3)),
    sitk.CompositeTransform([sitk.Euler3DTransform((1, 2, 3), 0.1, 0.2, 0.3), sitk.TranslationTransform(3, (1, 2, 3))]),
]


@pytest.mark.parametrize("ending", ["tfm", "txt", "mat", "h5"])
@pytest.mark.parametrize("transform", GOOD, ids=lambda transform: transform.GetName())
def test_what_itk_writes_is_read(tmp_path, transform, ending):
    if ending == "mat" and transform.GetName() == "CompositeTransform":
        pytest.skip("the format holds one transform")
    write_itk(tmp_path / f"start.{ending}", transform)
    there = read_itk(tmp_path / f"start.{ending}").TransformPoint((7.0, 8.0, 9.0))
    assert there == pytest.approx(transform.TransformPoint((7.0, 8.0, 9.0)))


OTHERS = [("MatrixOffsetTransformBase", "1 0 0 0 1 0 0 0 1 1 2 3"), ("QuaternionRigidTransform", "0 0 0 1 1 2 3")]


@pytest.mark.parametrize(("name", "numbers"), OTHERS)
def test_classes_that_simpleitk_cannot_write_are_read(tmp_path, name, numbers):
    "The first is in older files of ANTs."
    (tmp_path / "start.tfm").write_text(f"{HEAD}Transform: {name}_double_3_3\nParameters: {numbers}\n{FIXED}")
    rigid = read_rigid(InputFile("prealign", tmp_path / "start.tfm"))
    assert np.allclose(rigid, [[1, 0, 0, -1], [0, 1, 0, -2], [0, 0, 1, 3], [0, 0, 0, 1]])


@pytest.mark.parametrize("ending", ["tfm", "mat", "h5"])
@pytest.mark.parametrize("what", ["plane", "NaN", "infinite"])
def test_transforms_of_the_plane_or_without_numbers_are_refused(tmp_path, ending, what):
    transform = sitk.AffineTransform(2 if what == "plane" else 3)
    if what != "plane":
        transform.SetTranslation((0, {"NaN": np.nan, "infinite": np.inf}[what], 0))
    write_itk(tmp_path / f"transform.{ending}", transform)
    refused(lambda: read_rigid(InputFile("prealign", tmp_path / f"transform.{ending}")), f"transform.{ending}")
    refused(lambda: read_itk(tmp_path / f"transform.{ending}"), f"transform.{ending}")
    refused(lambda: read_transform(tmp_path / f"transform.{ending}"), f"transform.{ending}")


@pytest.mark.parametrize("ending", ["tfm", "mat", "h5"])
def test_damaged_transforms_are_refused_or_read(tmp_path, ending):
    "Cut anywhere; none of them is the identity by mistake."
    path = write_itk(tmp_path / f"start.{ending}", sitk.Euler3DTransform((1, 2, 3), 0.125, 0.25, 0.375, (4.25, 5.5, 6.75)))
    raw = path.read_bytes()
    for kept in range(0, len(raw) - 12, max(len(raw) // 25, 1)):
        path.write_bytes(raw[:kept])
        refused(lambda: read_rigid(InputFile("prealign", path)), path.name)


IMAGES = {
    "scalars": sitk.Image([9, 9, 9], sitk.sitkFloat32),
    "four numbers": sitk.Image([9, 9, 9], sitk.sitkVectorFloat32, 4),
    "plane": sitk.Image([9, 9], sitk.sitkVectorFloat32, 2),
    "plane of three": sitk.Image([9, 9], sitk.sitkVectorFloat32, 3),
    "NaN": sitk.Image([9, 9, 9], sitk.sitkVectorFloat32, 3),
}
IMAGES["NaN"][4, 4, 4] = (0, np.nan, 0)


@pytest.mark.parametrize("ending", ["nii.gz", "mha", "nrrd"])
@pytest.mark.parametrize("what", IMAGES)
def test_images_that_are_no_displacement_are_refused(tmp_path, what, ending):
    sitk.WriteImage(IMAGES[what], str(tmp_path / f"warp.{ending}"))
    refused(lambda: read_itk(tmp_path / f"warp.{ending}"), f"warp.{ending}")


@pytest.mark.parametrize("ending", ["nii.gz", "nii", "mha", "nrrd"])
def test_displacements_that_are_cut_off_or_claim_too_much_are_refused(tmp_path, ending):
    path = tmp_path / f"warp.{ending}"
    sitk.WriteImage(sitk.Image([9, 9, 9], sitk.sitkVectorFloat32, 3), str(path))
    assert read_map(path).points(torch.zeros(1, 3)).abs().max() < 1e-5
    raw = path.read_bytes()
    for cut in (raw[:-9], raw[: len(raw) // 2], raw.replace(b"9 9 9", b"90000 90000 90000")):
        if cut != raw:
            path.write_bytes(cut)
            refused(lambda: read_itk(path), path.name)


# folders that are written into

WRITER = """
import sys
from spinereg.files.problems import write_atomic
print("ready", flush=True)
sys.stdin.readline()
for number in range(60):
    write_atomic("both.txt", lambda path: path.write_text(sys.argv[1] * 10_000))
    write_atomic(f"{sys.argv[1]}.txt", lambda path: path.write_text(str(number)))
"""


def test_F16_two_processes_that_write_into_one_folder(tmp_path):
    "Each file is whole at every moment, and nothing is left."
    start = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name], **start) for name in "ab"]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "both.txt").exists():
            seen.add((tmp_path / "both.txt").read_text())
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert seen <= {"a" * 10_000, "b" * 10_000}
    assert {path.name for path in tmp_path.iterdir()} == {"both.txt", "a.txt", "b.txt"}


def test_F16_names_for_a_while_are_made_in_one_place():
    "No module but `files.problems` thinks of a name for a file that is not whole."
    folder = os.path.dirname(spinereg.__file__)
    found = [
        f"{name}: {line.strip()}"
        for top, _, names in os.walk(folder)
        for name in names
        if name.endswith(".py") and not top.endswith("__pycache__")
        for line in open(os.path.join(top, name), encoding="utf-8")
        if any(mark in line for mark in (".tmp", ".part\"", ".partial-{", "mktemp(")) and name != "problems.py"
    ]
    assert found == []


def test_no_message_names_a_folder_aside(tmp_path):
    def cannot(path):
        raise RuntimeError(f"ITK ERROR\nH5Fcreate failed for {path}")

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    (tmp_path / "file").write_text("")
    (tmp_path / "taken.txt").mkdir()
    said = []
    tries = [("a.txt", cannot), ("a.txt", full), ("a.txt", lambda path: None), ("taken.txt", lambda path: path.write_text("1")), ("file/a.txt", full)]
    for name, writer in tries:
        with pytest.raises(OSError) as caught:  # noqa: PT011 each of another kind
            write_atomic(tmp_path / name, writer)
        said.append(str(caught.value))
    with pytest.raises(OSError) as caught, write_result(tmp_path) as aside:  # noqa: PT011, PT012
        (aside / "file").mkdir()
        (aside / "file/b.txt").write_text("1")
    said.append(str(caught.value))
    assert len(said) == 6
    assert not [text for text in said if "partial" in text]
    assert all("a.txt" in text for text in said[:3])


def test_scaling_without_an_intercept_is_refused_by_name(tmp_path):
    image = nib.Nifti1Image(np.zeros((9, 9, 9), np.int16), np.eye(4))
    raw = bytearray(image.to_bytes())
    raw[112:120] = np.array([2, np.nan], np.float32).tobytes()
    (tmp_path / "ct.nii").write_bytes(raw)
    with pytest.raises(InputError, match="ct.nii"):
        read_nifti(InputFile("moving", tmp_path / "ct.nii"))


def test_a_flat_image_has_no_grid_and_is_refused_by_its_reader(tmp_path):
    from spinereg.registration.memory import header_grid

    image = nib.Nifti1Image(np.zeros((9, 9), np.int16), np.eye(4))
    image.set_qform(np.eye(4), 1)
    nib.save(image, tmp_path / "flat.nii.gz")
    assert header_grid(tmp_path / "flat.nii.gz") is None and header_grid(image) is None
    with pytest.raises(InputError, match="no volume"):
        read_nifti(InputFile("moving", tmp_path / "flat.nii.gz"))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_splines_of_every_order_are_read(tmp_path, order):
    sitk.WriteTransform(sitk.BSplineTransform(3, order), str(tmp_path / "spline.tfm"))
    assert read_itk(tmp_path / "spline.tfm").TransformPoint((1.0, 2.0, 3.0)) == (1.0, 2.0, 3.0)
