"What several benchmarks share: cases, what a map does to one of them, rows that are kept as they come, and their table."

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from spinereg.files.pairs import Pair
from spinereg.files.problems import write_atomic
from spinereg.files.transforms import SpineTransform
from spinereg.phantom.appearance import Appearance
from spinereg.phantom.cases import make_case, write_case
from spinereg.registration.results import measure_all
from spinereg.registration.scene import Scene
from spinereg.space.geometry import Grid


def phantom_case(folder: Path, difficulty: str, seed: int, appearance: Appearance | None = None) -> Path:
    "The folder of a phantom, which is drawn unless it is there."
    if not (folder / "truth.json").exists():
        write_case(folder, make_case(difficulty, seed, appearance))
    return folder


def rotation_errors_deg(motions: Mapping[str, np.ndarray], truth: Mapping) -> list[float]:
    "How far the rotation of every vertebra is from that of truth.json."
    true = {row["name"]: np.array(row["matrix"]) for row in truth["vertebrae"]}
    turns = [found[:3, :3] @ true[name][:3, :3].T for name, found in motions.items() if name in true]
    return [float(np.rad2deg(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1)))) for turn in turns]


def measure_map(pair: Pair, transform: SpineTransform, scene: Scene, grid: Grid, truth: Mapping | None = None) -> dict:
    "What a map does to a pair; with truth.json of the pair, how far its rotations are off."
    figures = measure_all(pair, transform, scene, grid).figures
    bone, soft = (next((gain.now for gain in figures.landmarks if gain.now.group == name), None) for name in ("bone", "soft tissue"))
    turns = rotation_errors_deg(figures.motions, truth) if truth else []
    return {
        "bone_tre_mm": bone.mean_mm,
        "bone_p95_mm": bone.p95_mm,
        **({"rotation_deg": float(np.mean(turns)), "rotation_max_deg": max(turns)} if turns else {}),
        "soft_tre_mm": soft.mean_mm if soft else None,
        "residual_mm": figures.rigidity.residual_max_max_mm,
        "volume_percent": figures.vertebrae.volume_change_percent.abs().max(),
        "dice": figures.labels.now.dice if figures.labels else None,
        "folds": figures.field.regularity.n_folded,
        "ndv": figures.field.ndv.n_failing,
        "inverse_p99_mm": figures.field.inverse_after_forward.p99_mm,
        "released_percent": figures.vertebrae.released_percent.max() if transform.bones else None,
    }


def read_rows(path: Path) -> list[dict]:
    "The rows that an earlier call has kept."
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def keep_rows(path: Path, rows: Sequence[Mapping]) -> None:
    "Write all rows, a JSON line each, so that the file is there whole or as it was."
    write_atomic(path, lambda aside: aside.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8"))


def number_text(value: float) -> str:
    "Three digits, without an exponent for what is large."
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(rows: Sequence[Mapping]) -> str:
    "A table; numbers with three digits."
    table = pd.DataFrame(rows)
    text = table.map(lambda value: "" if pd.isna(value) else number_text(value) if isinstance(value, float) else str(value))
    return "\n".join(f"| {' | '.join(line)} |" for line in (list(map(str, table)), ["---"] * len(table.columns), *text.to_numpy().tolist()))
