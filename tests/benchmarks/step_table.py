"""Time one training step, as published (reference.py) and ours, term by term, and print a table.

One pair of 64 x 128 x 64 voxels of 1 mm with three vertebrae, one network of random weights for both sides, two threads. The two sides
take turns; each figure is the median of the repeats. Where "both" stands, it is a term's own forward and backward pass from its inputs. Peak
memory is that of one whole step in a process of its own, less what the process held before. On a busy machine, --cpu with one thread counts
the processor's seconds instead.

python tests/benchmarks/step_table.py out/step
python tests/benchmarks/step_table.py out/step --threads 1 --cpu
"""

import argparse
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import reference
import torch
import torch.nn.functional as F
from torch import Tensor

from spinereg.learning.cases import Case, PrepareCase
from spinereg.losses import bone as bones
from spinereg.losses import penalties
from spinereg.losses.objective import apply_velocity, batch_on_grid, moved_labels
from spinereg.losses.similarity import MIND
from spinereg.phantom.cases import make_case, write_case
from spinereg.registration.networks import UNet, predict
from spinereg.registration.run import peak_memory_bytes
from spinereg.space.geometry import Grid

SIZE, VERTEBRAE = (64, 128, 64), 3
MARKS = {"whole step": 5.0, "similarity, diffusion (both)": 1.8, "OC, PC (both)": 8.0, "rigid Dice, rigid field (both)": 60.0, "MIND (both)": 2.5}
MARKS |= {"peak memory, GB": 1 / 0.7}  # how much less ours must take, at least


class Inputs(NamedTuple):
    "One crop, and a network's weights."

    fixed: Tensor  # (1, 1, i, j, k), 0 to 1
    moving: Tensor
    fixed_labels: Tensor  # (1, i, j, k), 0 to 3
    labels: Tensor
    weights: dict[str, Tensor]


def make_inputs(path: Path, seed: int) -> None:
    "Cut a box around three vertebrae out of a phantom, and scale random weights until displacements reach some millimetres."
    case = path.parent / f"easy_{seed}"
    if not (case / "truth.json").exists():
        write_case(case, make_case("easy", seed))
    files = [str(case / name) for name in ("mr_t1.nii.gz", "ct.nii.gz", "ct_mask.nii.gz", "mr_mask.nii.gz")]
    item = PrepareCase(prealign="labels")(Case("train", case.name, *files, None))
    names = item["labels"].unique()[1:]
    middle = names[len(names) // 2]
    place = (item["labels"][0] == middle).nonzero()
    start = ((place.amin(0) + place.amax(0) + 1) // 2 - torch.tensor(SIZE) // 2).tolist()
    pads = [pad for first, size, n in reversed(list(zip(start, SIZE, item["labels"].shape[1:]))) for pad in (-first, first + size - n)]
    images = [F.pad(item[key], pads)[None] for key in ("fixed", "moving")]
    labels = [F.pad(item[key], pads).long() - int(middle) + 2 for key in ("fixed_labels", "labels")]
    labels = [torch.where((label >= 1) & (label <= VERTEBRAE), label, 0) for label in labels]
    assert all((torch.bincount(label.flatten()) > 500).sum() == VERTEBRAE + 1 for label in labels), "the box must hold three vertebrae"
    torch.manual_seed(seed)
    network = UNet()
    with torch.no_grad():
        velocity = network(*images)
        network.velocity.weight *= 2 / velocity.abs().quantile(0.99)
    torch.save(Inputs(*images, *labels, network.state_dict())._asdict(), path)


class Theirs:
    "The published step."

    def __init__(self, inputs: Inputs):
        self.fixed, self.moving = inputs.fixed, inputs.moving
        self.fixed_labels, self.labels = (
            torch.stack([label[0] == n for n in range(1, VERTEBRAE + 1)])[None].float() for label in (inputs.fixed_labels, inputs.labels)
        )
        self.network, self.head = reference.UNet(), reference.Head(SIZE)
        self.network.load_state_dict(inputs.weights)

    def apply(self, lap) -> tuple[Tensor, reference.Warped]:
        velocity = self.network(self.moving, self.fixed)
        lap("network")
        warped = self.head(velocity, self.fixed, self.moving, self.fixed_labels, self.labels)
        lap("integrate, upsample, warp")
        return velocity, warped

    def similarity(self, moved: Tensor, moved_back: Tensor) -> dict[str, Tensor]:
        return {"mind": reference.mind(self.fixed, moved) + reference.mind(self.moving, moved_back)}

    def smoothness(self, velocity: Tensor, warped) -> dict[str, Tensor]:
        return {"diffusion": reference.diffusion(velocity)}

    def conditions(self, disp: Tensor, warped: reference.Warped) -> dict[str, Tensor]:
        J, bone = reference.jacobian(disp), warped.labels[0] > 0.5
        return {"oc": reference.orthonormality(J, bone), "pc": reference.properness(J, bone)}

    def rigid(self, disp: Tensor, warped: reference.Warped, lap) -> dict[str, Tensor]:
        rf = reference.rigid_field(disp, warped.labels, self.head.warp_full.grid)
        lap("rigid field")
        rd = reference.rigid_dice(disp, self.labels, warped.labels, self.head.warp_full)
        lap("rigid Dice")
        return {"rf": rf, "rd": rd}


class Ours:
    "The same step by spinereg."

    def __init__(self, inputs: Inputs):
        self.fixed, self.moving, self.labels = inputs.fixed, inputs.moving, inputs.labels
        self.grid, self.network = Grid(SIZE, np.eye(4)), UNet()
        self.network.load_state_dict(inputs.weights)

    def apply(self, lap):
        velocity, onto = predict(self.network, self.fixed, self.moving, self.grid)
        lap("network")
        batch = batch_on_grid(self.fixed, self.moving, torch.ones_like(self.fixed), self.labels, ("",) * VERTEBRAE, self.grid)
        moved = apply_velocity(velocity, onto, batch)
        self.bone = bones.bone_voxels(moved_labels(moved.disp, batch)[0], VERTEBRAE)
        lap("integrate, upsample, warp")
        return velocity, moved

    def similarity(self, moved: Tensor, moved_back: Tensor) -> dict[str, Tensor]:
        return {"mind": MIND()(self.fixed, moved) + MIND()(self.moving, moved_back)}

    def smoothness(self, velocity: Tensor, moved) -> dict[str, Tensor]:
        return {"diffusion": 2 * penalties.diffusion(velocity, moved.velocity_grid)}

    def conditions(self, disp: Tensor, moved) -> dict[str, Tensor]:
        J = bones.bone_jacobian(disp, self.grid, self.bone)
        return {"oc": penalties.oc(J, self.bone), "pc": penalties.pc(J, self.bone)}

    def rigid(self, disp: Tensor, moved, lap) -> dict[str, Tensor]:
        motions = bones.rigid_motions(disp, self.grid, self.bone)
        rf = penalties.rf(disp, self.grid, self.bone, motions)
        lap("rigid field")
        rd = penalties.rd(disp, self.grid, self.bone, motions, self.labels, self.grid, squared=False)
        lap("rigid Dice")
        return {"rf": rf, "rd": rd}


def step(side: Theirs | Ours, lap=lambda name: None, bones: bool = True) -> dict[str, float]:
    "Forward and backward; the value of every term."
    side.network.zero_grad()
    velocity, moved = side.apply(lap)
    terms = side.similarity(moved.moved, moved.moved_back)
    lap("MIND")
    terms |= side.smoothness(velocity, moved)
    lap("diffusion")
    if bones:
        terms |= side.conditions(moved.disp, moved)
        lap("OC, PC")
        terms |= side.rigid(moved.disp, moved, lap)
    sum(reference.WEIGHTS[name] * value.sum() for name, value in terms.items()).backward()
    lap("backward")
    return {name: value.item() for name, value in terms.items()}


def parts(side: Theirs | Ours) -> dict:
    "What is timed forward and backward: functions without arguments."
    with torch.no_grad():
        moved = side.apply(lambda name: None)[1]
    disp, there, back = (x.clone().requires_grad_() for x in (moved.disp, moved.moved, moved.moved_back))
    moved = moved._replace(labels=moved.labels.clone().requires_grad_(moved.labels.is_floating_point()))

    def both(function, *given):
        return lambda: sum(value.sum() for value in function(*given).values()).backward()

    return {
        "similarity, diffusion (both)": lambda: step(side, bones=False),
        "MIND (both)": both(side.similarity, there, back),
        "OC, PC (both)": both(side.conditions, disp, moved),
        "rigid Dice, rigid field (both)": both(side.rigid, disp, moved, lambda name: None),
    }


def clock(side: Theirs | Ours, functions: dict, now) -> tuple[dict[str, float], dict[str, float]]:
    "Seconds of every stage of one step, of the whole of it, and of every part; and the values of the terms."
    seconds, last = {}, now()

    def lap(name):
        nonlocal last
        seconds[name], last = now() - last, now()

    values = step(side, lap)
    seconds["whole step"] = sum(seconds.values())
    for name, function in functions.items():
        last = now()
        function()
        lap(name)
    return seconds, values


def peak_gb(kind: type, path: Path, threads: int) -> float:
    "Memory that one whole step adds to a process."
    torch.set_num_threads(threads)
    side = kind(Inputs(**torch.load(path, weights_only=True)))
    before = peak_memory_bytes()
    step(side)
    return (peak_memory_bytes() - before) / 1e9


def alone(function, *given):
    "Run a function in a process of its own."
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the inputs, made on the first call, and the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="count the processor's seconds instead of the clock's; meant for one thread")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"inputs_{given.seed}.pt"
    if not path.exists():
        alone(make_inputs, path, given.seed)
    kinds = {"reference": Theirs, "ours": Ours}
    memory = {name: alone(peak_gb, kind, path, given.threads) for name, kind in kinds.items()}
    torch.set_num_threads(given.threads)
    sides = {name: kind(Inputs(**torch.load(path, weights_only=True))) for name, kind in kinds.items()}
    work, taken, values = {name: parts(side) for name, side in sides.items()}, defaultdict(list), {}
    for _ in range(given.repeats):
        for name, side in sides.items():
            seconds, values[name] = clock(side, work[name], time.process_time if given.cpu else time.perf_counter)
            taken[name].append(seconds)
    table = pd.DataFrame({name: pd.DataFrame(rows).median() for name, rows in taken.items()})
    table["share %"] = (100 * table.reference / table.reference["whole step"])[:"whole step"]
    table.loc["peak memory, GB", ["reference", "ours"]] = memory
    table["ratio"] = table.reference / table.ours
    table["at least"] = pd.Series(MARKS)
    table.to_csv(given.out / "step.csv")
    print(table.to_string(float_format="{:.3g}".format, na_rep=""))
    print("\nvalues of the terms\n" + pd.DataFrame(values).T.to_string(float_format="{:.4g}".format))


if __name__ == "__main__":
    main()
