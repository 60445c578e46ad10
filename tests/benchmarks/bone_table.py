"""Look for every vertebra of cases with known truth, and judge what was found; and offer wrong results to the judge. One JSON line each, resumed.

python tests/benchmarks/bone_table.py out/bones.jsonl out/half/*/ data_samples/test/*/   # cases as write_halfreal and write_case leave them
python tests/benchmarks/bone_table.py out/bones.jsonl --wrong out/half/*/   # results that are wrong
python tests/benchmarks/bone_table.py out/bones.jsonl   # the tables of what is there
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from bench import keep_rows, markdown, read_rows
from scipy.spatial.transform import Rotation
from scipy.stats import spearmanr
from start_table import Truth, read_case, strangers, unlike

from spinereg.files.pairs import Pair
from spinereg.registration.bones_first import find_bones
from spinereg.registration.certainty import LEAST_RATIO, judge_bones
from spinereg.registration.poses import LEAST_SHARE
from spinereg.registration.prealign import RigidStart, rigid_start
from spinereg.registration.report import level_doubts, vertebra_doubts
from spinereg.registration.scene import make_scene
from spinereg.space.geometry import inside, transform_points
from spinereg.space.images import label_centres_mm

CPU = torch.device("cpu")


def true_poses(folder: Path) -> dict[str, np.ndarray]:
    "The motion of every vertebra, fixed -> moving."
    return {row["name"]: np.array(row["matrix"]) for row in json.loads((folder / "truth.json").read_text())["vertebrae"]}


def found_poses(pair: Pair, start: RigidStart) -> dict[str, np.ndarray]:
    "The motion of every vertebra that was looked for."
    bones = find_bones(pair, make_scene(pair, start.rigid, CPU))
    return {name: pose for name, pose in zip(bones.names, bones.poses.poses.numpy()) if name not in bones.riding}


def bone_error(pair: Pair, name: str, found: np.ndarray, true: np.ndarray) -> dict:
    "How far a motion is from the true one: in the middle over the bone, as a turn, as six numbers about the centre; what of it both images show."
    labels = pair.moving_labels
    number = labels.names.index(name) + 1
    y = transform_points(labels.grid.affine, (labels.data == number).nonzero()[::5].double())
    x = transform_points(np.linalg.inv(true), y)
    centre = np.append(label_centres_mm(labels.data, labels.grid, len(labels.names))[number - 1], 1.0)
    there, apart = np.linalg.inv(true) @ centre, np.linalg.inv(found) @ true
    turn_deg = np.rad2deg(Rotation.from_matrix(apart[:3, :3]).as_rotvec())
    return {
        "mm": (transform_points(found, x) - y).norm(dim=1).mean().item(),
        "deg": float(np.linalg.norm(turn_deg)),
        "six": [*turn_deg.tolist(), *(apart @ there - there)[:3].tolist()],
        "seen": inside(transform_points(np.linalg.inv(pair.fixed.grid.affine), x), pair.fixed.grid.shape, 0.0).double().mean().item(),
    }


def measure(folder: Path) -> dict:
    "Every vertebra of a case, looked for from the headers, and judged."
    pair, truth, began = read_case(folder), true_poses(folder), time.process_time()
    start = rigid_start(pair)
    motions = found_poses(pair, start)
    judged = judge_bones(pair, motions, CPU)
    row = {"case": folder.name, "cpu_s": time.process_time() - began, "confidence": start.confidence, "notices": len(start.notices)}
    row |= {"rigid_mm": Truth.of(pair).error_mm(start.rigid), "best_mm": Truth.of(pair).error_mm(Truth.of(pair).best)}
    row |= {"levels": judged.levels, "level doubts": len(level_doubts(judged.levels))}
    row["unseen"] = [name for name in pair.moving_labels.names if name in truth and name not in motions]
    bones = {}
    for name in (name for name in motions if name in truth):
        bones[name] = bone_error(pair, name, motions[name], truth[name]) | judged.table.loc[name].to_dict()
        bones[name] |= {"sigma": np.sqrt(np.diag(judged.covariance[name])).tolist(), "pose": motions[name].tolist()}
    return row | {"bones": bones}


def wrong_results(folder: Path, stranger: Path, seed: int) -> Iterator[tuple[str, Pair, dict[str, np.ndarray], set[str]]]:
    "A vertebra elsewhere; all of them one level off, looked for from there; the image upside down; another patient's; and which vertebrae are wrong."
    pair, truth = read_case(folder), true_poses(folder)
    seen = {name: bone_error(pair, name, truth[name], truth[name])["seen"] for name in pair.moving_labels.names if name in truth}
    rng, true = np.random.default_rng(seed), {name: truth[name] for name, share in seen.items() if share >= LEAST_SHARE}
    shown = [name for name in true if seen[name] > 0.9]
    way, shift, level = rng.normal(size=3), np.eye(4), np.eye(4)
    moved, shift[:3, 3] = shown[rng.integers(len(shown))], way / np.linalg.norm(way) * rng.uniform(5, 8)
    yield "one elsewhere", pair, true | {moved: true[moved] @ shift}, {moved}
    centres = dict(zip(pair.moving_labels.names, label_centres_mm(pair.moving_labels.data, pair.moving_labels.grid, len(pair.moving_labels.names))))
    upper, lower = (transform_points(np.linalg.inv(true[name]), torch.from_numpy(centres[name])[None])[0].numpy() for name in list(true)[:2])
    level[:3, 3] = rng.choice([-1, 1]) * (upper - lower)
    found = found_poses(pair, rigid_start(pair, Truth.of(pair).best @ level))
    yield "a level off", pair, found, {name for name in found if name in truth and bone_error(pair, name, found[name], truth[name])["mm"] > 2}
    for name, other, start in strangers(pair, read_case(stranger)):
        found = found_poses(other, rigid_start(other._replace(landmarks=None), start))
        yield name, other, found, set(found)


def offered(folder: Path, stranger: Path) -> dict:
    "What is thought of wrong results."
    said = {}
    for name, pair, motions, wrong in wrong_results(folder, stranger, sum(map(ord, folder.name))):
        judged = judge_bones(pair, motions, CPU)
        reasons = [*level_doubts(judged.levels), *vertebra_doubts(judged.table[judged.table.index.isin(wrong)])]
        said[name] = {"wrong": len(wrong), "doubted": len(reasons), "first": str(next(iter(reasons), "")), "levels": judged.levels}
    return {"case": folder.name, "wrong": said}


def sums(rows: list[dict]) -> str:
    "How far off, how many are flagged, and how well the errors are foretold."
    bones = pd.DataFrame([{"case": row["case"], "vertebra": name} | bone for row in rows for name, bone in row["bones"].items()])
    bones["flagged"], whole = bones.doubt != "", bones.seen >= 0.95
    lines = []
    for case, part in bones.groupby("case", sort=False):
        own, cut = part[part.seen >= 0.95], part[(part.seen >= 0.5) & (part.seen < 0.95)]
        row = next(row for row in rows if row["case"] == case)
        line = {"case": case, "start": row["rigid_mm"], "sure": row["confidence"], "mm": own.mm.mean(), "most": own.mm.max(), "deg": own.deg.mean()}
        line |= {"cut mm": cut.mm.max(), "cut deg": cut.deg.max(), "flagged": ", ".join(part.vertebra[part.flagged])}
        lines.append(
            line
            | {
                "missed": ", ".join(part.vertebra[~part.flagged & (part.mm > 2)]),
                "as alike a level": ", ".join(way for way, ratio in row["levels"].items() if ratio < LEAST_RATIO),
            }
        )
    kept = bones[~bones.flagged]
    ratio, sigma, error = np.abs(np.stack(kept.six) / np.stack(kept.sigma)), np.stack(kept.sigma), np.abs(np.stack(kept.six))
    calibration = []
    for name, part in (("turn", slice(0, 3)), ("shift", slice(3, 6))):
        of = {"of": name, "n": len(kept), "within 1": (ratio[:, part] < 1).mean(), "within 2": (ratio[:, part] < 2).mean()}
        each, whole_of = ((x[:, part].ravel(), np.linalg.norm(x[:, part], axis=1)) for x in (error, sigma))
        ranks = zip(("rank, components", "rank, vertebrae"), each, whole_of)
        calibration.append(of | {label: spearmanr(one, other).statistic for label, one, other in ranks})
    good = [case for case, part in bones.groupby("case") if (part.mm <= 1).all() and (part.deg <= 2).all()]
    told = {row["case"] for row in rows if row["notices"] or row["level doubts"] or any(bone["doubt"] for bone in row["bones"].values())}
    facts = {"vertebrae": len(bones), "whole": int(whole.sum()), "mm": bones.mm[whole].mean(), "95 %": bones.mm[whole].quantile(0.95)}
    facts |= {"deg": bones.deg[whole].mean(), "flagged": int(bones.flagged.sum()), "> 2 mm, not flagged": int((kept.mm > 2).sum())}
    facts |= {"cases all within 1 mm and 2 deg": len(good), "with a false alarm": len(told & set(good))}
    return "\n\n".join(markdown(table) for table in (lines, [facts], calibration))


def wrong_sums(rows: list[dict]) -> str:
    "How many wrong results are doubted: for a reason that is true of all of them, or of a vertebra that is wrong."
    given = [(kind, said) for row in rows for kind, said in row["wrong"].items() if said["wrong"]]
    every = pd.DataFrame([(kind, said["doubted"] > 0) for kind, said in given], columns=["kind", "doubted"])
    return markdown(every.groupby("kind").doubted.agg(["size", "sum"]).reset_index().to_dict("records"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file of JSON lines, one per case; what is in it is not done again")
    parser.add_argument("cases", nargs="*", type=Path, help="folders of cases")
    parser.add_argument("--wrong", action="store_true", help="offer wrong results of the cases to the judge")
    given = parser.parse_intermixed_args()
    rows = read_rows(given.out)
    for folder in given.cases:
        if folder.name in {row["case"] for row in rows if ("wrong" in row) == given.wrong}:
            continue
        rows.append(offered(folder, next(other for other in given.cases if unlike(other, folder))) if given.wrong else measure(folder))
        keep_rows(given.out, rows)
        print(folder.name, flush=True)
    for kind, told in ((False, sums), (True, wrong_sums)):
        if part := [row for row in rows if ("wrong" in row) == kind]:
            print(told(part), end="\n\n")


if __name__ == "__main__":
    main()
