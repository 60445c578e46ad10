"""What a registration takes is known from the headers: what cannot fit is refused with three remedies, before a voxel is read.

Settings that would fill the memory, or that are no settings, are refused before that.
"""

import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

import spinereg
from spinereg.files.pairs import read_pair
from spinereg.registration import memory
from spinereg.registration.memory import check_memory, header_grid, levels_fault, memory_gb, working_voxels
from spinereg.registration.register import RegisterSettings
from spinereg.registration.run import environment, peak_memory_bytes, schedule_fault
from spinereg.registration.scene import make_scene, working_grid
from spinereg.space.geometry import Grid

EASY = {name: f"data_samples/test/easy_0/{file}.nii.gz" for name, file in (("fixed", "mr_t1"), ("moving", "ct"), ("moving_labels", "ct_mask"))}
CPU = torch.device("cpu")


def box(*shape, mm=1.0):
    return Grid(shape, np.diag([mm, mm, mm, 1.0]))


@pytest.fixture
def no_voxels(monkeypatch):
    "A package that fails where it reads the voxels of a file."

    def read(*_):
        raise AssertionError("voxels were read")

    monkeypatch.setattr("spinereg.files.nifti.read_voxels", read)


def save(path, shape, mm, dtype="int16"):
    nib.save(nib.Nifti1Image(np.random.default_rng(0).integers(0, 900, shape).astype(dtype), np.diag([*np.broadcast_to(mm, 3), 1.0])), path)
    return path


@pytest.mark.usefixtures("no_voxels")
def test_C10_X21_what_cannot_fit_is_refused_with_three_remedies_before_a_voxel_is_read(monkeypatch):
    """C10, X21: the error says what is needed and what is free, and its spacing_mm does fit."""
    monkeypatch.setattr(memory, "free_gb", lambda device: 0.5)
    with pytest.raises(MemoryError) as caught:
        spinereg.register(**EASY, spacing_mm=0.6)
    text = str(caught.value)
    assert text.startswith("register: ") and "0.5 GB are free on cpu" in text and "107 x 160 x 267 voxels of 0.6 mm" in text
    assert "Crop Volume" in text and "a computer with" in text
    fits = float(re.search(r"spacing_mm=([\d.]+) takes", text)[1])
    with pytest.raises(AssertionError, match="voxels were read"):
        spinereg.register(**EASY, spacing_mm=fits)
    assert memory_gb(header_grid(EASY["fixed"]), header_grid(EASY["moving"]), fits - 0.1, True) > 0.8 * 0.5


def test_C10_X21_what_is_tight_is_said_and_what_fits_is_not(monkeypatch):
    """C10, X21: a line from four fifths of what is free on, an error from there."""
    pair = box(100, 100, 100), box(100, 100, 100)
    needed = memory_gb(*pair, 1.0, True)
    for share, lines in ((1.3, 0), (1.1, 1)):
        monkeypatch.setattr(memory, "free_gb", lambda device, share=share: share * needed)
        said = check_memory("prepare", *pair, 1.0, True, CPU)
        assert len(said) == lines and all("larger spacing_mm" in line for line in said)
    monkeypatch.setattr(memory, "free_gb", lambda device: 0.1)
    with pytest.raises(MemoryError, match="no spacing_mm up to 5 is enough"):
        check_memory("prepare", *pair, 1.0, True, CPU)


def test_C10_X21_a_gpu_that_is_full_sends_to_the_processor(monkeypatch):
    """C10, X21: the third remedy of a GPU is device='cpu', where that has room."""
    monkeypatch.setattr(memory, "free_gb", lambda device: 0.3 if device.type == "cuda" else 50.0)
    with pytest.raises(MemoryError, match="device='cpu' has 50.0 GB free"):
        check_memory("register", box(200, 200, 200), box(200, 200, 200), 1.0, True, torch.device("cuda"))


def test_C10_X21_a_gpu_in_a_computer_that_is_full_is_refused_too(monkeypatch):
    """C10, X21: images are read before they go there; smaller voxels of the working grid do not help, and neither does the processor."""
    monkeypatch.setattr(memory, "free_gb", lambda device: 50.0 if device.type == "cuda" else 0.6)
    pair = box(200, 200, 200), box(200, 200, 200)
    with pytest.raises(MemoryError, match=r"the images, before they go to cuda.*0.6 GB are free on cpu.*Crop Volume.*a computer with 1 GB") as caught:
        check_memory("register", *pair, 1.0, True, torch.device("cuda"))
    assert "device=" not in str(caught.value) and "no spacing_mm up to 5 is enough" in str(caught.value)
    monkeypatch.setattr(memory, "free_gb", lambda device: 50.0 if device.type == "cuda" else 0.9)
    assert [line for line in check_memory("register", *pair, 1.0, True, torch.device("cuda")) if "smaller images need less" in line]


@pytest.mark.parametrize(("said", "place", "names"), [
    ("0::/\n", "", ("memory.max", "memory.current", "inactive_file")),
    ("0::/slurm/job_7/step_0\n", "slurm/job_7", ("memory.max", "memory.current", "inactive_file")),
    ("9:cpu,cpuacct:/x\n7:memory:/docker/ab:cd\n0::/x\n", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ("7:memory:/slurm/job_7/step_0\n", "memory/slurm/job_7", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
])  # fmt: skip
def test_C10_X21_the_limit_of_a_container_or_a_job_counts(tmp_path, monkeypatch, said, place, names):
    """C10, X21: of both versions of control groups, of the group itself or one around it; files that nobody reads can be given back."""
    (tmp_path / "said").write_text(said)
    folder = tmp_path / "groups" / place
    folder.mkdir(parents=True)
    for name, text in zip((*names[:2], "memory.stat"), ("3000000000", "2500000000", f"rss 9\n{names[2]} 100000000\n"), strict=True):
        (folder / name).write_text(text)
    groups = memory.control_groups(tmp_path / "said", tmp_path / "groups")
    assert folder in groups and min(map(memory.left_gb, groups)) == pytest.approx(0.6)
    monkeypatch.setattr(memory, "control_groups", lambda: groups)
    assert memory.free_gb(CPU) == pytest.approx(0.6)
    (folder / names[0]).write_text("max\n" if names[0] == "memory.max" else "9223372036854771712\n")
    assert memory.free_gb(CPU) > 0.6


def test_C10_X21_the_working_grid_of_the_samples_is_foreseen():
    """C10, X21: never more than a fifth off in voxels, oblique and thick slices too, before and after the labels are known."""
    for name in ("easy_0", "clinical_0"):
        folder = f"data_samples/test/{name}"
        pair = read_pair(*(f"{folder}/{file}.nii.gz" for file in ("mr_t1", "ct", "ct_mask")))
        grids = [header_grid(f"{folder}/{file}.nii.gz") for file in ("mr_t1", "ct")]
        assert grids[0].same_as(pair.fixed.grid) and grids[1].same_as(pair.moving.grid)
        scene = make_scene(pair, np.eye(4), CPU)
        for labelled, seen in ((True, scene), (False, scene._replace(labels=None))):
            there, foreseen = (np.prod(shape) for shape in (working_grid(seen, 2.0).shape, working_voxels(*grids, 2.0, labelled)))
            assert 0.8 < foreseen / there < 1.25, (name, labelled)


def test_C10_X21_headers_that_say_nothing_are_left_to_the_reader(tmp_path):
    """C10, X21: no file, a folder, no NIfTI, a cut file: no grid, and no memory is talked of."""
    (tmp_path / "text.nii.gz").write_text("hello")
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(open(EASY["fixed"], "rb").read()[:40])
    for path in (tmp_path / "none.nii.gz", tmp_path, tmp_path / "text.nii.gz", cut):
        assert header_grid(path) is None
    assert check_memory("register", None, box(900, 900, 900), 0.2, False, CPU) == []


def test_C10_X21_an_image_of_99_mm_voxels_takes_no_15_gb(tmp_path):
    """C10, X21: with labels only the vertebrae count, without them it is refused; laying the working grid takes less than 0.3 GB."""
    pair = read_pair(save(tmp_path / "mr.nii.gz", (8, 8, 8), 99.0, "uint16"), EASY["moving"], EASY["moving_labels"], fixed_modality="mr")
    centre = np.eye(4)
    centre[:3, 3] = pair.moving.grid.centre_mm - pair.fixed.grid.centre_mm
    scene, before = make_scene(pair, centre, CPU), peak_memory_bytes()
    grid = working_grid(scene, 1.0)
    assert peak_memory_bytes() - before < 0.3e9 and np.prod(grid.shape) < 3e6
    assert max(working_grid(scene._replace(labels=None), 1.0).shape) <= 161 and pair.fixed.grid.size_mm.min() == 792
    huge = save(tmp_path / "other.nii.gz", (8, 8, 8), 99.0)
    with pytest.raises(MemoryError, match="792 x 792 x 792 voxels"):
        spinereg.register(tmp_path / "mr.nii.gz", huge, moving_modality="mr", fixed_modality="mr")


def test_working_grids_are_the_same_as_from_all_voxels_of_the_fixed_image():
    """C10, X21: looking only where the moving image can be seen leaves out nothing, whatever the start."""
    from spinereg.space.fields import warp_labels
    from spinereg.space.geometry import crop_grid, respace_grid
    from spinereg.space.images import coverage
    from spinereg.space.rigid import twist_matrix

    pair = read_pair(*(f"data_samples/test/clinical_0/{file}.nii.gz" for file in ("mr_t1", "ct", "ct_mask")))
    for twist in ((0, 0, 0, 0, 0, 0), (0.1, 0, 0.09, 6, -4, 45), (0, 0.3, 1.2, 40, 0, 60)):
        scene = make_scene(pair, twist_matrix(torch.tensor(twist, dtype=torch.float64)).numpy(), CPU)
        whole = respace_grid(scene.fixed_grid, 3.0)
        bone = warp_labels(scene.labels.data[None], scene.labels.grid, whole, world=scene.rigid)[0][0] > 0
        shared = coverage(scene.moving_grid, whole, scene.moving, scene.rigid)[0, 0] > 0
        for seen, wanted, margin in ((scene, bone, 6), (scene._replace(labels=None), shared, 0)):
            if not wanted.any():
                with pytest.raises(ValueError, match="prealign"):
                    working_grid(seen, 3.0)
                continue
            at = wanted.nonzero().numpy()
            expected = crop_grid(whole, (at.min(0) - margin).clip(0), np.minimum(at.max(0) + 1 + margin, whole.shape))
            assert working_grid(seen, 3.0).same_as(expected, 1e-6)


@pytest.mark.parametrize(
    ("levels", "steps", "said"),
    [
        (None, None, "levels=None: expected numbers from 1 to 64"),
        ("421", (5, 5, 5), "levels='421': expected numbers"),
        (("4", "2"), (5, 5), "levels=('4', '2')"),
        ((1e9,), (5,), "levels=(1000000000.0,): expected numbers"),
        (4, (5,), "levels=4: expected numbers"),
        (((4, 2), (1,)), (5, 5), "expected numbers from 1 to 64"),
        ((float("nan"),), (5,), "levels=(nan,)"),
        ((float("inf"),), (5,), "levels=(inf,)"),
        (np.ones((2, 2)), (5, 5), "expected numbers from 1 to 64"),
        (np.array([1.0, 2.0]), np.array([5, 5]), "coarse to fine"),
        ((), (), "levels=()"),
        ((2, 1), "55", "steps='55': expected numbers"),
        ((2, 1), None, "steps=None: expected numbers"),
        ((2, 1), (5, 2.5), "one whole number of steps for each level"),
        ((2, 1), (5, 0), "steps=(5, 0)"),
        ((2, 1), np.array([5.0, np.nan]), "steps=array("),
    ],
)
def test_C10_X21_levels_and_steps_that_make_no_sense_are_one_sentence(levels, steps, said):
    """C10, X21: whatever kind of thing they are."""
    assert said in schedule_fault(levels, steps)


WRONG = """
import numpy as np, spinereg
wrong = [{"levels": levels} for levels in (None, "421", 4, (1e9,), np.ones((2, 2)))] + [{"steps": steps} for steps in ("555", 3)]
for wrong in [*wrong, dict.fromkeys(("fixed", "moving", "fixed_scheme", "moving_scheme"))]:
    try:
        spinereg.register(**{"fixed": "no.nii.gz", "moving": "file.nii.gz"} | wrong)
    except ValueError as error:
        print(str(error).replace(chr(10), " "))
"""


def test_C10_X21_what_is_no_setting_is_one_sentence_of_register():
    """C10, X21: None, texts and numbers in the place of levels, steps, images and schemes, where nothing looks at types."""
    said = subprocess.run([sys.executable, "-c", WRONG], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 8 and all(line.startswith("register: ") for line in said)
    assert all("expected numbers from 1 to" in line for line in said[:7])
    assert "fixed=None: expected the path of the image that stays; moving=None: expected the path of the image that is moved" in said[7]
    assert all(f"{name}_scheme=None: expected one of verse" in said[7] for name in ("moving", "fixed"))


def test_C10_X21_levels_and_steps_may_be_arrays():
    """C10, X21: an array is as good as a tuple."""
    settings = RegisterSettings(fixed="mr.nii.gz", moving="ct.nii.gz", levels=np.array([4, 2.0]), steps=np.array([9, 8]))
    assert settings.levels == (4.0, 2.0) and settings.steps == (9, 8) and not schedule_fault([4, 4.0], np.array([1.0, 2.0]))


@pytest.mark.usefixtures("no_voxels")
def test_C10_X21_a_level_without_a_voxel_is_refused_by_the_headers(tmp_path):
    """C10, X21: a tiny image at the largest spacing; and voxels as large as the image are allowed."""
    tiny = save(tmp_path / "mr.nii.gz", (8, 9, 10), 1.0)
    with pytest.raises(ValueError, match=r"a voxel of 20 mm is larger than the fixed image \(8 x 9 x 10 mm\); expected levels of at most 1.6"):
        spinereg.register(tiny, EASY["moving"], spacing_mm=5.0)
    assert levels_fault((8, 1), 1.0, box(8, 9, 10), box(99, 99, 99)) == ""
    assert "moving image" in levels_fault((8.1, 1), 1.0, box(9, 9, 10), box(99, 8, 99))


def test_the_record_tells_the_number_of_threads():
    """F9: sums in another order are another result, so how many threads made it is written down."""
    assert environment(CPU).as_dict()["threads"] == torch.get_num_threads()
