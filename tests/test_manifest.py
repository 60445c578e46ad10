"""A result folder is whole and of one run, or it is refused: kills, full disks, two runs at once, other people's files."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from spinereg.apps.batch import run_batch
from spinereg.apps.plan import whole_result
from spinereg.compare.evaluation import read_run
from spinereg.files.foreign import read_map
from spinereg.files.manifest import MANIFEST, check_out, check_room, read_manifest, result_files, write_result
from spinereg.files.problems import InputError, InputFile, folder_aside, here, is_left
from spinereg.files.transforms import TRANSFORM_FILES, read_transform, write_motions
from spinereg.learning.cases import check
from spinereg.learning.fit import fit
from spinereg.registration import register as register_module
from spinereg.registration.apply import apply
from spinereg.registration.bones_first import read_poses
from spinereg.registration.register import register
from spinereg.registration.results import RESULT_FILES
from spinereg.registration.rigidify import rigidify

CASE = Path(__file__).resolve().parent.parent / "data_samples/test/easy_0"
FILES = {"fixed": CASE / "mr_t1.nii.gz", "moving": CASE / "ct.nii.gz", "moving_labels": CASE / "ct_mask.nii.gz"}
QUICK = {"method": "rigid", "prealign": "header", "spacing_mm": 5.0, "device": "cpu"}
NAMES = ("image.txt", "labels.txt", "metrics.json", "bones/L1.txt", "bones/L2.txt")
POSIX = pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")

DIES = """
import os, signal, sys
from pathlib import Path
from spinereg.files.manifest import write_result

folder, text, names, last = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(), int(sys.argv[4])
calls = 0

def count(event, args):
    "The process dies at its k-th change of the folder: a rename, a removal, a new folder."
    global calls
    if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(folder) in str(args):
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
with write_result(folder) as aside:
    for name in names:
        (aside / name).parent.mkdir(exist_ok=True)
        (aside / name).write_text(text)
print(calls)
"""


def write_text(folder, text, names=NAMES):
    with write_result(folder) as aside:
        for name in names:
            (aside / name).parent.mkdir(exist_ok=True)
            (aside / name).write_text(text)


def texts(folder):
    "What is in the files of a result, once it was compared with its manifest."
    with result_files(InputFile("result", folder), "*") as files:
        return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def leavings(folder):
    return list(folder.rglob(".partial-*"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A result that takes little time, and its folder."
    out = tmp_path_factory.mktemp("saved") / "out"
    return register(**FILES, **QUICK, out_dir=out), out


@pytest.fixture
def folder(saved, tmp_path):
    "A copy of that folder."
    return Path(shutil.copytree(saved[1], tmp_path / "copy"))


# killed


@POSIX
def test_d_kill_leaves_the_old_result_or_one_that_is_refused(tmp_path):
    """D-kill: a process dies at every change it makes in the folder; never a mix that is read; the next run works and leaves nothing else."""
    fewer, k, outcomes = " ".join(NAMES[:1] + NAMES[2:4] + ("bones/L5.txt",)), 0, []
    new = dict.fromkeys(fewer.split(), "new")
    old = dict.fromkeys(NAMES, "old")
    while True:
        k, out = k + 1, tmp_path / f"{k + 1}"
        write_text(out, "old")
        (out / "bones/theirs.tfm").write_text("theirs")
        done = subprocess.run([sys.executable, "-c", DIES, out, "new", fewer, str(k)], capture_output=True, text=True, check=False)
        if read_manifest(out)["whole"]:
            assert texts(out) in (old, new)
            outcomes.append("old" if texts(out) == old else "new")
        else:
            outcomes.append("refused")
            with pytest.raises(InputError, match=r"stopped before all files were in their places.*Run again"):
                texts(out)
        check_room(out, (*NAMES, "bones/L5.txt"))
        write_text(out, "again")
        assert texts(out) == dict.fromkeys(NAMES, "again") and not leavings(out)
        assert (out / "bones/theirs.tfm").read_text() == "theirs" and not (out / "bones/L5.txt").exists()
        if done.returncode == 0:
            break
    assert outcomes == sorted(outcomes, key=["old", "refused", "new"].index) and outcomes.count("refused") > len(new)


@POSIX
def test_d_kill_in_an_empty_folder_is_refused_too(tmp_path):
    """D-kill: there is no old result to fall back on, and what was put in place already is ours to replace."""
    for k in range(1, 100):
        out = tmp_path / str(k)
        done = subprocess.run([sys.executable, "-c", DIES, out, "new", " ".join(NAMES), str(k)], capture_output=True, check=False)
        if any(out.glob("*.txt")) and not read_manifest(out)["whole"]:
            with pytest.raises(InputError, match="stopped before"):
                texts(out)
        write_text(out, "again")
        assert texts(out) == dict.fromkeys(NAMES, "again") and not leavings(out)
        if done.returncode == 0:
            return
    raise AssertionError("never came to its end")


def test_d_kill_a_stopped_save_is_refused_by_every_reader(folder, monkeypatch, saved):
    """D-kill: map, poses, table, evaluation; and another save makes it good."""
    rename = os.replace

    def stops(path, place):
        if Path(place).name == "moved.nii.gz" and Path(place).parent == folder:
            raise KeyboardInterrupt
        rename(path, place)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stops)
        with pytest.raises(KeyboardInterrupt):
            saved[0].save(folder)
    readers = [lambda: read_transform(folder), lambda: read_transform(folder / "transform.h5"), lambda: read_map(folder), lambda: read_poses(folder)]
    readers += [lambda: read_poses(folder / "vertebrae.csv"), lambda: read_run(folder.parent)]
    readers += [lambda: apply(folder, FILES["moving"], folder.parent / "a.nii.gz", onto=FILES["fixed"])]
    readers += [lambda: register(**FILES, method="polyrigid", poses=folder)]
    for read in readers:
        with pytest.raises(ValueError, match=r"stopped before all files were in their places.*Run again"):
            read()
    assert not whole_result(folder, wrote=True)
    saved[0].save(folder)
    assert whole_result(folder, wrote=True) and read_run(folder.parent)[0].case.tolist() == ["copy"] and not leavings(folder)


def test_d_kill_leavings_of_a_living_run_are_left_alone(tmp_path):
    """D-kill: of this process, of another that lives, of another machine; those of the dead go, and of what only looks alike nothing."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with folder_aside(tmp_path) as mine:
            pid, began, host = mine.name.removeprefix(".partial-").split("-", 2)
            host = host.rsplit("-", 1)[0]
            child_began = round(psutil.Process(child.pid).create_time())
            living = [mine.name, f".partial-{child.pid}-{child_began}-{host}-a", f".partial-1-1-else-where-{'b' * 8}"]
            dead = [f".partial-{child.pid}-{child_began - 1000}-{host}-c", f".partial-99999999-{began}-{host}-d-turn", ".partial-1-1-else-where-e"]
            for name in {*living, *dead, ".partial-abc"} - {mine.name}:
                (tmp_path / name).mkdir()
            os.utime(tmp_path / dead[2], (1, 1))
            assert [is_left(tmp_path / name) for name in living + dead] == [False] * 3 + [True] * 3
            write_text(tmp_path, "1")
            assert {path.name for path in leavings(tmp_path)} == {*living, ".partial-abc"}
    finally:
        child.kill()
        child.wait()


def test_d_kill_a_container_of_the_same_name_is_another_machine(tmp_path, monkeypatch):
    """D-kill: there, the number of a process means another one; its folder is left alone for a day, its mark for ten minutes."""
    with folder_aside(tmp_path) as aside, folder_aside(tmp_path, "-turn") as mark:
        aged = dict.fromkeys((aside, mark), time.time())
        for path, number in ((aside, os.getpid()), (mark, 99999999)):
            other = path.with_name(re.sub(r"^\.partial-\d+", f".partial-{number}", path.name).replace("@", "@0"))
            other.mkdir()
            aged[other] = time.time()
        mine, its_mark = list(aged)[2:]
        assert not any(map(is_left, aged))
        for path, age in ((mine, 80000), (its_mark, 500)):
            os.utime(path, (time.time() - age,) * 2)
        assert not is_left(mine) and not is_left(its_mark)
        for path, age in ((mine, 90000), (its_mark, 700)):
            os.utime(path, (time.time() - age,) * 2)
        assert is_left(mine) and is_left(its_mark)
    assert not here().startswith("@") and here() == here()


def test_d_kill_a_power_cut_finds_files_on_the_disk_before_a_manifest_names_them(tmp_path, monkeypatch):
    """D-kill: every file is sent to the disk before it takes its place, and folders before the manifest says whole."""
    done, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.fstat(handle).st_ino), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda path, place: (done.append((Path(path).stat().st_ino, Path(place))), rename(path, place)))
    write_text(tmp_path, "1")
    moved = [number for number, what in enumerate(done) if isinstance(what, tuple)]
    assert all(done[number][0] in done[:number] for number in moved)
    assert [done[number][1].name for number in moved] == [MANIFEST, "L1.txt", "L2.txt", "image.txt", "labels.txt", "metrics.json", MANIFEST]
    first, last = moved[0], moved[-1]
    folders = {tmp_path.stat().st_ino, (tmp_path / "bones").stat().st_ino}
    assert done[first + 1] in folders and folders <= set(done[moved[-2] : last]) and tmp_path.stat().st_ino in done[last:]


# two at once


def test_two_results_at_once_are_never_mixed(tmp_path):
    """D-manifest, F16: the last one wins, with all of its files; who reads meanwhile gets one result, or an error."""
    begin, failed = threading.Barrier(4), []
    write_text(tmp_path, "0")

    def run(number):
        try:
            begin.wait()
            for _ in range(5):
                write_text(tmp_path, str(number), NAMES[number % 2 :])
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with contextlib.suppress(InputError, FileNotFoundError):
            assert len(set(texts(tmp_path).values())) == 1
    found = texts(tmp_path)
    assert not failed and len(set(found.values())) == 1 and found.keys() == {*NAMES[int(found["metrics.json"]) % 2 :]}
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == {*found, MANIFEST}


# as it was written


@pytest.mark.parametrize("name", ["transform.h5", "inverse.h5", "vertebrae/L3.tfm", "metrics.json"])
def test_d_manifest_three_flipped_bits_are_told(folder, name):
    """D-manifest: which file, what was found and expected, what to do."""
    content = bytearray((folder / name).read_bytes())
    for place in (len(content) // 3, len(content) // 2, len(content) - 9):
        content[place] ^= 1
    (folder / name).write_bytes(content)
    read = {"metrics.json": lambda: read_run(folder.parent), "vertebrae/L3.tfm": lambda: read_poses(folder)}
    with pytest.raises(InputError, match=f"{name} has {len(content)} bytes and the SHA-256 .* expected {len(content)} bytes .* or run again"):
        read.get(name, lambda: read_transform(folder))()


def test_d_manifest_without_it_a_result_is_refused_and_a_single_file_is_not(folder, tmp_path):
    """D-manifest: nothing says that the files of such a folder are of one run."""
    (folder / MANIFEST).unlink()
    for read in (read_transform, read_poses, lambda folder: read_run(folder.parent)):
        with pytest.raises(InputError, match="expected a manifest.json beside it"):
            read(folder)
    assert np.isfinite(read_transform(folder / "transform.h5").rigid).all()
    with pytest.raises(InputError, match=r"transform.h5, .*would be replaced.*delete them if"):
        check_room(folder, RESULT_FILES)


def test_d_manifest_a_missing_file_is_told(folder):
    (folder / "inverse.h5").unlink()
    with pytest.raises(InputError, match=r"inverse.h5 is not there, expected \d+ bytes"):
        read_transform(folder)


def test_d_manifest_one_that_names_files_elsewhere_is_not_followed(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    write_text(tmp_path / "out", "1")
    said = json.loads((tmp_path / "out" / MANIFEST).read_text())
    for name in ("../precious.txt", str(tmp_path / "precious.txt"), "..\\precious.txt", "C:precious.txt", ""):
        (tmp_path / "out" / MANIFEST).write_text(json.dumps(said | {"files": {name: {"size": 4, "sha256": ""}}}))
        with pytest.raises(InputError, match="manifest.json.* would be replaced"):
            write_text(tmp_path / "out", "2")
    assert (tmp_path / "precious.txt").read_text() == "mine"


# what is not ours


def test_an_input_in_the_way_is_refused_before_any_work(tmp_path, monkeypatch):
    """D-manifest: `moved.nii.gz` in out_dir is the CT that is to be moved."""
    moving = Path(shutil.copy(FILES["moving"], tmp_path / "moved.nii.gz"))
    content = moving.read_bytes()
    monkeypatch.setattr("spinereg.registration.register.read_pair", lambda *_: pytest.fail("work was done"))
    with pytest.raises(InputError, match=r"moved.nii.gz in it would be replaced, and the run reads that"):
        register(**FILES | {"moving": moving}, **QUICK, out_dir=tmp_path)
    assert moving.read_bytes() == content and [path.name for path in tmp_path.iterdir()] == ["moved.nii.gz"]


def test_a_run_does_not_replace_what_it_reads(folder):
    """D-manifest: not even where an earlier run wrote it."""
    before = (folder / "moved.nii.gz").read_bytes()
    with pytest.raises(InputError, match=r"moved.nii.gz in it would be replaced, and the run reads that"):
        register(**FILES | {"moving": folder / "moved.nii.gz"}, **QUICK, out_dir=folder)
    with pytest.raises(InputError, match=r"transform.h5 in it would be replaced, and the run reads that"):
        rigidify(folder / "transform.h5", FILES["moving_labels"], out_dir=folder)
    for run in (lambda: rigidify(folder, FILES["moving_labels"], out_dir=folder), lambda: register(**FILES, poses=folder, out_dir=folder)):
        with pytest.raises(InputError, match=r"the result in it would be replaced, and the run reads that"):
            run()
    assert (folder / "moved.nii.gz").read_bytes() == before and read_transform(folder)


def test_a_result_is_not_replaced_by_one_of_another_kind(folder, monkeypatch):
    """D-manifest: a map alone would remove figures and images; a whole result takes the place of a map."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr("spinereg.registration.rigidify.read_labels", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(InputError, match=r"another kind of result, of which .*metrics.json.* would be removed. Give another folder"):
        rigidify("a.h5", FILES["moving_labels"], out_dir=folder)
    with pytest.raises(InputError, match="another kind of result"), write_result(folder, TRANSFORM_FILES) as aside:
        (aside / "transform.h5").write_text("1")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with write_result(folder.parent / "map", TRANSFORM_FILES) as aside:
        (aside / "transform.h5").write_text("1")
    check_room(folder.parent / "map", RESULT_FILES)


def test_a_result_is_not_saved_over_what_it_was_made_from(saved, folder):
    """D-manifest: an image out of an earlier result, and the result saved there later."""
    metrics = replace(saved[0].metrics, parameters=saved[0].metrics.parameters | {"moving": str(folder / "moved.nii.gz")})
    with pytest.raises(InputError, match=r"moved.nii.gz in it would be replaced, and the run reads that") as caught:
        replace(saved[0], metrics=metrics).save(folder)
    assert caught.value.result.metrics is metrics


@pytest.mark.parametrize("out", ["moved.nii.gz", "deep/../moved_labels.nii.gz"])
def test_f14_apply_writes_over_no_part_of_a_result(folder, out, monkeypatch):
    """F14, D-manifest: refused before the transform is read; beside it there is room."""
    (folder / "deep").mkdir()
    before = (folder / out).read_bytes()
    monkeypatch.setattr("spinereg.registration.apply.read_transform", lambda *_: pytest.fail("work was done"))
    with pytest.raises(InputError, match=r"it belongs to a result, as .*manifest.json says. Give another name"):
        apply(folder, FILES["moving"], folder / out, onto=FILES["fixed"])
    assert (folder / out).read_bytes() == before
    check_out("out", folder / "again.nii.gz", (".nii.gz",))


def test_what_is_not_ours_stays_and_is_not_read(saved, folder):
    """D-manifest: an executed notebook, notes, motions of somebody."""
    theirs = {"register.ipynb": "{}", "vertebrae/mine.tfm": "theirs", "vertebrae/notes.txt": "theirs", "vertebrae.txt": "theirs"}
    for name, text in theirs.items():
        (folder / name).write_text(text)
    motions = read_poses(folder)
    saved[0].save(folder)
    assert {name: (folder / name).read_text() for name in theirs} == theirs
    assert motions.keys() == read_poses(folder).keys() == saved[0].metrics.motions.keys()


@pytest.mark.parametrize("name", ["../L3", "/tmp/L3", "a/L3", "x" * 255])
def test_motions_stay_in_their_folder(tmp_path, name):
    """F-hostile: the names of vertebrae may come from a file."""
    with pytest.raises(InputError, match="vertebra .* makes no path"):
        write_motions(tmp_path, {name: np.eye(4)})
    assert not list(tmp_path.rglob("*L3*"))


def test_motions_of_somebody_under_our_names_are_in_the_way(tmp_path):
    write_motions(tmp_path, {"L3": np.eye(4)})
    with pytest.raises(InputError, match=r"vertebrae/L3.tfm would be replaced"):
        check_room(tmp_path, RESULT_FILES)


# full


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on the size of files is that of Linux")
@pytest.mark.parametrize("kilobytes", [0, 100, 300, 1000])
def test_d_full_disk_says_which_file_and_how_much_and_the_result_can_be_saved_again(saved, folder, kilobytes, tmp_path):
    """D-full-disk: as libraries see it, whichever of them meets the limit; the old result stays."""
    import resource

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1000, hard))
    try:
        with pytest.raises(OSError, match="could not be written") as caught:
            saved[0].save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = str(caught.value)
    assert "MB are free there" in said and "all files of the result take up to 22 MB" in said and "sys.last_value.result.save" in said
    assert ".partial" not in said and str(folder) in said and Path(caught.value.filename).name in RESULT_FILES
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before and not leavings(folder)
    assert read_transform(caught.value.result.save(tmp_path / "elsewhere"))


def test_d_full_disk_a_run_that_cannot_save_hands_its_result_over(tmp_path, monkeypatch):
    """D-full-disk: after the work, the error has the result of the whole run."""
    with monkeypatch.context() as patched:
        patched.setattr("spinereg.registration.results.write_image", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left on device") as caught:
            register(**FILES, **QUICK, out_dir=tmp_path / "out")
    assert caught.value.errno == 28 and caught.value.result.save(tmp_path / "out") == tmp_path / "out"
    assert read_poses(tmp_path / "out").keys() == caught.value.result.metrics.motions.keys()


def test_d_full_disk_a_file_that_came_meanwhile_is_kept_and_so_is_the_result(tmp_path, monkeypatch):
    """D-full-disk, D-manifest: the error of a result that is in the way of somebody's file has the result."""
    measure = register_module.measure_all

    def slow(*given):
        (tmp_path / "out/moved.nii.gz").write_text("theirs")
        return measure(*given)

    monkeypatch.setattr(register_module, "measure_all", slow)
    with pytest.raises(InputError, match=r"moved.nii.gz would be replaced.*The result is not lost.*error.result.save\(another folder\)") as caught:
        register(FILES["fixed"], FILES["moving"], **QUICK, out_dir=tmp_path / "out")
    assert (tmp_path / "out/moved.nii.gz").read_text() == "theirs" and not leavings(tmp_path)
    assert read_transform(caught.value.result.save(tmp_path / "elsewhere"))


# out_dir


WRITERS = {
    "register": lambda out: register(FILES["fixed"], FILES["moving"], **QUICK, out_dir=out),
    "rigidify": lambda out: rigidify("no such map", FILES["moving_labels"], out_dir=out),
    "fit": lambda out: fit("no such data", out, logger="none", device="cpu"),
    "check": lambda out: check("no such data", out_dir=out),
    "run_batch": lambda out: run_batch("samples", out_dir=out),
}
WRONG = {"file": "this/file", "under a file": "this/file/deeper", "long": "x" * 300, "zero": "a\0b", "device": "/dev/null"}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("writer", WRITERS)
def test_f14_an_out_dir_that_is_none_is_one_sentence_before_the_work(writer, wrong, tmp_path, monkeypatch):
    """F14: which parameter, what was got, what to do; nothing of free disk space."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "this").mkdir()
    (tmp_path / "this/file").write_text("mine")
    with pytest.raises(InputError) as caught:
        WRITERS[writer](WRONG[wrong])
    said = str(caught.value)
    assert said.startswith("out_dir ") and "Give the path of a folder that can be written into." in said
    assert "MB" not in said and ".partial" not in said and "\0" not in said and len(said) < 300
    assert (tmp_path / "this/file").read_text() == "mine" and len(list(tmp_path.rglob("*"))) == 2


def test_f14_a_disk_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    """F14: the system's words for it, under the name of the parameter."""

    def refuses(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuses)
    with pytest.raises(InputError, match=r"out_dir .*nothing can be written there \(Permission denied\). Give the path"):
        register(FILES["fixed"], FILES["moving"], **QUICK, out_dir=tmp_path)
