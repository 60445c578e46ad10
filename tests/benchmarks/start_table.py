"""Search the rigid start of cases from starts off the true pose, and of pairs that do not belong together; one JSON line each, resumed.

python tests/benchmarks/start_table.py out/starts.jsonl out/half/*/ data_samples/test/*/   # cases as write_halfreal and write_case leave them
python tests/benchmarks/start_table.py out/starts.jsonl   # the table of what is there
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.spatial.transform import Rotation

from spinereg.files.pairs import Pair, read_pair
from spinereg.registration.prealign import search_pair
from spinereg.space.geometry import transform_points
from spinereg.space.rigid import motion_matrix, procrustes

WITHIN_MM = 1.0  # of the best rigid motion: found


def read_case(folder: Path) -> Pair:
    "A case with its landmarks, and nothing known of the fixed vertebrae."
    mr = next(path for path in (folder / "mr.nii.gz", folder / "mr_t1.nii.gz") if path.exists())
    given = folder / "ct.nii.gz", folder / "ct_mask.nii.gz", None, folder / "landmarks.csv"
    return read_pair(mr, *given, fixed_modality="mr", moving_modality="ct")


@dataclass
class Truth:
    "Landmarks on bone, and the best rigid motion between them."

    fixed_mm: torch.Tensor
    moving_mm: torch.Tensor

    @classmethod
    def of(cls, pair: Pair) -> "Truth":
        bone = torch.tensor([name != "" for name in pair.landmarks.vertebra])
        return cls(pair.landmarks.fixed_mm[bone].double(), pair.landmarks.moving_mm[bone].double())

    @property
    def best(self) -> np.ndarray:
        one = torch.ones(len(self.fixed_mm)).double(), torch.zeros(len(self.fixed_mm)).long()
        return motion_matrix(procrustes(self.fixed_mm, self.moving_mm, *one, 1, 0.0))[0].numpy()

    def error_mm(self, rigid: np.ndarray) -> float:
        return (transform_points(rigid, self.fixed_mm) - self.moving_mm).norm(dim=1).mean().item()


def starts(truth: Truth, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    "The headers, one and two levels up and down, and two anywhere up to 20 degrees, 40 mm across and half a level along the spine."
    yield "header", np.eye(4)
    for name, up_mm in (("level up", 34), ("level down", -34), ("two up", 66), ("two down", -66)):
        shift = np.eye(4)
        shift[2, 3] = up_mm
        yield name, shift @ truth.best
    rng, centre = np.random.default_rng(seed), truth.fixed_mm.mean(0).numpy()
    for name in ("anywhere 1", "anywhere 2"):
        axis, way, off = rng.normal(size=3), rng.uniform(0, 2 * np.pi), np.eye(4)
        off[:3, :3] = Rotation.from_rotvec(np.deg2rad(20 * rng.random()) * axis / np.linalg.norm(axis)).as_matrix()
        across = 40 * rng.random()
        off[:3, 3] = centre - off[:3, :3] @ centre + [across * np.cos(way), across * np.sin(way), rng.uniform(-17, 17)]
        yield name, truth.best @ off


def unlike(other: Path, folder: Path) -> bool:
    "Whether two cases are of two persons."
    return other.name.split("_")[0] != folder.name.split("_")[0]


def strangers(pair: Pair, other: Pair) -> Iterator[tuple[str, Pair, np.ndarray]]:
    "A pair upside down; its CT with another patient's MR; and where to begin."
    yield "upside down", pair._replace(fixed=replace(pair.fixed, data=pair.fixed.data.flip(2))), np.eye(4)
    onto = np.eye(4)
    onto[:3, 3] = (Truth.of(pair).moving_mm.mean(0) - Truth.of(other).fixed_mm.mean(0)).numpy()
    yield "other patient", pair._replace(fixed=other.fixed), onto


def tried(folder: Path, stranger: Path) -> Iterator[tuple[str, Pair, np.ndarray]]:
    "Every start of a case, and what does not belong together."
    pair = read_case(folder)
    for name, start in starts(Truth.of(pair), sum(map(ord, folder.name))):
        yield name, pair, start
    yield from strangers(pair, read_case(stranger))


def run(out: Path, folders: list[Path]) -> None:
    "Search whatever is not in the file yet."
    done = set() if not out.exists() else {tuple(json.loads(line)["id"]) for line in out.read_text().splitlines()}
    for folder in folders:
        others = [other for other in folders if other != folder]
        stranger = next((other for other in others if unlike(other, folder)), others[0])
        truth = Truth.of(read_case(folder))
        for name, pair, start in tried(folder, stranger):
            for labels in (True, False):
                if (folder.name, name, labels) in done:
                    continue
                began = time.process_time()
                found, _ = search_pair(pair if labels else pair._replace(moving_labels=None), start, 0)
                row = {"id": (folder.name, name, labels), "start_mm": truth.error_mm(start), "found_mm": truth.error_mm(found.rigid)}
                row |= {"best_mm": truth.error_mm(truth.best), "confidence": found.confidence, "reasons": found.reasons}
                with out.open("a") as file:
                    file.write(json.dumps(row | {"cpu_s": time.process_time() - began}) + "\n")
        print(folder.name, flush=True)


def table(out: Path) -> pd.DataFrame:
    "How many were found, and how many were sure."
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    data = pd.DataFrame([{"start": row["id"][1], "labels": row["id"][2]} | row for row in rows])
    data["wrong"] = data.start.isin(["upside down", "other patient"])
    data["found"] = ~data.wrong & (data.found_mm < data.best_mm + WITHIN_MM)
    data["sure"] = data.confidence >= 1
    data["found, not sure"], data["not found, sure"] = data.found & ~data.sure, ~data.found & data.sure
    sums = data.groupby(["labels", "start"], sort=False)
    sums = sums.agg({"id": "size", "found": "sum", "found, not sure": "sum", "not found, sure": "sum", "cpu_s": "median"})
    return sums.rename(columns={"id": "searches"}).round(1).reset_index()


if __name__ == "__main__":
    run(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
    print(table(Path(sys.argv[1])).to_string(index=False))
