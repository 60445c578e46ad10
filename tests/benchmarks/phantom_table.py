"""Register phantom cases end to end, one JSON line each, and print a table.

python tests/benchmarks/phantom_table.py out/lncc.jsonl easy clinical hard --seeds 100 101 102 103 104
python tests/benchmarks/phantom_table.py out/mi.jsonl clinical --seeds 100 --set method=polyrigid
"""

import argparse
import json
from pathlib import Path

import pandas as pd
from bench import keep_rows, phantom_case

import spinereg


def measure(case: Path, settings: dict) -> dict:
    "One case, registered with the labels of its CT only."
    result = spinereg.register(case / "mr_t1.nii.gz", case / "ct.nii.gz", case / "ct_mask.nii.gz", landmarks=case / "landmarks.csv", **settings)
    metrics, field = result.metrics, result.metrics.field
    bone, soft = (next(gain for gain in metrics.landmarks if gain.now.group == name) for name in ("bone", "soft tissue"))
    return {
        "start_mm": bone.start_mean_mm,
        "prealigned_mm": bone.prealigned_mean_mm,
        "best_rigid_mm": json.loads((case / "truth.json").read_text())["rigid_mm"],
        "tre_mm": bone.now.mean_mm,
        "p95_mm": bone.now.p95_mm,
        "max_mm": bone.now.max_mm,
        "soft_mm": soft.now.mean_mm,
        "volume_mean_percent": metrics.rigidity.volume_change_mean_percent,
        "volume_max_percent": metrics.rigidity.volume_change_max_percent,
        "folded": field.n_folds,
        "inverse_mean_mm": field.inverse_after_forward.mean_mm,
        "inverse_p99_mm": field.inverse_after_forward.p99_mm,
        "seconds": sum(metrics.seconds.values()),
        "memory_gb": metrics.environment.peak_memory_gb,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file of JSON lines, one per case; made anew")
    parser.add_argument("difficulties", nargs="+", choices=["easy", "clinical", "hard"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="arguments of spinereg.register")
    given = parser.parse_args()
    settings = {"method": "optimise"}
    for name, value in (text.split("=", 1) for text in given.set):
        settings[name] = json.loads(value) if value[0] in "-.[0123456789" else value
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for difficulty in given.difficulties:
        for seed in given.seeds:
            case = phantom_case(given.out.parent / f"{difficulty}_{seed}", difficulty, seed)
            rows.append({"case": case.name, **measure(case, settings)})
            keep_rows(given.out, rows)
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
