"""What happens to damaged files of every kind that is read: `python tests/benchmarks/fuzz.py [files of each kind]` (100; eight minutes on one core).

Every file is a good one with bytes changed, lost, added or cut off. Each kind is read in a process of its own, which may take
30 s and 1 GB for a file. It ends in one class:

- refused: an error of ours that names the file
- as before: what is read is what the whole file holds
- told: it is read otherwise, with a notice
- other numbers: it is read otherwise without a word, where the format has nothing that could tell (no checksum, a number that might be)
- SILENT: the same, where the format has a checksum or a manifest: a defect
- UNCLEAR: another exception; CRASH, HANG, MEMORY: as they say: defects
"""

import gzip
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch

from spinereg.files.foreign import read_itk
from spinereg.files.manifest import write_result
from spinereg.files.nifti import read_nifti
from spinereg.files.pairs import read_landmarks
from spinereg.files.points import AXES, read_points, write_points
from spinereg.files.problems import InputError, InputFile
from spinereg.files.transforms import read_transform, write_transform
from spinereg.files.volumes import read_labels
from spinereg.learning.checkpoint import read_checkpoint
from spinereg.registration.networks import UNet, load_network, save_weights
from spinereg.registration.optimise import make_transform
from spinereg.space.geometry import Grid
from spinereg.space.images import blur

ROOT = Path(__file__).resolve().parent.parent.parent
CASE = ROOT / "data_samples/test/easy_0"


class OneProcess:
    "An accelerator of one process, as `read_checkpoint` asks for."

    is_main_process = True


def image(path):
    file = InputFile("image", path)
    data, native = read_nifti(file)
    return [data, native.grid.affine], file.notices


def labels(path):
    found = read_labels(path)
    return [found.data.numpy(), found.grid.affine, found.names], found.notices


def transform(path):
    moved = read_itk(path)
    return [np.array([moved.TransformPoint(point) for point in np.random.default_rng(0).uniform(-9, 9, (20, 3)).tolist()])], ()


def result(path):
    found = read_transform(path.parent)
    return [found.disp.numpy(), found.rigid], ()


def weights(path):
    found = load_network(path)
    return [np.concatenate([value.numpy().ravel() for value in found.network.state_dict().values()]), found.spacing_mm], ()


def checkpoint(path):
    state = read_checkpoint(path, OneProcess())
    return [state["network"].numpy(), state["progress"]["epoch"]], ()


def table(path):
    return [read_points(path)[AXES].to_numpy(float)], ()


def pairs(path):
    found = read_landmarks(path)
    return [found.fixed_mm.numpy(), found.moving_mm.numpy(), found.names, found.vertebra], ()


def seeds(folder):
    "Good files -> (reader, whether the format can tell that it was damaged)."
    small = nib.load(CASE / "ct.nii.gz").slicer[10:40, 20:60, 30:80]
    mask = nib.load(CASE / "ct_mask.nii.gz")
    made = {}
    for name, kind in (("image.nii", nib.Nifti1Image), ("image2.nii", nib.Nifti2Image), ("image.nii.gz", nib.Nifti1Image)):
        nib.save(kind(np.asarray(small.dataobj), small.affine), folder / name)
        made[name] = image, name.endswith("gz")
    nib.save(nib.Nifti1Image(np.asarray(mask.dataobj), mask.affine), folder / "labels.nii")
    made["labels.nii"] = labels, False
    euler = sitk.Euler3DTransform((1, 2, 3), 0.1, 0.2, 0.3, (4, 5, 6))
    for name, moves in (("rigid.tfm", euler), ("rigid.mat", euler), ("spline.tfm", sitk.BSplineTransform(3, 3))):
        sitk.WriteTransform(moves, str(folder / name))
        made[name] = transform, False
    field = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(8, 7, 6, 3)), isVector=True)
    for name in ("field.nii.gz", "field.mha", "field.nrrd"):
        sitk.WriteImage(field, str(folder / name))
        made[name] = transform, name.endswith("gz")
    grid = Grid((12, 14, 16), np.diag([3.0, 3, 3, 1]))
    shift = blur(torch.randn(1, 3, *grid.shape, generator=torch.Generator().manual_seed(0)), (6.0, 6.0, 6.0))
    with write_result(folder / "result") as aside:
        write_transform(aside, make_transform(shift, grid, np.eye(4)))
    made["result/transform.h5"] = result, True
    save_weights(folder / "weights.safetensors", UNet(False), 2.0, {"epoch": 3})
    made["weights.safetensors"] = weights, False
    progress = {"epoch": 3, "taken": 0}
    torch.save({"format": "spinereg-training-2", "progress": progress, "network": torch.randn(5000)}, folder / "last.pt")
    made["last.pt"] = checkpoint, True
    points = pd.DataFrame(np.random.default_rng(0).uniform(-50, 50, (12, 3)), columns=AXES).assign(name=[f"p{k}" for k in range(12)])
    for name in ("points.csv", "points.mrk.json"):
        write_points(folder / name, points)
        made[name] = table, False
    shutil.copy(CASE / "landmarks.csv", folder / "landmarks.csv")
    made["landmarks.csv"] = pairs, False
    return made


def damaged(good, draw, packed):
    "A file with bytes changed, mostly in its first 600, or lost, added, cut off; whether that was done before it was packed."
    inner = packed and draw.random() < 0.6
    data, way = bytearray(gzip.decompress(good) if inner else good), draw.random()
    place = draw.randrange(min(len(data), 600)) if draw.random() < 0.6 else draw.randrange(len(data))
    if way < 0.15:
        data = data[: draw.randrange(len(data))]
    elif way < 0.3:
        data[place:place] = bytes(draw.randrange(256) for _ in range(draw.choice([1, 4, 50])))
    elif way < 0.4:
        del data[place : place + draw.choice([1, 4, 50])]
    else:
        for _ in range(draw.choice([1, 1, 2, 4, 16])):
            value = draw.choice([0, 255, 127, 128, draw.randrange(256), draw.choice(b"0123456789.-,:naefi")])
            data[min(place + draw.randrange(40), len(data) - 1)] = value
    return (gzip.compress(bytes(data), 1), True) if inner else (bytes(data), False)


def same(one, other):
    return all(np.array_equal(a, b, equal_nan=True) if isinstance(a, np.ndarray) else a == b for a, b in zip(one, other, strict=True))


def outcome(read, path, good, tells):
    "The class of one file."
    try:
        found, notices = read(path)
    except Exception as error:
        named = isinstance(error, (InputError, ValueError, OSError)) and (path.name in str(error) or path.parent.name in str(error))
        return "refused" if named else f"UNCLEAR {type(error).__name__}: {error}"[:150]
    if same(found, good):
        return "as before"
    return "told" if notices else "SILENT" if tells else "other numbers"


def work(read, path, cases, good, tells, answers):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, (content, inner) in cases:
        path.write_bytes(content)
        answers.send(number)
        found = outcome(read, path, good, tells and not inner)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most
        answers.send("MEMORY" if grown > 1e6 else found)
    answers.send(None)


def run_all(read, path, cases, good, tells):
    "The classes of all damaged files of one kind; a process that dies is begun again behind the file that killed it."
    found, done = Counter(), 0
    while done < len(cases):
        mine, its = multiprocessing.Pipe(False)
        child = multiprocessing.get_context("fork").Process(target=work, args=(read, path, cases[done:], good, tells, its))
        child.start()
        its.close()
        try:
            while mine.poll(30):
                if (number := mine.recv()) is None:
                    break
                done = number + 1
                if not mine.poll(30):
                    found["HANG"] += 1
                    break
                found[mine.recv()] += 1
        except EOFError:
            found["CRASH"] += 1
        child.kill()
        child.join()
    return found


def main(count):
    torch.set_num_threads(1)
    total, begun = Counter(), time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        for name, (read, tells) in seeds(Path(scratch)).items():
            path, draw = Path(scratch) / name, random.Random(name)
            content, (good, _) = path.read_bytes(), read(path)
            cases = [(number, damaged(content, draw, name.endswith(".gz"))) for number in range(count)]
            found = run_all(read, path, cases, good, tells)
            path.write_bytes(content)
            print(f"{name:22}", dict(found.most_common()), flush=True)
            total.update({what.split(" ")[0] if what.startswith("UNCLEAR") else what: n for what, n in found.items()})
    print(f"{sum(total.values())} files in {time.perf_counter() - begun:.0f} s:", dict(total.most_common()))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
