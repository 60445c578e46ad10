"""Whole small runs, killed: what is left, and how another try ends: `OMP_NUM_THREADS=1 python tests/benchmarks/kills.py [kills] [--out folder]`.

50 kills take twenty minutes on a busy core. A kill that was done is not done again; rows.jsonl in the folder has a row for each.

Every other run is a registration, the others are trainings with checkpoints and validations. Half of them write over something
that is whole: the result of another case, or a shorter training and such a result beside it. All have an input and files of
somebody in their folder. Half are killed at any moment, half within 20 ms of a change that they make in the folder. The child is
forked from this process, so no moment is spent on imports. What is left is one of these:

- nothing: neither a result nor a checkpoint
- old, new: whole, and to the last bit what an unbroken run writes; of a training, the epoch of its checkpoint is less, or the last
- said: readers say that the result is not whole
- MIXED: taken for whole, and not what an unbroken run writes; LOST: what was there is gone or unreadable; TOUCHED: an input or a
  file of somebody is not as it was: defects

Then the same is run to its end. "as unbroken" is a result or a training like that of an unbroken run, with nothing aside left.
"""

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import accelerate  # noqa: F401 here, as the children would spend their time on it
import nibabel as nib
import numpy as np
import pandas as pd
import torch
import torch._dynamo  # noqa: F401 likewise
from bench import keep_rows, markdown, read_rows

from spinereg.compare.evaluation import read_run
from spinereg.files.manifest import MANIFEST, read_manifest, result_files
from spinereg.files.problems import InputError, InputFile
from spinereg.files.transforms import read_transform
from spinereg.learning import fit as training
from spinereg.learning.checkpoint import read_checkpoint
from spinereg.registration import register as registration
from spinereg.registration.bones_first import read_poses
from spinereg.registration.networks import UNet, load_network, numbers_hash, save_weights

SAMPLES = Path(__file__).resolve().parent.parent.parent / "data_samples"
CASES, BONE = {"old": SAMPLES / "train/easy_6", "new": SAMPLES / "test/easy_0"}, {"old": 20, "new": 22}  # L1 and L3, as each takes its time
REGISTER = {"method": "rigid", "spacing_mm": 5.0, "prealign": "header", "device": "cpu"}
FIT = {"spacing_mm": 5.0, "crop": (13, 19, 32), "crops_per_case": 1, "prealign": "header", "logger": "none", "device": "cpu"}
FIT |= {"similarity": "lncc", "learning_rate": 1e-3, "validate_every": 1}
EPOCHS, VARYING = 4, ("metrics.json",)  # the one file with the time in it
THEIRS = {"notes.txt": "notes", "vertebrae/mine.tfm": "theirs", "prepared/mine.pt": "theirs", "best.txt": "theirs"}


class OneProcess:
    "An accelerator of one process, as `read_checkpoint` asks for."

    is_main_process = True


def register(folder, case="new"):
    files = {"fixed": CASES[case] / "mr_t1.nii.gz", "moving": folder / f"{case}_ct.nii.gz", "moving_labels": folder / f"{case}_mask.nii.gz"}
    registration.register(**files, **REGISTER, out_dir=folder)


def fit(folder, epochs=EPOCHS):
    stages = {"epochs_similarity": min(epochs, 2), "epochs_rigidity": max(epochs - 2, 0)}
    training.fit(folder / "data", folder, resume=True, start=folder / "start.safetensors", **stages, **FIT)


RUNS = {"register": register, "fit": fit}


def work(what, folder, changes, given):
    "A run in a process of its own, which counts the changes that it makes in its folder."

    def count(event, args):
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")) and str(folder) in str(args):
            changes.value += 1

    sys.addaudithook(count)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    RUNS[what](folder, **given)


def start(what, folder, **given):
    context = multiprocessing.get_context("fork")
    changes = context.Value("i", 0, lock=False)
    child = context.Process(target=work, args=(what, folder, changes, given))
    child.start()
    return child, changes


def run_whole(what, folder, **given):
    "How long a run takes, and how many changes it makes."
    began = time.monotonic()
    child, changes = start(what, folder, **given)
    child.join()
    assert child.exitcode == 0, f"{what} in {folder} ended with {child.exitcode}"
    return {"seconds": time.monotonic() - began, "changes": changes.value}


def furnish(folder):
    "An input, and files of somebody."
    shutil.copytree(SAMPLES / "train/easy_6", folder / "data/train/easy_6")
    shutil.copytree(SAMPLES / "val/easy_5", folder / "data/val/easy_5")
    for name, case in CASES.items():
        shutil.copy(case / "ct.nii.gz", folder / f"{name}_ct.nii.gz")
        mask = nib.load(case / "ct_mask.nii.gz")
        one = np.where(np.asarray(mask.dataobj) == BONE[name], BONE[name], 0).astype(np.uint8)
        nib.save(nib.Nifti1Image(one, mask.affine), folder / f"{name}_mask.nii.gz")
    torch.manual_seed(0)
    save_weights(folder / "start.safetensors", UNet(False), 5.0, {"epoch": 0})
    for name, text in THEIRS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def theirs(folder):
    "What no run may touch, and what is in it."
    names = [*folder.glob("???_*.nii.gz"), folder / "start.safetensors", *(folder / name for name in THEIRS), *(folder / "data").rglob("*.*")]
    return {str(path.relative_to(folder)): path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def result_hashes(folder):
    "What the manifest says of a result."
    return {name: said["sha256"] for name, said in read_manifest(folder)["files"].items() if name not in VARYING}


def read_result(folder):
    "A result as all readers see it; None where there is none, "" where they say that it is not whole."
    if not (folder / MANIFEST).exists():
        return None
    readers = (read_transform, read_poses, lambda folder: read_run(folder.parent, [folder.name]))
    try:
        with result_files(InputFile("result", folder), "*"):
            found = result_hashes(folder)
    except InputError as error:
        if "whole is false" not in str(error):
            raise
        for read in readers:
            try:
                read(folder)
            except InputError:
                continue
            raise ValueError("a reader takes for whole what is not") from error
        return ""
    for read in readers:
        read(folder)
    return found


def read_training(folder):
    "Epoch of the checkpoint, and the numbers of it and of all weights by name and epoch; None where there is no checkpoint."
    found = {}
    for name in ("stage1", "best", "last"):
        if (folder / f"{name}.safetensors").exists():
            trained = load_network(folder / f"{name}.safetensors")
            found[f"{name} {trained.about['epoch']}"] = numbers_hash(trained.network.state_dict())
    for name in ("steps", "epochs", "validation"):
        if (folder / f"{name}.csv").exists():
            pd.read_csv(folder / f"{name}.csv")
    if not (folder / "last.pt").exists():
        return None, found
    state = read_checkpoint(folder / "last.pt", OneProcess())
    epoch = state["progress"]["epoch"]
    return epoch, found | {f"last {epoch}, last.pt": numbers_hash(state["network"])}


def tables(folder):
    return [pd.read_csv(folder / f"{name}.csv") for name in ("steps", "validation")]


def references(out):
    "Unbroken runs, made once: their folders, how long they take, and all that they ever write."
    kept, rows = out / "unbroken.jsonl", {row["run"]: row for row in read_rows(out / "unbroken.jsonl")}
    for name in ("old", "new", "again", "long", *map(str, range(1, EPOCHS + 1))):
        if name in rows:
            continue
        place = out / "unbroken" / ("short" if name.isdecimal() else name)
        if not place.exists():
            place.mkdir(parents=True)
            furnish(place)
        if name in ("old", "new", "again"):
            rows[name] = run_whole("register", place, case="old" if name == "old" else "new") | {"written": read_result(place)}
        else:
            rows[name] = run_whole("fit", place, epochs=EPOCHS if name == "long" else int(name)) | {"written": read_training(place)[1]}
        if name == "2":
            shutil.copytree(place, place.with_name("two"))
        keep_rows(kept, [row | {"run": run} for run, row in rows.items()])
    new, again = rows["new"]["written"], rows["again"]["written"]
    rows["new"]["written"] = {name: found for name, found in new.items() if again[name] == found}
    return rows


def left_of(what, folder, before, rows):
    "The class of what is left in a folder."
    try:
        if what == "register":
            found, old, new = read_result(folder), rows["old"]["written"], rows["new"]["written"]
            if found is None:
                return "LOST" if before else "nothing"
            if found == "":
                return "said"
            return "old" if found == old else "new" if new.items() <= found.items() and found.keys() == rows["again"]["written"].keys() else "MIXED"
        epoch, found = read_training(folder)
        good = {key: value for name in map(str, range(1, EPOCHS + 1)) for key, value in rows[name]["written"].items()}
        if not found.items() <= good.items():
            return "MIXED"
        if before and (epoch or 0) < 2 or before and read_result(folder) != rows["old"]["written"]:
            return "LOST"
        return "nothing" if epoch is None else "new" if epoch == EPOCHS else f"epoch {epoch}"
    except Exception as error:
        return f"LOST {type(error).__name__}: {error}"[:200]


def again(what, folder, before, rows):
    "How the same ends when nobody kills it."
    try:
        run_whole(what, folder)
    except AssertionError as error:
        return f"FAILED {error}"
    if left := [path.relative_to(folder).as_posix() for path in folder.rglob(".partial-*")]:
        return f"LEFT {left[0]}"
    if left_of(what, folder, before, rows) != "new":
        return f"DIFFERS {left_of(what, folder, before, rows)}"
    if what == "fit" and not all(one.equals(other) for one, other in zip(tables(folder), tables(folder.parent / "unbroken/long"))):
        return "DIFFERS in its tables"
    return "as unbroken"


def one_kill(number, out, rows):
    "What is done, when it is killed, what is left, how it ends."
    draw, folder = random.Random(number), out / f"kill_{number}"
    what, before, near = ("register", "fit")[number % 2], number // 2 % 2 == 1, number // 4 % 2 == 1
    shutil.rmtree(folder, ignore_errors=True)
    if before:
        shutil.copytree(out / "unbroken" / ("old" if what == "register" else "two"), folder)
        if what == "fit":
            with result_files(InputFile("result", out / "unbroken/old"), "*") as files:
                for path in (*files, out / "unbroken/old" / MANIFEST):
                    (folder / path.relative_to(out / "unbroken/old").parent).mkdir(exist_ok=True)
                    shutil.copy(path, folder / path.relative_to(out / "unbroken/old"))
    else:
        folder.mkdir(parents=True)
        furnish(folder)
    own, took = theirs(folder), rows["new" if what == "register" else "long"]
    change, moment = draw.randrange(1, took["changes"] + 1), draw.uniform(0, took["seconds"])
    child, changes = start(what, folder)
    began = time.monotonic()
    while child.is_alive() and (changes.value < change if near else time.monotonic() - began < moment):
        time.sleep(0.0002)
    time.sleep(draw.uniform(0, 0.02) if near else 0)
    child.kill()
    child.join()
    row = {"number": number, "run": what, "over": "something whole" if before else "nothing", "killed": "at a change" if near else "at any moment"}
    row |= {"after, s": time.monotonic() - began, "changes": changes.value, "ended": child.exitcode == 0}
    row["left"] = left_of(what, folder, before, rows) if theirs(folder) == own else "TOUCHED"
    row["again"] = again(what, folder, before, rows) if theirs(folder) == own else "TOUCHED"
    if row["again"] == "as unbroken" and theirs(folder) != own:
        row["again"] = "TOUCHED"
    if row["again"] == "as unbroken" and row["left"].split()[0] not in ("LOST", "MIXED", "TOUCHED"):
        shutil.rmtree(folder)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=50)
    parser.add_argument("--out", type=Path, default=Path("out/kills"), help="folder for the runs, and rows.jsonl; what is there already is kept")
    given = parser.parse_args()
    torch.set_num_threads(1)
    out = given.out.absolute()
    unbroken, kept = references(out), out / "rows.jsonl"
    rows = read_rows(kept)
    for number in range(len(rows), given.kills):
        rows.append(one_kill(number, out, unbroken))
        print(*rows[-1].values(), flush=True)
        keep_rows(kept, rows)
    found = Counter((row["run"], row["over"], row["killed"], row["left"], row["again"]) for row in rows)
    print(markdown([dict(zip(("run", "over", "killed", "left", "again"), key)) | {"kills": count} for key, count in sorted(found.items())]))


if __name__ == "__main__":
    main()
