"Images and labels in memory: modality, brightness, names, values there and back; and the real volumes where they are."

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spinereg.files.nifti import NativeSpace
from spinereg.files.pairs import COORDINATES, read_landmarks, read_pair
from spinereg.files.volumes import Volume, guess_modality, name_labels, normalise, percentile, read_image, read_labels, write_labels
from spinereg.space.geometry import Grid

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real volumes are not on this machine")
SPACE = np.array([[-1.2, 0, 0, 20], [0, 0, 1.5, -10], [0, -0.8, 0, 40], [0, 0, 0, 1]])
SHAPE = (20, 30, 22)


def save(path, array, affine=SPACE):
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def blocks(values, shape=SHAPE):
    "Blocks from top to bottom: the second stored axis runs down in SPACE."
    array = np.zeros(shape, "uint8")
    for n, value in enumerate(values):
        array[6:13, 2 + 9 * n : 9 + 9 * n, 6:13] = value
    return array


@pytest.fixture
def mr(tmp_path):
    body = np.random.default_rng(0).gamma(4, 50, SHAPE).astype("float32")
    body[:4] = np.abs(np.random.default_rng(1).normal(0, 3, body[:4].shape))
    return read_image(save(tmp_path / "mr.nii.gz", body), "fixed")


@pytest.fixture
def ct(tmp_path):
    hounsfield = np.random.default_rng(0).normal(60, 40, SHAPE)
    hounsfield[8:12] += 640
    hounsfield[:4] = -1000
    return read_image(save(tmp_path / "ct.nii.gz", hounsfield.astype("int16")), "moving")


def volume_of(data):
    grid = Grid(tuple(data.shape), np.eye(4))
    return Volume(data, grid, NativeSpace(Path("memory.nii"), nib.Nifti1Header(), grid.affine, grid))


# images


def test_units_of_the_file_are_kept(tmp_path):
    "Stored integers with slope and intercept read as the numbers they mean."
    image = nib.Nifti1Image(np.random.default_rng(0).integers(0, 4000, SHAPE).astype("int16"), SPACE)
    image.header.set_slope_inter(1, -1024)
    nib.save(image, tmp_path / "ct.nii.gz")
    volume = read_image(tmp_path / "ct.nii.gz")
    assert volume.data.dtype == torch.float32
    assert np.array_equal(np.sort(volume.data.numpy().ravel()), np.sort(nib.load(tmp_path / "ct.nii.gz").get_fdata().ravel()))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32", "float32", "float64"])
def test_number_types(tmp_path, dtype):
    array = np.random.default_rng(0).integers(0, 100, SHAPE).astype(dtype)
    assert set(np.unique(read_image(save(tmp_path / "image.nii.gz", array)).data.numpy())) == set(np.unique(array))


def test_C8_modality_of_ct_and_mr(mr, ct):
    assert (guess_modality(mr), guess_modality(ct)) == ("mr", "ct")


@given(st.floats(-1024, 3000))
@settings(max_examples=40, deadline=None)
def test_C8_ct_window_is_fixed(value):
    "The same HU gives the same brightness in every patient."
    expected = min(max((value + 250) / 1500, 0), 1)
    for others in (-1000.0, 3000.0):
        data = torch.tensor([[[value, others]]])
        assert normalise(volume_of(data), "ct")[0, 0, 0].item() == pytest.approx(expected, abs=1e-6)


def test_C8_published_window_is_an_argument(ct):
    assert torch.allclose(normalise(ct, "ct", (-1000.0, 2000.0)), ((ct.data + 1000) / 3000).clamp(0, 1))


@pytest.mark.parametrize("count", [1, 2])
def test_C8_bright_voxels_change_an_mr_by_less_than_a_hundredth(mr, count):
    "C8: one voxel of 1e6 changes the normalised image by less than 1 % elsewhere; so do two."
    spiked = mr.data.clone()
    spiked.view(-1)[torch.arange(count) * 997] = 1e6
    elsewhere = spiked == mr.data
    change = (normalise(Volume(spiked, mr.grid, mr.native), "mr") - normalise(mr, "mr")).abs()[elsewhere]
    assert change.max() < 0.01


@given(st.floats(1e-3, 1e4))
@settings(max_examples=30, deadline=None)
def test_C8_mr_brightness_does_not_depend_on_the_scale(scale):
    data = torch.from_numpy(np.random.default_rng(0).gamma(4, 50, (12, 12, 12)))
    once, scaled = (normalise(volume_of(values), "mr") for values in (data, data * scale))
    assert torch.allclose(once, scaled, atol=1e-6)


@pytest.mark.parametrize("kind", ["two values", "one bright voxel", "negative", "ramp"])
def test_C8_range_is_zero_to_one(kind):
    data = {"two values": torch.eye(10).repeat(10, 1, 1), "one bright voxel": torch.zeros(10, 10, 10), "negative": -torch.rand(10, 10, 10)}
    values = data.get(kind, torch.arange(1000.0).reshape(10, 10, 10))
    if kind == "one bright voxel":
        values[5, 5, 5] = 1
    result = normalise(volume_of(values), "mr")
    assert torch.isfinite(result).all()
    assert (result.min(), result.max()) == (0, 1)


@given(st.integers(1, 400), st.floats(0, 100))
@settings(max_examples=60, deadline=None)
def test_percentile_is_numpys(count, percent):
    values = np.random.default_rng(count).normal(size=count)
    assert percentile(torch.from_numpy(values), percent).item() == np.percentile(values, percent, method="nearest")


# labels


def test_B3_labels_are_numbered_from_the_top(tmp_path, mr):
    "B3: T13 is 28 in VerSe and lies between T12 and L1."
    labels = read_labels(save(tmp_path / "mask.nii.gz", blocks([19, 28, 20])), "verse", mr)
    assert labels.names == ("T12", "T13", "L1")
    assert labels.values == (19, 28, 20)
    heights = [mr.grid.points_mm(mr.data)[..., 2][labels.data == k].mean().item() for k in (1, 2, 3)]
    assert heights == sorted(heights, reverse=True)


def test_labels_lie_where_their_file_says(tmp_path, mr):
    "World positions of each label's voxels, from the stored array and its affine."
    stored = blocks([20, 21, 22])
    labels = read_labels(save(tmp_path / "mask.nii.gz", stored), "verse", mr)
    points = mr.grid.points_mm(torch.zeros(1, dtype=torch.float64))
    for k, value in enumerate(labels.values, 1):
        index = np.argwhere(stored == value)
        assert points[labels.data == k].mean(0).numpy() == pytest.approx(SPACE[:3, :3] @ index.mean(0) + SPACE[:3, 3], abs=1e-4)


@pytest.mark.parametrize("orientation", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
def test_A1_mask_stored_in_another_order(tmp_path, mr, orientation, signs):
    mask = nib.Nifti1Image(blocks([20, 21, 22]), SPACE)
    nib.save(mask.as_reoriented(np.stack([orientation, signs], 1)), tmp_path / "mask.nii.gz")
    labels = read_labels(tmp_path / "mask.nii.gz", "verse", mr)
    reference = read_labels(save(tmp_path / "straight.nii.gz", blocks([20, 21, 22])), "verse", mr)
    assert torch.equal(labels.data, reference.data)
    assert not labels.notices


def test_sacrum_with_two_values_is_one_bone():
    array = np.array([0, 25, 26, 26, 27]).reshape(1, 1, 5)
    labels, names, values = name_labels(array, {27: "L5", 25: "S", 26: "S"})
    assert labels.flatten().tolist() == [0, 2, 2, 2, 1]
    assert (names, values) == (("L5", "S"), (27, 25))


@given(st.lists(st.integers(1, 26), min_size=1, max_size=8, unique=True).map(sorted))
@settings(max_examples=30, deadline=None)
def test_B6_labels_written_are_labels_read(tmp_path_factory, present):
    "B6: integers, slope 1, intercept 0, the very values that were in the file."
    folder = tmp_path_factory.mktemp("labels")
    stored = np.zeros(SHAPE, "int32")
    for n, value in enumerate(present):
        stored[n : n + 2, :, 10:] = value
    image = read_image(save(folder / "image.nii.gz", np.random.default_rng(0).random(SHAPE).astype("float32")))
    labels = read_labels(save(folder / "mask.nii.gz", stored), "verse", image)
    path = write_labels(folder / "out.nii.gz", labels.data, labels.values, image.native)
    written = nib.load(path)
    assert np.array_equal(np.asanyarray(written.dataobj), stored)
    assert written.get_data_dtype() == np.uint8
    assert (written.dataobj.slope, written.dataobj.inter) == (1, 0)


def test_B6_smallest_type_that_holds_the_values(tmp_path, mr):
    labels = read_labels(save(tmp_path / "mask.nii.gz", blocks([1, 2, 3]).astype("int32") * 200), {200: "L1", 400: "L2", 600: "L3"}, mr)
    written = nib.load(write_labels(tmp_path / "out.nii.gz", labels.data, labels.values, mr.native))
    assert written.get_data_dtype() == np.uint16
    assert set(np.unique(written.dataobj)) == {0, 200, 400, 600}


def test_labels_of_many_vertebrae_outside_the_image_are_left_out(tmp_path, mr):
    "A label map of a longer scan: what lies outside the image has no voxels and no name."
    longer = np.pad(blocks([20, 21, 22]), [(0, 0), (0, 15), (0, 0)])
    longer[6:13, 35:42, 6:13] = 23
    labels = read_labels(save(tmp_path / "mask.nii.gz", longer), "verse", mr)
    assert labels.names == ("L1", "L2", "L3")


# pairs


def test_A2_images_on_different_grids(tmp_path, ct):
    "A2: other shape, spacing, axis order and obliqueness; both keep their own grid."
    tilt = np.deg2rad(12)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, 0, 1], [-np.cos(tilt), np.sin(tilt), 0], [-np.sin(tilt), -np.cos(tilt), 0]]) @ np.diag([0.5, 0.5, 4])
    save(tmp_path / "mr.nii.gz", np.random.default_rng(0).gamma(4, 50, (60, 80, 14)).astype("float32"), affine)
    pair = read_pair(tmp_path / "mr.nii.gz", ct.native.path)
    assert pair.fixed.data.shape == (14, 60, 80)
    assert pair.fixed.grid.spacing_mm == pytest.approx([4, 0.5, 0.5])
    assert pair.moving.data.shape == (20, 22, 30)
    assert pair.fixed.grid.axcodes == pair.moving.grid.axcodes == "RAS"


@pytest.mark.parametrize("given_labels", [(), ("moving_labels",), ("fixed_labels",), ("moving_labels", "fixed_labels")])
def test_B4_labels_are_optional_everywhere(tmp_path, mr, ct, given_labels):
    mask = save(tmp_path / "mask.nii.gz", blocks([20, 21, 22]))
    pair = read_pair(mr.native.path, ct.native.path, **dict.fromkeys(given_labels, mask))
    assert (pair.moving_labels is not None, pair.fixed_labels is not None) == ("moving_labels" in given_labels, "fixed_labels" in given_labels)


def test_B1_a_scheme_for_each_image(tmp_path, mr, ct):
    masks = {"moving_labels": save(tmp_path / "ct.nii.gz", blocks([31, 30, 29])), "fixed_labels": save(tmp_path / "mr.nii.gz", blocks([6, 5, 4]))}
    save(tmp_path / "image.nii.gz", np.random.default_rng(0).random(SHAPE).astype("float32"))
    pair = read_pair(tmp_path / "image.nii.gz", tmp_path / "image.nii.gz", **masks, moving_scheme="totalseg_v2", fixed_scheme="totalseg_mr")
    assert pair.moving_labels.names == pair.fixed_labels.names == ("L1", "L2", "L3")
    assert (pair.moving_labels.values, pair.fixed_labels.values) == ((31, 30, 29), (6, 5, 4))


def test_landmarks(tmp_path):
    "With a byte order mark, spaces and further columns, as spreadsheets write them."
    lines = ["\ufeffname,vertebra,level," + ",".join(COORDINATES), "tip, L3 ,x,1,2,3,4,5,6", "cord,,y, 1.5,-1,1e1,2,2,2"]
    (tmp_path / "points.csv").write_text("\n".join(lines), "utf-8")
    points = read_landmarks(tmp_path / "points.csv")
    assert (points.names, points.vertebra) == (("tip", "cord"), ("L3", ""))
    assert points.fixed_mm.dtype == torch.float64
    assert points.fixed_mm.tolist() == [[1, 2, 3], [1.5, -1, 10]]
    assert points.moving_mm.tolist() == [[4, 5, 6], [2, 2, 2]]


# real volumes


@needs_real
def test_real_mr_pair():
    folder = REAL / "lumbar_mr_pair"
    pair = read_pair(folder / "fixed_t1.nii.gz", folder / "moving_t2.nii.gz", folder / "moving_labels.nii.gz", folder / "fixed_labels.nii.gz")
    assert (pair.fixed_modality, pair.moving_modality) == ("mr", "mr")
    assert pair.moving_labels.names == pair.fixed_labels.names == ("T10", "T11", "T12", "L1", "L2", "L3", "L4", "L5", "S")
    assert not any("UPWARDS" in notice.text for notice in pair.notices)


@needs_real
@pytest.mark.parametrize(
    ("folder", "mask", "scheme", "names"),
    [
        ("lumbar_ct", "ct_mask.nii.gz", "verse", ("L2", "L3", "L4")),
        ("trunk_ct", "ct_mask_totalseg_v2.nii.gz", "totalseg_v2", ("T11", "T12", "L1", "L2", "L3", "L4", "L5", "S")),
    ],
)
def test_real_ct(folder, mask, scheme, names):
    "Real headers, real HU, real label files, and every label map in bone."
    image = read_image(REAL / folder / "ct.nii.gz")
    labels = read_labels(REAL / folder / mask, scheme, image)
    assert guess_modality(image) == "ct"
    assert labels.names == names
    assert all(image.data[labels.data == k].mean() > 100 for k in range(1, len(names) + 1))
    assert not any("UPWARDS" in notice.text for notice in labels.notices)
    with pytest.raises(ValueError, match="mask|label"):
        read_labels(REAL / folder / mask, "mrspineseg", image)
