"""Register half-real cases and phantoms with drawn appearances with several similarities, one JSON line each.

python tests/benchmarks/truth_table.py out/truth.jsonl out/half/*/      # folders of cases, as write_halfreal and write_case leave them
python tests/benchmarks/truth_table.py out/truth.jsonl --phantoms 20      # drawn on the way, T1, T2, TIRM and drawn contrasts in turn
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from bench import keep_rows, phantom_case

from spinereg.phantom.appearance import draw_appearance
from spinereg.registration.optimise import make_transform
from spinereg.registration.register import RegisterSettings, find_velocity, prepare
from spinereg.space.geometry import transform_points

WAYS = "lncc", "mi", "mind", "lncc+mi"


def measure(case: Path, device: str) -> Iterator[dict]:
    "One case, pre-aligned once and registered with every similarity."
    files = {"fixed": case / "mr.nii.gz", "moving": case / "ct.nii.gz", "moving_labels": case / "ct_mask.nii.gz", "landmarks": case / "landmarks.csv"}
    settings = {**files, "method": "optimise", "moving_modality": "ct", "fixed_modality": "mr", "device": device}
    look, prepared = json.loads((case / "truth.json").read_text())["appearance"], prepare(RegisterSettings(**settings))
    marks = prepared.pair.landmarks
    bone = torch.tensor([name != "" for name in marks.vertebra])
    for name in WAYS:
        found = find_velocity(RegisterSettings(**settings, similarity=name), prepared)
        transform = make_transform(found.velocity, found.grid, prepared.start.rigid)
        now = (transform.points(marks.fixed_mm.to(found.velocity.device)).cpu() - marks.moving_mm).norm(dim=1)
        start = (transform_points(prepared.start.rigid, marks.fixed_mm) - marks.moving_mm).norm(dim=1)
        yield {
            "case": case.name,
            "similarity": name,
            "contrast": look["contrast"],
            "gain": look["gain"],
            "chemical_shift_mm": look["chemical_shift_mm"],
            "prealigned_mm": float(start[bone].mean()),
            "bone_mm": float(now[bone].mean()),
            "bone_p95_mm": float(now[bone].quantile(0.95)),
            "soft_mm": float(now[~bone].mean()),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file of JSON lines, one per case and similarity; made anew")
    parser.add_argument("cases", type=Path, nargs="*")
    parser.add_argument("--phantoms", type=int, default=0, help="how many to draw")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    cases, rows = list(given.cases), []
    for number in range(given.phantoms):
        look = draw_appearance(200 + number, contrast=("T1", "T2", "TIRM", "drawn")[number % 4])
        cases.append(phantom_case(given.out.parent / f"phantom_{number}", "clinical", 200 + number, look))
    for case in cases:
        for row in measure(case, given.device):
            rows.append(row)
            keep_rows(given.out, rows)
    table = pd.DataFrame(rows)
    print(table.pivot_table(index=["case", "contrast"], columns="similarity", values="bone_mm").round(2).to_string())


if __name__ == "__main__":
    main()
