"""What only a GPU can show: registering at three sizes, a training step, the slowest kernels, the cost of the monitor, the CPU beside it.

python tests/benchmarks/gpu.py                                      # eight minutes at most; the table is out/gpu/table.md
python tests/benchmarks/gpu.py out/rehearsal --device cpu --small   # the same on small images, to see that it runs

Images are drawn on the way: a column of vertebrae in soft noise, and the same bent by some millimetres in another contrast. Whatever has been
measured is written at once. A second call measures what is missing: what failed, and what was not begun because too little time was left.
"""

import argparse
import contextlib
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from bench import markdown
from torch.profiler import ProfilerActivity, profile

import spinereg
from spinereg.files.labels import SCHEMES, VERTEBRAE
from spinereg.files.problems import write_atomic
from spinereg.learning.fit import Settings
from spinereg.learning.learner import Stage, learn, make_accelerator, make_learner
from spinereg.losses.similarity import similarity_of
from spinereg.registration.networks import UNet, save_weights
from spinereg.registration.register import RegisterSettings, find_velocity, prepare
from spinereg.registration.run import choose_device, environment
from spinereg.space.fields import warp
from spinereg.space.geometry import Grid
from spinereg.space.images import blur

LEVEL = 32  # voxels from one vertebra to the next
METHODS = {name: {"method": name} for name in ("polyrigid", "optimise", "network")}
METHODS["optimise, then rigidify"] = METHODS["optimise"] | {"rigidify": True}


@dataclass(frozen=True)
class Bench:
    "Where to measure, and how large."

    folder: Path  # for the images and the results
    device: torch.device
    small: bool  # a rehearsal

    @property
    def shapes(self) -> list[tuple[int, int, int]]:  # right, anterior, superior
        return [(32, 32, 64)] if self.small else [(64, 128, 64), (160, 224, 96), (200, 200, 350)]

    @property
    def settings(self) -> dict:  # of `register`
        return {"device": str(self.device)} | ({"spacing_mm": 2.5, "levels": (1,), "steps": (2,), "prealign": "header"} if self.small else {})

    @property
    def step_shape(self) -> tuple[int, int, int]:  # of a training crop
        return (16, 16, 16) if self.small else (64, 128, 64)


# images


def column(shape: tuple[int, int, int], device: torch.device) -> torch.Tensor:  # (i, j, k) int32, numbers of VerSe
    "Vertebrae above one another, each with thin processes towards all sides, so that the working grid is the whole image."
    count, places = max(shape[2] // LEVEL, 1), (torch.arange(n, device=device) - (n - 1) / 2 for n in shape)
    x, y, z = torch.meshgrid(*places, indexing="ij")
    labels, thick = torch.zeros(shape, dtype=torch.int32, device=device), min(shape[:2]) / 5
    lowest = {name: value for value, name in SCHEMES["verse"].items()}["L5"]
    for level in range(count):
        up = z - (level - (count - 1) / 2) * LEVEL
        body = (x / thick) ** 2 + (y / thick) ** 2 + (up / 11) ** 2 < 1
        across = (y**2 + up**2 < 9) & (x.abs() < shape[0] / 2 - 8)
        along = (x**2 + up**2 < 9) & (y.abs() < shape[1] / 2 - 8)
        labels[body | across | along] = lowest - level
    return labels


def draw_pair(shape: tuple[int, int, int], device: torch.device, seed: int = 0) -> dict[str, torch.Tensor]:
    "A CT with its labels, and an MR of the same person bent by up to 2 mm."
    grid, maker = Grid(shape, np.eye(4)), torch.Generator().manual_seed(seed)
    labels = column(shape, device)
    noise = blur(torch.randn(1, 1, *shape, generator=maker).to(device), (2.0, 2.0, 2.0))
    tissue, bone = noise / noise.std(), (labels > 0).float()[None, None]
    wave = blur(torch.randn(1, 3, *(-(-n // 16) + 1 for n in shape), generator=maker), (1.0, 1.0, 1.0))
    wide = torch.nn.functional.interpolate(wave.to(device), shape, mode="trilinear", align_corners=True)
    mr = warp(300 + 60 * tissue.roll(3, 2) - 200 * bone + 60 * tissue * bone, grid, grid, 2 * wide / wide.abs().max())
    return {"ct": (40 + 40 * tissue + 400 * bone)[0, 0], "ct_mask": labels, "mr": mr[0, 0].clamp_min(0)}


def write_pair(folder: Path, shape: tuple[int, int, int], device: torch.device) -> None:
    "Draw a pair into a folder, unless it is there."
    if not (folder / "mr.nii").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in draw_pair(shape, device).items():
            image = nib.Nifti1Image(values.round().cpu().numpy().astype(np.int16), np.eye(4))
            write_atomic(folder / f"{name}.nii", partial(nib.save, image))


def pair_files(bench: Bench, shape: tuple[int, int, int]) -> dict[str, object]:
    "The arguments of `register` for a pair of this size."
    folder, files = bench.folder / "x".join(map(str, shape)), {"moving": "ct", "moving_labels": "ct_mask", "fixed": "mr"}
    write_pair(folder, shape, bench.device)
    return {name: folder / f"{file}.nii" for name, file in files.items()} | {"moving_modality": "ct", "fixed_modality": "mr"}


# what is measured


def registered(bench: Bench, shape: tuple[int, int, int], method: str, **more) -> spinereg.registration.results.Registration:
    "One registration, whose prints are kept back."
    given = pair_files(bench, shape) | bench.settings | METHODS[method] | more
    if given.get("method") == "network":
        given["weights"] = save_weights(bench.folder / "fresh.safetensors", UNet(), given.get("spacing_mm", 1.0), {})
    with contextlib.redirect_stdout(io.StringIO()):
        return spinereg.register(**given)


def measure_registration(bench: Bench, shape: tuple[int, int, int], method: str) -> dict:
    "Seconds by stage, and peak memory."
    metrics = (result := registered(bench, shape, method)).metrics
    seconds, place = metrics.seconds, metrics.environment
    return {
        "image": " x ".join(map(str, shape)),
        "working grid": " x ".join(map(str, result.view.grid.shape)),
        "method": method,
        "seconds": round(sum(seconds.values()), 1),
        "pre-alignment": seconds["prealign"],
        "field": round(seconds["optimise"] + seconds.get("rigidify", 0.0), 2),
        "measuring": seconds["measure"],
        "peak memory, GB": place.peak_gpu_memory_gb or place.peak_memory_gb,
    }


def training(bench: Bench, precision: str) -> Callable[[], dict]:  # takes a step; its row
    "A network that is about to take a step with every term of the loss."
    device, shape = "cpu" if bench.device.type == "cpu" else "auto", bench.step_shape
    accelerator = make_accelerator(device, precision)
    torch.manual_seed(0)
    learner = make_learner(accelerator, UNet(), similarity_of("mind"), 1.0, Settings(bench.folder, bench.folder).weights)
    learner.stage = Stage("rigidity", 1, rigidity=True)
    images = {name: values[None, None] for name, values in draw_pair(shape, bench.device).items()}
    scaled = {name: (images[name] - images[name].min()) / (images[name].max() - images[name].min()) for name in ("ct", "mr")}
    number = torch.tensor([VERTEBRAE.index(SCHEMES["verse"][n]) + 1 if n in SCHEMES["verse"] else 0 for n in range(26)], device=bench.device)
    labels = number[images["ct_mask"].long()].to(torch.uint8)
    crops = {"fixed": scaled["mr"], "moving": scaled["ct"], "labels": labels, "mask": torch.ones_like(labels), "case": ["drawn"]}
    return lambda: learn(learner, [crops])


def measure_step(bench: Bench, precision: str) -> dict:
    "Milliseconds of one training step, and what memory it takes."
    step, taken = training(bench, precision), []
    for _ in range(2 if bench.small else 30):
        began = time.perf_counter()
        row = step()
        taken.append(1000 * (time.perf_counter() - began))
        if bench.device.type == "cuda" and len(taken) == 1:
            torch.cuda.reset_peak_memory_stats(bench.device)
    place = environment(bench.device)
    memory = place.peak_gpu_memory_gb or place.peak_memory_gb
    size = " x ".join(map(str, bench.step_shape))
    figures = {"ms, median": round(float(np.median(taken[1:])), 1), "ms, 90 %": round(float(np.quantile(taken[1:], 0.9)), 1)}
    return {"crop": size, "precision": precision, **figures, "peak memory, GB": memory, "loss": round(row["loss"], 4)}


def kernel_name(key: str) -> str:
    "What a kernel does, out of a name that PyTorch's templates make hundreds of letters long."
    said = re.findall(r"\w*[Ff]unctor\w*|\w+_kernel_cuda|\w+Ops?\b", key)
    return re.sub(r"^void |[<(].*", "", key) + (f" ({said[-1]})" if said else "")


def slowest(run: Callable[[], object], device: torch.device, count: int = 3) -> dict:
    "The kernels that took the most time, by name and share; operations where there is no GPU."
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as found:
        run()
    time_of = (lambda event: event.self_device_time_total) if cuda else (lambda event: event.self_cpu_time_total)
    events = [event for event in found.key_averages() if not cuda or event.device_type == torch.autograd.DeviceType.CUDA]
    whole, longest = sum(map(time_of, events)), sorted(events, key=time_of, reverse=True)[:count]
    names = [kernel_name(event.key) for event in longest]
    shares = [f"{100 * time_of(event) / whole:.0f} % in {event.count} calls" for event in longest]
    told = {f"{n}.": f"`{name}` {share}" for n, (name, share) in enumerate(zip(names, shares), 1)}
    return told | {"all, ms": round(whole / 1000, 1)}


def measure_kernels(bench: Bench, of: str) -> dict:
    "The slowest kernels of some training steps, or of some steps of the optimiser."
    count = 1 if bench.small else 3
    if of == "training":
        step = training(bench, "no")
        step()
        return {"of": f"{count} training steps, float32"} | slowest(lambda: [step() for _ in range(count)], bench.device)
    shape = bench.shapes[min(1, len(bench.shapes) - 1)]
    few = METHODS["optimise"] | {"levels": (1,), "steps": (count,), "prealign": "header"}
    settings = RegisterSettings(**pair_files(bench, shape) | bench.settings | few)
    with contextlib.redirect_stdout(io.StringIO()):
        prepared = prepare(settings)
        find_velocity(settings, prepared)
        return {"of": f"{count} steps of the optimiser, {prepared.grid.shape}"} | slowest(lambda: find_velocity(settings, prepared), bench.device)


def measure_monitor(bench: Bench) -> dict:
    "How much longer a training takes with a monitor at its default rate, the first step left out."
    from interactive import train

    from spinereg.interactive.monitor import TrainingMonitor

    steps, monitor = 3 if bench.small else 300, TrainingMonitor()
    for split in ("train", "val"):
        write_pair(bench.folder / "data" / split / "drawn", bench.shapes[0], bench.device)
    given = {"data_dir": bench.folder / "data", "device": "cpu" if bench.device.type == "cpu" else "auto"}
    given |= {"crop": bench.step_shape, "spacing_mm": 2.0 if bench.small else 1.0}
    with contextlib.redirect_stdout(io.StringIO()):
        alone, watched = (train(bench.folder, watch, steps, **given) for watch in (None, monitor))
    drawn = 100 * (monitor.draws.spent + monitor.looks.spent) / watched
    seconds = {"s without": round(alone, 2), "s with it": round(watched, 2), "longer, %": round(100 * (watched / alone - 1), 1)}
    return {"steps": steps, **seconds, "longer by its own clock, %": round(drawn, 1)}


def measure_difference(bench: Bench, other: str) -> dict:
    "How far the field of another run lies from that of this device."
    shape, device = bench.shapes[0], "cpu" if other == "the CPU" else str(bench.device)
    here, there = registered(bench, shape, "optimise"), registered(bench, shape, "optimise", device=device)
    apart = (there.transform.disp_on(here.view.grid).cpu() - here.transform.disp_on(here.view.grid).cpu())[0].norm(dim=0)
    parts = {"bone": apart[here.view.labels.cpu() > 0], "everywhere": apart}
    figures = {f"{part}, {what}, mm": f"{values:.2g}" for part, at in parts.items() for what, values in (("mean", at.mean()), ("max", at.max()))}
    return {"image": " x ".join(map(str, shape)), "against": other, **figures}


class Item(NamedTuple):
    "One line of a table."

    section: str
    name: str
    needs_s: float  # about what it takes; it is not begun with less
    measure: Callable[[], dict]


def items(bench: Bench) -> Iterator[Item]:
    "All that is measured, the longest last."
    sizes = [[Item("Registration", f"{shape}, {method}", needs_s, partial(measure_registration, bench, shape, method)) for method in METHODS]
             for shape, needs_s in zip(bench.shapes, (10, 30, 90))]  # fmt: skip
    yield from sizes[0]
    yield from (Item("Training step", precision, 10, partial(measure_step, bench, precision)) for precision in ("no", "bf16"))
    yield from (Item("Slowest kernels", of, 15, partial(measure_kernels, bench, of)) for of in ("training", "registration"))
    yield from (Item("Fields of two runs", other, 45, partial(measure_difference, bench, other)) for other in ("the CPU", "this device once more"))
    yield Item("Monitor of a training", "default rate", 60, partial(measure_monitor, bench))
    for rest in sizes[1:]:
        yield from rest


# the table


def table_text(rows: dict[str, dict], head: str) -> str:
    "All results as Markdown: a table for each section, and what was left out."
    parts, left_out = [f"# {head}"], [f"- {name}: {row['left out']}" for name, row in rows.items() if "left out" in row]
    for section in dict.fromkeys(row["section"] for row in rows.values()):
        lines = [{key: value for key, value in row.items() if key != "section"} for row in rows.values() if row["section"] == section]
        if done := [line for line in lines if "left out" not in line]:
            parts.append(f"## {section}\n\n{markdown(done)}")
    return "\n\n".join([*parts, *(["## Left out\n\n" + "\n".join(left_out)] if left_out else [])]) + "\n"


def write(bench: Bench, rows: dict[str, dict], head: str) -> None:
    "Keep what has been measured."
    for name, text in (("rows.json", json.dumps({"of": head, "rows": rows}, indent=1)), ("table.md", table_text(rows, head))):
        write_atomic(bench.folder / name, lambda path, text=text: path.write_text(text, "utf-8"))


def read(bench: Bench, head: str) -> dict[str, dict]:
    "What has been measured with the same device and versions."
    file = bench.folder / "rows.json"
    held = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return {name: row for name, row in held["rows"].items() if "left out" not in row} if held.get("of") == head else {}


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("out/gpu"), help="folder for images, rows.json and table.md")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small images and few steps: a rehearsal")
    parser.add_argument("--minutes", type=float, default=8.0, help="nothing is begun that would end later")
    given = parser.parse_args(arguments)
    end, bench = time.monotonic() + 60 * given.minutes, Bench(given.out, choose_device(given.device), given.small)
    head = f"{environment(bench.device).device}, torch {torch.__version__}, spinereg {spinereg.__version__}" + (", small" if given.small else "")
    rows = read(bench, head)
    if not given.small:
        with contextlib.suppress(Exception):  # it will fail again, where its reason is written down
            registered(bench, bench.shapes[0], "optimise", steps=(1, 1, 1), prealign="header")
    for item in items(bench):
        name, left_s = f"{item.section}: {item.name}", end - time.monotonic()
        if name in rows:
            continue
        row = {"left out": f"takes about {item.needs_s} s, and {left_s:.0f} s were left"}
        if left_s >= item.needs_s:
            try:
                row = item.measure()
            except Exception as error:  # one item that fails must not cost the others
                row = {"left out": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
        rows[name] = {"section": item.section} | row
        write(bench, rows, head)
        print(f"{end - time.monotonic():4.0f} s left: {name}: {', '.join(f'{key} {value}' for key, value in row.items())}", flush=True)
    print(table_text(rows, head))


if __name__ == "__main__":
    main()
