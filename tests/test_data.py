"""Folders of cases: found, checked, prepared, kept, cropped.

The cases are drawn here: boxes in world space for vertebrae, stored on a CT and an MR grid of their own, so that what must lie where is known.
"""

import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import papermill
import pytest
import torch
from monai.data import Dataset as MonaiDataset
from torch.utils.data import DataLoader

import spinereg
from spinereg.files.labels import SCHEMES, VERTEBRAE
from spinereg.learning.cases import PrepareCase, check, find_case, find_cases
from spinereg.learning.crops import KEPT, Crops, OnDisk, cache_gb, case_dataset, crop_transform, usable_cases

ROOT = Path(__file__).resolve().parent.parent
VALUE = {name: value for value, name in SCHEMES["verse"].items()}
SPINE = {"T12": 52, "T13": 26, "L1": 0, "L2": -26, "L3": -52}  # vertebra -> height of its centre, mm
HALF = np.array([14.0, 12.0, 10.0])  # half a vertebra, mm
CT = np.array([[-1.5, 0, 0, 45], [0, -1.5, 0, 45], [0, 0, 2.0, -79], [0, 0, 0, 1]])  # stored LPS
MR = np.array([[0, 0, 4.0, -30], [-1.5, 0, 0, 42], [0, -1.5, 0, 78], [0, 0, 0, 1]])  # 16 sagittal slices of 4 mm
CT_SHAPE, MR_SHAPE = (60, 60, 80), (56, 104, 16)
QUICK = PrepareCase(spacing_mm=2.0, prealign="header")


def points(affine, shape):
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def paint(affine, shape, spine=SPINE, half=HALF):
    "Label map of boxes, in VerSe values."
    x, values = points(affine, shape), np.zeros(shape, "uint8")
    for name, z in spine.items():
        values[(np.abs(x - [0, 0, z]) < half).all(-1)] = VALUE[name]
    return values


def save(path, array, affine):
    nib.save(nib.Nifti1Image(array, affine), path)


def draw(folder, seed=0, ct=(CT, CT_SHAPE), mr=(MR, MR_SHAPE), spine=SPINE, mr_spine=None, masks=("ct_mask", "mr_mask"), ending=".nii.gz"):
    "Write a case; every seed another person."
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for stem, (affine, shape), bones in (("ct", ct, spine), ("mr", mr, mr_spine or spine)):
        values = paint(affine, shape, bones)
        body = (np.abs(points(affine, shape)[..., :2]) < 38).all(-1)
        ct_like = np.where(body, np.where(values > 0, 600, 40) + rng.integers(-20, 20, shape), -1000)
        image = ct_like.astype("int16") if stem == "ct" else np.where(body, 600 - ct_like // 2, 0).astype("int16")
        save(folder / f"{'ct' if stem == 'ct' else 'mr_t1'}{ending}", image, affine)
        if f"{stem}_mask" in masks:
            save(folder / f"{stem}_mask{ending}", values, affine)
    return folder


def case_of(folder):
    case, findings = find_case(folder)
    assert not findings
    return case


def problems(table):
    return [tuple(row) for row in table.loc[table.kind == "problem", ["case", "file", "key", "reason", "fix"]].itertuples(index=False)]


@pytest.fixture(scope="module")
def person(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("data") / "train" / "person")


@pytest.fixture(scope="module")
def item(person):
    return QUICK(case_of(person))


@pytest.fixture
def quick_check(monkeypatch):
    "Without the rigid search: the images lie on one another."
    return lambda *args, **kwargs: check(*args, prealign="header", **kwargs)


# finding and checking


def test_x2_empty_split_says_what_was_looked_for_and_what_is_there(tmp_path, quick_check):
    draw(tmp_path / "train" / "a")
    for name in ("notes", "old", "readme"):
        (tmp_path / "val" / name).mkdir(parents=True) if name != "readme" else (tmp_path / "val" / name).touch()
    table = quick_check(tmp_path)
    (val,) = [row for row in problems(table) if row[0] == "val"]
    assert f"{tmp_path / 'val'}{os.sep}<case>/{{ct,mr_t1 or mr}}.nii.gz or .nii".replace(os.sep, "/") in val[3].replace(os.sep, "/")
    assert "holds 3 entries: notes, old, readme" in val[3]
    (test,) = [row for row in problems(table) if row[0] == "test"]
    assert f"{tmp_path} holds 2 entries: train, val" in test[3]
    assert "train, val and test" in test[4]


def test_x1_wrong_folder_lists_the_nearest_one(tmp_path):
    (tmp_path / "data").mkdir()
    cases, (finding,) = find_cases(tmp_path / "daat", "train")
    assert not cases
    assert f"{tmp_path} holds 1 entries: data" in finding.reason


def test_x20_cases_are_paired_by_their_folder_and_what_is_unpaired_is_listed(tmp_path):
    for name, lacks in (("a", "mr_t1"), ("b", "ct"), ("c", None)):
        draw(tmp_path / "train" / name)
        if lacks:
            (tmp_path / "train" / name / f"{lacks}.nii.gz").unlink()
    draw(tmp_path / "d")
    shutil.copy(tmp_path / "d" / "ct.nii.gz", tmp_path / "train" / "d_ct.nii.gz")
    cases, findings = find_cases(tmp_path, "train")
    assert [case.name for case in cases] == ["c"]
    assert {Path(path).parent.name for path in cases[0].files().values() if path} == {"c"}
    assert [(f.kind, f.case, f.key, f.file) for f in findings] == [
        ("problem", "train/a", "fixed", "mr_t1.nii.gz"),
        ("problem", "train/b", "moving", "ct.nii.gz"),
        ("problem", "train", "case", "d_ct.nii.gz"),
    ]
    assert "holds 3 entries: ct.nii.gz, ct_mask.nii.gz, mr_mask.nii.gz" in findings[0].reason


def test_the_fixed_image_may_be_called_mr_as_half_real_cases_call_it(tmp_path):
    folder = draw(tmp_path / "train" / "a")
    (folder / "mr_t1.nii.gz").rename(folder / "mr.nii.gz")
    assert Path(case_of(folder).fixed).name == "mr.nii.gz"
    shutil.copy(folder / "mr.nii.gz", folder / "mr_t1.nii.gz")
    case, (finding,) = find_case(folder)
    assert Path(case.fixed).name == "mr_t1.nii.gz" and finding.file == "mr.nii.gz" and "mr_t1.nii.gz too" in finding.reason


def test_x2_plain_nii_is_as_good_and_names_that_are_not_known_are_mentioned(tmp_path):
    draw(tmp_path / "train" / "a", ending=".nii")
    assert QUICK(case_of(tmp_path / "train" / "a"))["labels"].any()
    save(tmp_path / "train" / "a" / "ct.nii.gz", np.zeros((8, 8, 8), "uint8"), np.eye(4))
    save(tmp_path / "train" / "a" / "ct_seg.nii.gz", np.zeros((8, 8, 8), "uint8"), np.eye(4))
    case, findings = find_case(tmp_path / "train" / "a")
    assert [(f.kind, f.file) for f in findings] == [("notice", "ct.nii"), ("notice", "ct_seg.nii.gz")]
    assert case.moving.endswith("ct.nii.gz")
    assert case.moving_labels.endswith("ct_mask.nii")


def test_check_reads_every_voxel_and_lists_every_problem_of_every_case(tmp_path, quick_check):
    """X3, X23: truncated file, unknown label value, both at once, one level off; the good cases stay good."""
    for seed, name in enumerate(("cut", "both", "good", "level", "value")):
        draw(tmp_path / "train" / name, seed)
    for name, file in (("cut", "ct.nii.gz"), ("both", "mr_t1.nii.gz")):
        path = tmp_path / "train" / name / file
        path.write_bytes(path.read_bytes()[:-30])
    for name in ("value", "both"):
        values = paint(CT, CT_SHAPE)
        values[values == VALUE["L1"]] = 99
        save(tmp_path / "train" / name / "ct_mask.nii.gz", values, CT)
    one_down = dict(zip(list(SPINE)[1:], list(SPINE.values())))  # the MR's T12 is called T13, and so on
    save(tmp_path / "train" / "level" / "mr_mask.nii.gz", paint(MR, MR_SHAPE, one_down), MR)
    table = quick_check(tmp_path, splits=["train"], out_dir=tmp_path / "out" / "check")
    found = {(case, file, key): reason for case, file, key, reason, _ in problems(table)}
    assert set(found) == {
        ("train/cut", "ct.nii.gz", "moving"),
        ("train/both", "mr_t1.nii.gz", "fixed"),
        ("train/both", "ct_mask.nii.gz", "moving_labels"),
        ("train/value", "ct_mask.nii.gz", "moving_labels"),
        ("train/level", "mr_mask.nii.gz", "fixed_labels"),
    }
    assert "cut off or damaged" in found["train/cut", "ct.nii.gz", "moving"]
    assert "99 (" in found["train/value", "ct_mask.nii.gz", "moving_labels"]
    assert "lies on the one above it" in found["train/level", "mr_mask.nii.gz", "fixed_labels"]
    assert all(row[3] and row[4].endswith(".") for row in problems(table))
    assert table[table.kind == "used"].case.tolist() == ["train/good"]
    assert list(table.kind.unique()) == ["problem", "used"]
    assert [path.name for path in (tmp_path / "out" / "check").iterdir()] == ["check.csv"]
    assert (tmp_path / "out" / "check" / "check.csv").read_text().count("train/both") == 2


def test_b2_one_level_off_the_other_way_and_never_for_a_good_pair(tmp_path, item):
    """B2: the direction is named; counting right says nothing."""
    assert [f[0] for f in item["findings"]] == ["used"]
    one_up = dict(zip(list(SPINE)[:-1], list(SPINE.values())[1:]))
    draw(tmp_path / "a", mr_spine=one_up)
    made = QUICK(case_of(tmp_path / "a"))
    assert "fixed" not in made
    ((kind, _, file, _, reason, fix),) = made["findings"]
    assert (kind, file) == ("problem", "mr_mask.nii.gz")
    assert "lies on the one below it" in reason
    assert "correct the map" in fix


def test_names_and_images_may_occur_once_however_they_are_saved(tmp_path, quick_check):
    """X19: a person in two splits is found by name, and by voxels though type, compression and axis order differ."""
    draw(tmp_path / "train" / "a", seed=1)
    draw(tmp_path / "train" / "b", seed=2)
    draw(tmp_path / "val" / "a", seed=3)
    draw(tmp_path / "test" / "c", seed=4)
    ct = nib.load(tmp_path / "train" / "b" / "ct.nii.gz")
    turned = nib.as_closest_canonical(nib.Nifti1Image(np.asarray(ct.dataobj).astype("float32"), ct.affine))
    (tmp_path / "test" / "c" / "ct.nii.gz").unlink()
    nib.save(turned, tmp_path / "test" / "c" / "ct.nii")
    found = {(case, key): reason for case, _, key, reason, _ in problems(quick_check(tmp_path))}
    assert set(found) == {("train/a", "case"), ("val/a", "case"), ("train/b", "moving"), ("test/c", "moving")}
    assert "val/a" in found["train/a", "case"]
    assert "the moving one of test/c" in found["train/b", "moving"]


def test_notices_of_the_readers_are_in_the_table(tmp_path, quick_check):
    """What `read_pair` notices about a file is a notice about its case."""
    draw(tmp_path / "train" / "a", masks=("ct_mask", "mr_mask"))
    values = paint(CT, CT_SHAPE).astype("float32")
    values[values > 0] += 0.01
    save(tmp_path / "train" / "a" / "ct_mask.nii.gz", values, CT)
    values = paint(MR, MR_SHAPE).astype("float32")
    values[values > 0] += 0.01
    save(tmp_path / "train" / "a" / "mr_mask.nii.gz", values, MR)
    table = quick_check(tmp_path, splits="train")
    notices = {(row.key, row.file): row.reason for row in table[table.kind == "notice"].itertuples()}
    assert set(notices) == {("moving_labels", "ct_mask.nii.gz"), ("fixed_labels", "mr_mask.nii.gz")}
    assert "rounded" in notices["moving_labels", "ct_mask.nii.gz"]


def test_the_app_shows_problems_and_notices(tmp_path):
    """E3: with an empty case folder, and a name that is not known."""
    draw(tmp_path / "data" / "train" / "a")
    (tmp_path / "data" / "train" / "a" / "ct_mask.nii.gz").rename(tmp_path / "data" / "train" / "a" / "mask.nii.gz")
    (tmp_path / "data" / "train" / "b").mkdir()
    wanted = {"data_dir": str(tmp_path / "data"), "splits": ["train"], "prealign": "header", "out_dir": str(tmp_path / "out")}
    done = papermill.execute_notebook(ROOT / "nbs/apps/check.ipynb", None, parameters=wanted, kernel_name="python3", progress_bar=False)
    shown = str([cell.get("outputs") for cell in done.cells])
    for words in ("there is no ct.nii.gz", "mask.nii.gz", "rigidity off", "1 of 2 cases are in order. To be mended: train/b."):
        assert words in shown
    assert (tmp_path / "out" / "check.csv").is_file()
    assert spinereg.check is check


# preparing


def test_a2_both_images_lie_where_they_are_in_the_world(item):
    """A2: CT and MR on different grids; on the working grid every label lies in its box, and bone is bright in CT, dark in MR."""
    assert item["fixed"].shape == item["moving"].shape == item["labels"].shape == item["mask"].shape
    for name, z in SPINE.items():
        bone = (item["labels"][0] == VERTEBRAE.index(name) + 1).nonzero().float()
        size_mm = (bone.amax(0) - bone.amin(0) + 1) * 2
        assert (size_mm - torch.tensor(2 * HALF)).abs().max() <= 3
        step_mm = (bone.mean(0)[2] - (item["labels"][0] == VERTEBRAE.index("L1") + 1).nonzero().float().mean(0)[2]) * 2
        assert abs(step_mm - z) < 0.5
    used = item["mask"].bool() & (item["labels"] > 0)
    flesh = item["mask"].bool() & (item["labels"] == 0) & (item["fixed_labels"] == 0)
    assert item["moving"][used].median() > item["moving"][flesh].median() + 0.2
    assert item["fixed"][used].median() < item["fixed"][flesh].median() - 0.2
    both = (item["labels"] > 0) & (item["fixed_labels"] > 0)
    assert torch.equal(item["labels"][both], item["fixed_labels"][both])
    assert both.sum() > 0.8 * (item["labels"] > 0).sum()


@pytest.mark.parametrize("names", [("T12", "T13", "L1", "L2", "L3"), ("L3", "L4", "L5", "L6", "S")])
def test_b3_t13_and_l6_are_vertebrae_in_their_place(tmp_path, names):
    """B3: VerSe 28 lies between 19 and 20, 25 between 24 and 26; names are listed from the skull down."""
    draw(tmp_path / "train" / "a", spine=dict(zip(names, SPINE.values())))
    made = QUICK(case_of(tmp_path / "train" / "a"))
    assert made["findings"][0][4] == ", ".join(names)
    heights = [(made["labels"][0] == VERTEBRAE.index(name) + 1).nonzero()[:, 2].float().mean() for name in names]
    assert heights == sorted(heights, reverse=True)


def test_b2_b3_vertebrae_that_take_no_part_are_listed_with_the_reason(tmp_path):
    """X15: cut by either image, outside the fixed one, too small, in one image only: all named, and gone from both maps."""
    short_mr = MR.copy()
    short_mr[2, 3] = 58  # ends within T12 at the top, and within L3 at the bottom
    spine = SPINE | {"T11": 72.5}
    folder = draw(tmp_path / "train" / "a", mr=(short_mr, (56, 77, 16)), spine=spine, mr_spine={n: SPINE[n] for n in ("T12", "T13", "L1", "L3")})
    values = paint(CT, CT_SHAPE, spine)
    values[(values == VALUE["L1"]) & (points(CT, CT_SHAPE)[..., 0] > -12)] = 0  # a sliver of 2 mm is left
    values[(values == VALUE["L1"]) & (points(CT, CT_SHAPE)[..., 1] > -6)] = 0
    save(folder / "ct_mask.nii.gz", values, CT)
    made = QUICK(case_of(folder))
    why = made["left_out"]
    assert list(why) == ["T11", "T12", "L1", "L2", "L3"]
    assert why["T11"] == "only the moving image shows it"
    assert why["T12"] == why["L3"] == "cut by the upper or lower border of the fixed image"
    sliver_mm3 = (values == VALUE["L1"]).sum() * 1.5 * 1.5 * 2
    assert 0 < sliver_mm3 <= 500
    assert why["L1"] == f"{sliver_mm3:.0f} mm³ in the moving image"
    assert why["L2"] == "only the moving image shows it"
    assert made["labels"].unique().tolist() == made["fixed_labels"].unique().tolist() == [0, VERTEBRAE.index("T13") + 1]
    assert made["findings"][0][4].startswith("T13; not T11 (only the moving image shows it); not T12 (")


def test_b3_without_mr_labels_what_the_fixed_image_does_not_show_is_listed_too(tmp_path):
    short_mr = MR.copy()
    short_mr[2, 3] = 40
    draw(tmp_path / "train" / "a", mr=(short_mr, (56, 60, 16)), masks=("ct_mask",))
    made = QUICK(case_of(tmp_path / "train" / "a"))
    assert made["left_out"]["T12"] == "0 mm³ in the fixed image"
    assert made["left_out"]["L3"] == "cut by the upper or lower border of the fixed image"
    assert len(made["left_out"]) == 2
    assert {VERTEBRAE[k - 1] for k in made["labels"].unique().tolist() if k} == {"T13", "L1", "L2"}


def test_a6_vertebrae_wider_than_the_mr_stay_in(tmp_path):
    """A6: twelve slices do not hold the transverse processes; what the sides cut is no reason to drop a vertebra."""
    narrow = MR.copy()
    narrow[0, 3] = -10
    draw(tmp_path / "train" / "a", mr=(narrow, (56, 104, 8)), masks=("ct_mask",))
    made = QUICK(case_of(tmp_path / "train" / "a"))
    assert made["left_out"] == {}
    assert made["labels"][:, 0].any()


def test_b4_masks_are_optional(tmp_path):
    """B4: without the MR's nothing changes for the CT's; without any, crops lie in the overlap."""
    draw(tmp_path / "train" / "a", masks=("ct_mask",))
    draw(tmp_path / "train" / "b", masks=(), seed=1)
    draw(tmp_path / "train" / "c", masks=("mr_mask",), seed=2)
    data = case_dataset(find_cases(tmp_path, "train")[0], QUICK, "ram")
    assert [bool(made["labels"].any()) for made in data] == [True, False, False]
    assert [bool(made["fixed_labels"].any()) for made in data] == [False, False, True]
    assert data[0]["findings"][0][4] == "T12, T13, L1, L2, L3"
    assert "rigidity off" in data[1]["findings"][0][4]
    assert usable_cases(data, "train")[0] == [0, 1, 2]
    for crop in Crops(data, [0, 1, 2], crop_transform((16, 16, 16), 2.0)):
        assert crop["mask"].any()


def test_a_case_that_cannot_be_prepared_does_not_stop_the_others(tmp_path, capsys):
    for name in ("a", "b", "c"):
        draw(tmp_path / "train" / name)
    (tmp_path / "train" / "b" / "ct.nii.gz").write_bytes(b"")
    far = MR.copy()
    far[2, 3] += 400
    save(tmp_path / "train" / "c" / "mr_t1.nii.gz", np.arange(np.prod(MR_SHAPE), dtype="int32").reshape(MR_SHAPE), far)
    (tmp_path / "train" / "c" / "mr_mask.nii.gz").unlink()
    data = case_dataset(find_cases(tmp_path, "train")[0], QUICK, "none")
    good, table = usable_cases(data, "train")
    assert good == [0]
    assert table.case.tolist() == ["train/b", "train/c"]
    told = capsys.readouterr().out
    assert "train/b is left out: moving ct.nii.gz: the file is empty" in told
    assert "overlap by 0%" in told
    with pytest.raises(ValueError, match="none of the 1 cases of val"):
        usable_cases(case_dataset(data.data[1:2], QUICK, "none"), "val")


# keeping


def test_d12_space_is_printed_before_anything_is_read_and_is_of_the_right_size(person, item, tmp_path, capsys):
    """D12: an upper bound, not far from what is taken."""
    case = case_of(person)

    class Loud(PrepareCase):
        def __call__(self, case):
            print("now it reads")
            return super().__call__(case)

    case_dataset([case], Loud(2.0, "header"), "ram")
    told = capsys.readouterr().out
    assert "1 cases kept in memory: at most" in told.split("now it reads")[0]
    taken = sum(value.numel() * value.element_size() for value in item.values() if isinstance(value, torch.Tensor)) / 1e9
    assert taken <= cache_gb([case], 2.0) < 1.6 * taken
    assert cache_gb([case], 1.0) == pytest.approx(8 * cache_gb([case], 2.0))


def test_d12_disk_cache_follows_content_and_settings(tmp_path):
    """D12: another content or setting is another file; another date is not; what failed is tried again, and what is damaged made anew."""
    folder, kept = draw(tmp_path / "train" / "a"), tmp_path / "kept"
    case = case_of(folder)
    first = OnDisk(QUICK, kept)(case)
    (file,) = kept.glob("*.pt")
    written = file.stat().st_mtime_ns
    os.utime(folder / "ct.nii.gz", (1, 1))
    assert torch.equal(OnDisk(QUICK, kept)(case)["fixed"], first["fixed"])
    assert [path.stat().st_mtime_ns for path in kept.glob("*.pt")] == [written]
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 64
    for bad in (b"", b"half", good[:1000], good[: len(good) // 2], pickle.dumps({"fixed": Path}), bytes(flipped)):
        file.unlink()  # what is mapped into memory is not cut short
        file.write_bytes(bad)
        assert torch.equal(OnDisk(QUICK, kept)(case)["fixed"], first["fixed"]) and len(file.read_bytes()) == len(good)
    for other in (PrepareCase(3.0, "header"), PrepareCase(2.0, "header", minimum_mm3=100.0), PrepareCase(2.0, "header", fixed_scheme="spineps")):
        assert OnDisk(other, kept).path(case) != file
    whole = (folder / "mr_t1.nii.gz").read_bytes()
    (folder / "mr_t1.nii.gz").write_bytes(whole[:-40])
    assert "fixed" not in OnDisk(QUICK, kept)(case)
    assert list(kept.glob("*.pt")) == [file]
    image = nib.load(folder / "ct.nii.gz")
    save(folder / "ct.nii.gz", np.asarray(image.dataobj) + np.int16(50), image.affine)
    (folder / "mr_t1.nii.gz").write_bytes(whole)
    changed = OnDisk(QUICK, kept)(case)
    assert changed["moving"].mean() > first["moving"].mean()
    assert len(list(kept.glob("*.pt"))) == 2


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_d12_every_cache_gives_the_same(person, item, tmp_path, cache):
    got = case_dataset([case_of(person)], QUICK, cache, tmp_path)[0]
    assert got.keys() == item.keys()
    for key, value in item.items():
        assert torch.equal(got[key], value) if isinstance(value, torch.Tensor) else [*map(tuple, got[key])] == [*map(tuple, value)]


def test_unknown_cache_is_refused(person):
    for cache in ("gpu", "disk"):
        with pytest.raises(ValueError, match="'disk' with a cache_dir"):
            case_dataset([case_of(person)], QUICK, cache)


# crops


def held(*items):
    return MonaiDataset(list(items))


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in KEPT) and a["case"] == b["case"]


def test_d11_everything_is_picklable_and_workers_give_the_same_crops(person, tmp_path):
    """D11: pickled, in a process started with `spawn` as on Windows, and in two workers."""
    data = case_dataset([case_of(person)], QUICK, "disk", tmp_path)
    crops = Crops(data, [0], crop_transform((20, 24, 20), 2.0, 1.0, 1.0), per_case=3, epoch=4)
    there = pickle.loads(pickle.dumps(crops))
    spawned = DataLoader(crops, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    two = DataLoader(crops, batch_size=None, num_workers=2)
    for here, *elsewhere in zip(crops, there, spawned, two, strict=True):
        assert all(same(here, other) for other in elsewhere)
    for cache in ("none", "ram"):
        pickle.loads(pickle.dumps(case_dataset([case_of(person)], QUICK, cache)))


def test_c11_crops_depend_on_seed_epoch_and_case_alone(item):
    """C11: the same again, others in the next epoch, and processes share them without a gap."""
    make = partial(Crops, held(item, item, item), [0, 1, 2], crop_transform((12, 12, 12), 2.0))
    assert all(map(same, make(epoch=3), make(epoch=3)))
    assert not all(map(same, make(epoch=3), make(epoch=4)))
    assert not all(map(same, make(epoch=3), make(epoch=3, seed=1)))
    assert not same(make()[0], make()[1])
    one, shares = make(epoch=3), [make(epoch=3, process=n, processes=4) for n in range(4)]
    assert [len(share) for share in shares] == [2] * 4
    assert all(same(shares[n % 4][n // 4], one[n % 6]) for n in range(8))
    assert sorted(map(tuple, one.draws)) == [(index, crop) for index in range(3) for crop in range(2)]


def test_crops_lie_around_used_bone_and_own_their_memory(item):
    crops = Crops(held(item), [0], crop_transform((8, 8, 8), 2.0), per_case=40)
    before, hit = item["moving"].clone(), set()
    for crop in crops:
        assert {key: tuple(crop[key].shape) for key in KEPT} == dict.fromkeys(KEPT, (1, 8, 8, 8))
        assert crop["labels"].any()
        hit |= set(crop["labels"].unique().tolist()) - {0}
        crop["moving"].fill_(7)
    assert hit == {VERTEBRAE.index(name) + 1 for name in SPINE}
    assert torch.equal(item["moving"], before)
    assert [(crop[key].dtype, type(crop[key])) for key in ("fixed", "mask")] == [(torch.float32, torch.Tensor), (torch.uint8, torch.Tensor)]


def test_c10_a_case_smaller_than_a_crop_is_padded(item):
    """C10: images go on with their border, labels and mask are 0 there."""
    size = tuple(n + 9 for n in item["fixed"].shape[1:])
    (crop,) = Crops(held(item), [0], crop_transform(size, 2.0), per_case=1)
    before = [(m - n) // 2 for m, n in zip(size, item["fixed"].shape[1:])]
    pads = [(0, 0), *((low, 9 - low) for low in before)]
    for key in ("fixed", "moving"):
        assert np.array_equal(crop[key].numpy(), np.pad(item[key].numpy(), pads, mode="edge"))
    for key in ("labels", "fixed_labels", "mask"):
        assert np.array_equal(crop[key].numpy(), np.pad(item[key].numpy(), pads))


def test_affine_moves_image_and_labels_together_and_leaves_the_fixed_side(item):
    """The CT's bone, thresholded, stays on its labels; the mask holds nothing that was not measured before."""
    block = torch.zeros_like(item["mask"])
    block[:, 5:20, 8:-8, 10:40] = 1
    boxes = item | {"moving": (item["labels"] > 0).float(), "mask": block}
    size = tuple(item["fixed"].shape[1:])
    for seed in range(4):
        (crop,) = Crops(held(boxes), [0], crop_transform(size, 2.0, affine_probability=1.0), per_case=1, seed=seed)
        bone = crop["labels"] > 0
        assert not torch.equal(crop["labels"], item["labels"])
        assert ((crop["moving"] > 0.5) != bone).sum() < 0.02 * bone.sum()
        shift_mm = 2 * (bone.nonzero().float().mean(0) - (item["labels"] > 0).nonzero().float().mean(0))
        assert shift_mm.abs().max() < 3 + 10 * np.tan(np.pi / 60)
        assert torch.equal(crop["fixed"], item["fixed"])
        assert torch.equal(crop["fixed_labels"], item["fixed_labels"])
        assert not (crop["mask"].bool() & ~block.bool()).any()
        assert 0.5 * block.sum() < crop["mask"].sum() < block.sum()


def test_noise_of_the_two_images_is_their_own(item):
    """Noise that both images share would tell a network how they lie."""
    grey = torch.full_like(item["moving"], 0.5)
    for crop in Crops(held(item | {"fixed": grey, "moving": grey}), [0], crop_transform((24, 24, 24), 2.0, intensity_probability=1.0), per_case=3):
        noise = [crop[key].flatten().numpy() - crop[key].mean().item() for key in ("fixed", "moving")]
        assert min(values.std() for values in noise) > 0
        assert abs(np.corrcoef(*noise)[0, 1]) < 0.05


def test_intensity_keeps_the_range_and_the_labels(item):
    varied, plain = (Crops(held(item), [0], crop_transform((24, 24, 24), 2.0, 0.0, p), per_case=6) for p in (1.0, 0.0))
    for a, b in zip(varied, plain):
        assert torch.equal(a["labels"], b["labels"])
        assert not torch.equal(a["moving"], b["moving"])
        assert -0.15 < a["moving"].min() <= a["moving"].max() < 1.15
