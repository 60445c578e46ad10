"""What a batch costs and survives: `python tests/benchmarks/batch.py FOLDER [part ...]`, on an idle machine with two processors.

Parts: night, overhead, workers, sweep, cluster, slurm, kills, plan, report; all of them when none is named. Each prints its row of a table.
The cases are the six of data_samples, each several times with another shift between its two images, and four that are broken.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
MAIN = [sys.executable, "-c", "import sys; from spinereg.apps.command import main; sys.exit(main())"]
QUICK = ("--method", "optimise", "--spacing_mm", "4", "--steps", "[5, 5, 2]", "--prealign", "header")
ONE = os.environ | {"OMP_NUM_THREADS": "1"}
KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}, "language_info": {"name": "python"}}


def shifted(source, target, number):
    "A copy of a case whose MR lies a few millimetres elsewhere."
    shutil.copytree(source, target)
    shift = np.random.default_rng(number).normal(0, 2, 3)
    for name in ("mr_t1.nii.gz", "mr_mask.nii.gz"):
        image = nib.load(target / name)
        affine = image.affine.copy()
        affine[:3, 3] += shift
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), target / name)
    (target / "landmarks.csv").unlink(missing_ok=True)


def write_cases(folder, count, broken=0):
    "Cases in folders, the last of them broken in different ways."
    if folder.is_dir():
        return folder
    sources = sorted(ROOT.glob("data_samples/*/easy*"))
    for number in range(count):
        shifted(sources[number % len(sources)], folder / f"case_{number:02d}", number)
    ends = [folder / f"case_{number:02d}" for number in range(count - broken, count)]
    for place, harm in zip(ends, (no_ct, cut_ct, strange_labels, empty_mr)):
        harm(place)
    return folder


def no_ct(place):
    (place / "ct.nii.gz").unlink()


def cut_ct(place):
    (place / "ct.nii.gz").write_bytes((place / "ct.nii.gz").read_bytes()[:20_000])


def strange_labels(place):
    image = nib.load(place / "ct_mask.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) * 7, image.affine), place / "ct_mask.nii.gz")


def empty_mr(place):
    image = nib.load(place / "mr_t1.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.int16), image.affine), place / "mr_t1.nii.gz")


def run(*words, wait=True, **more):
    "The command line; its seconds, status and text."
    start = time.monotonic()
    process = subprocess.Popen([*MAIN, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ONE, **more)
    if not wait:
        return process
    said = process.communicate()[0]
    return time.monotonic() - start, process.returncode, said


def states(out):
    "How many jobs of a batch are in which state."
    return pd.Series([json.loads(path.read_text())["status"] for path in out.rglob("job.json")]).value_counts().to_dict()


def row(what, asked, got):
    print(f"| {what} | {asked} | {got} |", flush=True)


def left_over():
    "Processes of any job."
    found = []
    for process in psutil.process_iter():
        try:
            found += [process] if "SPINEREG_JOB" in process.environ() and process.status() != psutil.STATUS_ZOMBIE else []
        except (psutil.Error, OSError):
            pass
    return found


def night(top):
    cases, out = write_cases(top / "sixty", 60, 4), top / "night"
    words = ("batch", "register", "--cases", cases, "--out", out, "--jobs", 2, *QUICK)
    seconds, status, _ = run(*words)
    table = pd.read_csv(out / "cases.csv")
    failed = table[table.status == "failed"]
    page_mb = (out / "report.html").stat().st_size / 1e6
    got = f"{states(out)}, status {status}, {seconds:.0f} s, report {page_mb:.1f} MB"
    row("60 cases, 2 workers, 4 broken", "56 done, 4 explained, status not 0", got)
    for _, case in failed.iterrows():
        print("   ", case.case, "|", case.stage, "|", str(case.error)[:140], "|", case.hint)
    seconds, status, said = run(*words)
    retried = sum(case.split(":")[0] in set(failed.case) for case in said.splitlines() if ": failed at" in case)
    got = f"{said.splitlines()[0]}; {retried} retried; {seconds:.0f} s with these and the report"
    row("the same again", "56 skipped in <= 10 s, 4 retried", got)


def overhead(top):
    cases = write_cases(top / "eight", 8)
    start = time.monotonic()
    for case in sorted(cases.iterdir()):
        out = top / "bare" / case.name
        out.mkdir(parents=True, exist_ok=True)
        given = ["-p", "fixed", case / "mr_t1.nii.gz", "-p", "moving", case / "ct.nii.gz", "-p", "moving_labels", case / "ct_mask.nii.gz"]
        given += ["-p", "fixed_labels", case / "mr_mask.nii.gz", "-p", "out_dir", out, "-p", "method", "optimise", "-p", "spacing_mm", "4"]
        given += ["-p", "prealign", "header", "-y", "steps: [5, 5, 2]"]
        command = [Path(sys.executable).parent / "papermill", "--no-progress-bar", ROOT / "nbs/apps/register.ipynb", out / "register.ipynb", *given]
        subprocess.run([*map(str, command)], env=ONE, check=True, capture_output=True)
    bare = time.monotonic() - start
    shutil.rmtree(top / "one", ignore_errors=True)
    seconds, status, _ = run("batch", "register", "--cases", cases, "--out", top / "one", "--jobs", 1, *QUICK)
    got = f"{seconds:.0f} / {bare:.0f} s = {seconds / bare:.2f} (status {status}), the report included"
    row("8 cases by the runner over 8 papermill commands", "<= 1.10", got)


def workers(top):
    cases, took = write_cases(top / "eight", 8), {}
    for jobs in (1, 2):
        shutil.rmtree(top / f"jobs_{jobs}", ignore_errors=True)
        took[jobs] = run("batch", "register", "--cases", cases, "--out", top / f"jobs_{jobs}", "--jobs", jobs, *QUICK)[0]
    row("8 cases, one worker over two, one thread each", ">= 1.6", f"{took[1]:.0f} / {took[2]:.0f} s = {took[1] / took[2]:.2f}")


def sweep(top):
    cases, out = write_cases(top / "four", 4), top / "sweep"
    words = ("--cases", cases, "--out", out, "--jobs", 2, *QUICK)
    seconds, status, _ = run("sweep", "register", "--grid", "similarity=lncc,mi,mind", *words)
    table = pd.read_csv(out / "settings.csv")
    got = f"{states(out)}, status {status}, {seconds:.0f} s, {len(table)} rows of settings.csv"
    row("3 settings x 4 cases", "one table with intervals, the best named", got)


def same_results(first, second):
    "Whether two batches have the same poses and moved images, bit for bit."
    same = []
    for path in sorted(first.glob("*/vertebrae.csv")):
        other = second / path.parent.name
        images = [np.asarray(nib.load(folder / "moved.nii.gz").dataobj) for folder in (path.parent, other)]
        same.append(path.read_bytes() == (other / "vertebrae.csv").read_bytes() and np.array_equal(*images))
    return same


def cluster(top):
    cases, out, file = write_cases(top / "eight", 8), top / "cluster", top / "scheduler.json"
    file.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": ONE}
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    servers = [subprocess.Popen(dask, **quiet)]
    while not file.is_file():
        time.sleep(0.2)
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    servers += [subprocess.Popen(worker, **quiet) for _ in range(2)]
    address = json.loads(file.read_text())["address"]
    batch = run("batch", "register", "--cases", cases, "--out", out, "--scheduler", address, *QUICK, wait=False)
    while len(list(out.glob("*/metrics.json"))) < 2:
        time.sleep(0.2)
    servers[2].kill()
    batch.communicate()
    for server in servers:
        server.kill()
    same = same_results(top / "jobs_1", out)
    got = f"{states(out)}, {sum(same)} of {len(same)} the same, status {batch.returncode}"
    row("scheduler and two workers apart, one killed", "same results, bit for bit", got)


def tiny(path, source, values):
    "A notebook of two cells and a table of cases for it."
    tags = [{"tags": ["parameters"]}, {}]
    lines = ('do = ""  # what\nout_dir = "out"  # where', source)
    empty = {"cell_type": "code", "outputs": [], "execution_count": None}
    cells = [empty | {"id": str(n), "metadata": tags[n], "source": text} for n, text in enumerate(lines)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}))
    pd.DataFrame(values, columns=["case", "do"]).to_csv(path.with_suffix(".csv"), index=False)
    return path, "--cases", path.with_suffix(".csv")


def slurm(top):
    app = tiny(top / "slurm/app.ipynb", "import time; time.sleep(0.5)", [(f"case_{n:02d}", "x") for n in range(40)])
    out, script = top / "slurm/out", top / "slurm/array.sh"
    words = ("batch", *app, "--out", out, "--slurm", script, "--per_task", 4)
    print("   ", run(*words)[2].strip())
    quiet = {"stdout": subprocess.DEVNULL}
    tasks = [subprocess.Popen(["bash", script], env=ONE | {"SLURM_ARRAY_TASK_ID": str(n)}, **quiet) for n in range(10)]
    time.sleep(15)
    for task in tasks[2:5]:
        task.kill()
    [task.wait() for task in tasks]
    first = states(out)
    print("   ", said := run(*words)[2].strip())
    left = int(said.split(" of ")[0]) if said[0].isdigit() else 0
    for n in range(-(-left // 4)):
        subprocess.run(["bash", script], env=ONE | {"SLURM_ARRAY_TASK_ID": str(n)}, check=False, **quiet)
    got = f"first {first}, then {states(out)}; {run(*words)[2].strip()}"
    row("40 cases by a SLURM array, 3 of 10 tasks killed", "40 done, by the same command", got)


def records_of(out):
    return [json.loads(path.read_text()) for path in out.rglob("job.json")]


def killed(folder, what, moment):
    "One batch of six jobs, a kill, and the same command again: lost cases, complete ones redone, half ones, processes left."
    out = folder / "out"
    shutil.rmtree(folder, ignore_errors=True)
    body = "import pathlib, time\ntime.sleep(2)\npathlib.Path(out_dir, 'result.txt').write_text('whole')"
    words = ("batch", *tiny(folder / "app.ipynb", body, [(f"case_{n}", "x") for n in range(6)]), "--out", out, "--jobs", 2)
    batch = run(*words, wait=False)
    while not list(out.glob("*/job.json")):
        time.sleep(0.1)
    time.sleep(moment + random.random())
    victims = {"runner": [batch.pid], "worker": [record["runner"] for record in records_of(out) if record["status"] == "running"]}
    victims["kernel"] = [process.pid for process in left_over() if "ipykernel_launcher" in " ".join(process.cmdline())]
    done = {path: path.stat().st_mtime_ns for path in out.glob("*/result.txt")}
    if victims[what]:
        os.kill(victims[what][0], signal.SIGKILL)
    batch.communicate()
    end = time.monotonic() + 10
    while left_over() and time.monotonic() < end:
        time.sleep(0.2)
    stayed = len(left_over())
    half = sum(record["status"] == "done" and not Path(record["folder"], "result.txt").exists() for record in records_of(out))
    run(*words)
    redone = sum(path.stat().st_mtime_ns != when for path, when in done.items())
    return np.array([6 - states(out).get("done", 0), redone, half, stayed + len(left_over())])


def kills(top):
    moments = [(what, moment) for what in ("runner", "worker", "kernel") for moment in (4, 9, 14)]
    lost, redone, half, stayed = sum(killed(top / f"kills/{n}", *moment) for n, moment in enumerate(moments))
    got = f"{lost} lost, {redone} redone, {half} half, {stayed} processes"
    row("9 kills of runner, worker, kernel", "no case lost, none redone, none half, no process after 10 s", got)


def plan(top):
    folder = top / "ten_thousand"
    app = tiny(folder / "app.ipynb", "", [(f"case_{n:05d}", "") for n in range(10_000)])
    seconds = run("batch", *app, "--out", folder / "out", "--slurm", folder / "array.sh")[0]
    row("10 000 cases planned", "<= 60 s", f"{seconds:.0f} s")
    for n in range(10_000):
        place = folder / f"out/case_{n:05d}"
        place.mkdir(exist_ok=True)
        record = {"format": "spinereg-job-1", "case": place.name, "setting": "", "app": "app", "parameters": {}}
        record |= {"status": "done" if n % 50 else "failed"}
        record |= {"inputs": {}, "code": {}, "stage": "", "error": "" if n % 50 else "ValueError: no", "hint": "", "seconds": 1.0, "attempts": 1}
        (place / "job.json").write_text(json.dumps(record))
    seconds = run("report", folder / "out")[0]
    page_mb = (folder / "out/report.html").stat().st_size / 1e6
    row("its report", "pages, opens in <= 2 s (tests/test_report.py)", f"written in {seconds:.0f} s, {page_mb:.1f} MB")


def report(top):
    sources, out = sorted(path for path in (top / "jobs_1").iterdir() if path.is_dir()), top / "two_hundred"
    shutil.rmtree(out, ignore_errors=True)
    for n in range(200):
        shutil.copytree(sources[n % len(sources)], out / f"case_{n:03d}", ignore=shutil.ignore_patterns("*.h5", "disp*", "moved*"))
        path = out / f"case_{n:03d}/job.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"case": path.parent.name}))
    jobs = [["", f"case_{n:03d}"] for n in range(200)]
    (out / "batch.json").write_text(json.dumps({"format": "spinereg-batch-1", "app": "register", "jobs": jobs}))
    seconds = run("report", out)[0]
    row("report of 200 cases", "<= 25 MB", f"{(out / 'report.html').stat().st_size / 1e6:.1f} MB, written in {seconds:.0f} s")


PARTS = {part.__name__: part for part in (night, overhead, workers, sweep, cluster, slurm, kills, plan, report)}

if __name__ == "__main__":
    print("| what | asked | measured |\n|---|---|---|")
    for name in sys.argv[2:] or PARTS:
        PARTS[name](Path(sys.argv[1]).absolute())
