"Folders as a batch leaves them, made of one result."

import json
import shutil

from test_data import draw

from spinereg.files.manifest import write_result
from spinereg.registration.register import register


def registered(folder):
    "A drawn case of two vertebrae by its pre-alignment alone, with landmarks that are a millimetre apart."
    case = draw(folder / "case", spine={"L1": 0, "L5": -26})
    points = [(name, x, z) for name in ("L1", "L5", "") for x in (-20, 0, 20) for z in (-10, 10)]
    rows = [f"{k},{name},{x},0,{z},{x + 1},0,{z}" for k, (name, x, z) in enumerate(points)]
    head = "name,vertebra,fixed_x_mm,fixed_y_mm,fixed_z_mm,moving_x_mm,moving_y_mm,moving_z_mm"
    (case / "landmarks.csv").write_text("\n".join([head, *rows]))
    files = {"fixed_labels": case / "mr_mask.nii.gz", "landmarks": case / "landmarks.csv", "out_dir": folder / "result"}
    register(case / "mr_t1.nii.gz", case / "ct.nii.gz", case / "ct_mask.nii.gz", **files, method="rigid", spacing_mm=4.0, prealign="header")
    return folder / "result"


def plan(out, jobs):
    "Write the plan of a batch: jobs are pairs of setting and case."
    out.mkdir(parents=True, exist_ok=True)
    said = {"format": "spinereg-batch-1", "app": "register", "jobs": [list(job) for job in jobs]}
    (out / "batch.json").write_text(json.dumps(said))


def record(folder, **changes):
    "Write how a job went."
    said = {"format": "spinereg-job-1", "case": folder.name, "setting": "", "app": "register", "status": "done", "stage": "", "error": "", "hint": ""}
    said |= {"parameters": {"spacing_mm": 4.0, "fixed": f"/data/{folder.name}/mr.nii.gz"}, "seconds": 35.2, "attempts": 1, "host": "here"}
    said |= {"inputs": {"mr.nii.gz": {"size": 5, "mtime_ns": 1, "sha256": "ab" * 32}}, "code": {"spinereg": "0.1.1", "sources": "c" * 40}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(said | changes))


def copy_result(one, folder, change=None, files=("metrics.json", "vertebrae.csv", "planes.webp")):
    "Leave a result in a folder, its metrics changed by a function."
    with write_result(folder) as aside:
        for name in files:
            shutil.copy(one / name, aside / name)
        if change:
            metrics = json.loads((aside / "metrics.json").read_text("utf-8"))
            change(metrics)
            (aside / "metrics.json").write_text(json.dumps(metrics), "utf-8")


def finished(one, folder, change=None, **changes):
    "A job that is done."
    copy_result(one, folder, change)
    record(folder, **changes)
