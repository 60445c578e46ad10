"""Many notebooks in a night: what fails, what is killed, what is left, what is done again; with notebooks of one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import psutil
import pytest

from spinereg.apps.batch import count_no_failures, executor_of, run_batch, run_jobs, share_machine
from spinereg.apps.command import main
from spinereg.apps.job import MARK, Job, inputs_of, is_alive, processes_of, read_record, run_job, run_notebook, was_cut_short, write_record
from spinereg.apps.parameters import check_values, find_app, parameters_of, value_of
from spinereg.apps.paths import apps, fits
from spinereg.apps.plan import make_jobs, plan_jobs, read_cases, read_grid, set_aside, settings_of, why_to_do, write_plan
from spinereg.apps.slurm import write_array
from spinereg.compare.jobs import planned_jobs
from spinereg.files.problems import folder_aside

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}, "language_info": {"name": "python"}}
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="kills and signals of POSIX")
HEAD = 'do = "nothing"  # a line of Python\nout_dir = "out"  # for marks'
BODY = """import json, os, pathlib, signal, sys, time
out = pathlib.Path(out_dir)
first = not (out / "tried").exists()
(out / "tried").touch()
record = json.loads((out / "job.json").read_text())
exec(do)
(out / "result.txt").write_text("whole")"""
KILL = "first and os.kill({}, signal.SIGKILL); first and time.sleep(60)"


def notebook(path, *cells):
    "A notebook whose first cell holds the parameters."
    tags = [{"tags": ["parameters"]}, {}]
    made = [
        {"cell_type": "code", "id": str(n), "metadata": tags[n > 0], "source": text, "outputs": [], "execution_count": None}
        for n, text in enumerate(cells)
    ]
    path.write_text(json.dumps({"cells": made, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}), "utf-8")
    return path


def table(path, **cases):
    "A table of cases, each with a line to do."
    pd.DataFrame([{"case": name, "do": line} for name, line in cases.items()]).to_csv(path, index=False)
    return path


def left_over():
    "Processes of any job, but for those of tests that run beside this one."
    found, beside = [], "PYTEST_XDIST_WORKER"
    for process in psutil.process_iter():
        try:
            ours = MARK in process.environ() and process.environ().get(beside) == os.environ.get(beside)
            found += [process] if ours and process.status() != psutil.STATUS_ZOMBIE else []
        except (psutil.Error, OSError):
            pass
    return [process for process in found if process.pid != os.getpid()]


def soon(true, seconds=30.0):
    "Whether something becomes true."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.1)
    return False


def command(*words, cwd, **more):
    "The command line in a process of its own, which hears SIGINT also where these tests run in the background."
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom spinereg.apps.command import main; sys.exit(main())"
    more |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], cwd=cwd, **more)


# what is asked


@pytest.mark.parametrize("name", sorted(apps()))
def test_d6_what_a_cell_allows_its_function_allows(name):
    """D6: every parameter of an app has a meaning and a default of its kind; a wrong kind, word or name is refused with what was expected."""
    known = parameters_of(find_app(name))
    for parameter in known.values():
        assert parameter.meaning and fits(parameter.default, parameter.kind)
        with pytest.raises(ValueError, match=rf"{parameter.name[:-1]} is not a parameter \({parameter.name}\?\)|is not a parameter"):
            check_values(name, {parameter.name[:-1]: 1}, known)
    with pytest.raises(ValueError, match="out_dir=3: expected str"):
        check_values(name, {"out_dir": 3}, known)


def test_d6_texts_become_values_of_the_kind_expected():
    assert [value_of("3", float), value_of("3", str), value_of("(1, 2)", list | tuple), value_of("None", str), value_of("{'a': 1}", str | dict)] == [
        3, "3", (1, 2), "None", {"a": 1}]  # fmt: skip
    assert value_of("[" * 5000, list) == "[" * 5000 and value_of("", str) == ""


def test_d6_a_misspelt_parameter_is_told_from_any_folder(tmp_path):
    """D6: by the command and by papermill alike, before sample data are looked for."""
    run = command("register", "--fixd", "x", cwd=tmp_path)
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 2 and "fixd is not a parameter (fixed?)" in said and "data_samples" not in said and "Traceback" not in said
    import papermill

    with pytest.raises(papermill.PapermillExecutionError, match=r"fixd is not a parameter \(fixed\?\)"):
        papermill.execute_notebook(apps()["register"], tmp_path / "x.ipynb", {"fixd": "x"}, cwd=tmp_path, kernel_name="python3", progress_bar=False)


def test_cases_settings_and_their_mistakes(tmp_path):
    app = notebook(tmp_path / "mine.ipynb", HEAD, BODY)
    known = parameters_of(app)
    with pytest.raises(ValueError, match="no parameters fixed and moving"):
        read_cases(tmp_path, known)
    (tmp_path / "a.csv").write_text("case,do\nA,1\na,2\n")
    with pytest.raises(ValueError, match="two jobs would write into"):
        plan_jobs(str(app), tmp_path / "a.csv", tmp_path / "out")
    (tmp_path / "b.csv").write_text("case,do\n../b,1\n")
    with pytest.raises(ValueError, match="makes no path"):
        plan_jobs(str(app), tmp_path / "b.csv", tmp_path / "out")
    with pytest.raises(ValueError, match="every job has a folder of its own"):
        list(make_jobs(str(app), {"out_dir": "x"}, "", [], tmp_path))
    with pytest.raises(ValueError, match="expected a list of values to try"):
        settings_of({"do": "x"})
    assert read_grid(["do=a,b"], known) == {"do=a": {"do": "a"}, "do=b": {"do": "b"}}
    assert not (tmp_path / "out").exists(), "nothing is written before the plan makes sense"


def test_a_machine_is_shared_and_never_overbooked():
    for jobs in (None, 1, 2, 64):
        at_once, limits = share_machine(jobs)
        assert at_once * limits.memory_gb <= psutil.virtual_memory().total / 1e9 and limits.threads >= 1
        assert at_once * limits.threads <= max(at_once, os.cpu_count())
    assert share_machine(None, None, ("0", "1", "2"))[0] == 3


def test_how_a_kernel_is_started(monkeypatch, tmp_path):
    """Kernels over files where there are such, as ports can collide; five minutes to start, as a node can be loaded."""
    import papermill

    seen = {}
    monkeypatch.setattr(papermill, "execute_notebook", lambda *args, **given: seen.update(given))
    assert run_notebook({"notebook": "x.ipynb", "parameters": {}, "cwd": "."}, tmp_path / "x.ipynb") == {"status": "done"}
    assert seen["start_timeout"] >= 300
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    manager = seen["kernel_manager_class"]()
    assert sys.platform == "win32" or manager.ip == str(tmp_path / "kernel"), "its own, not one in the current folder"
    assert manager.transport == ("tcp" if sys.platform == "win32" else "ipc")


# one night with everything in it


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    "Two workers, one case for each thing that can happen."
    folder = tmp_path_factory.mktemp("night")
    app = notebook(folder / "mine.ipynb", HEAD, BODY)
    lines = {"good": "print(__import__('ipykernel').get_connection_info())", "wrong": "1 / 0"}
    lines |= {"kernel": KILL.format("os.getpid()"), "hopeless": "os.kill(os.getpid(), 9)", "process": KILL.format("os.getppid()")}
    lines |= {"worker": KILL.format("record['runner']"), "greedy": "hog = b'x' * 1_500_000_000; time.sleep(60)"}
    lines = lines if sys.platform != "win32" else {name: lines[name] for name in ("good", "wrong", "greedy")}
    cases = table(folder / "cases.csv", **lines)
    before = app.read_bytes()
    rows = run_batch(str(app), cases, folder / "out", jobs=2, memory_gb=0.9).set_index("case")
    assert app.read_bytes() == before and {path.name for path in folder.iterdir()} == {"mine.ipynb", "cases.csv", "out"}
    return folder, rows


def test_d7_a_failure_stops_no_other_and_keeps_its_notebook(night):
    """D7: the row says where and why; the executed notebook holds the error; the log says it, too."""
    folder, rows = night
    assert rows.status["good"] == "done" and rows.status["wrong"] == "failed" and "ZeroDivisionError" in rows.error["wrong"]
    assert "ZeroDivisionError" in (folder / "out/wrong/mine.ipynb").read_text("utf-8")
    log = (folder / "out/wrong/log.txt").read_text("utf-8")
    assert "do='1 / 0'" in log and "failed at" in log, "values are echoed, the error is told"
    assert rows.attempts["wrong"] == 1, "an error of the notebook is an answer"


@POSIX
def test_what_is_killed_is_tried_once_more_by_our_own_count(night):
    """Whether the kernel is killed, the process around it, or the worker of Dask; and not for ever."""
    _, rows = night
    killed = rows.loc[["kernel", "process", "worker"]]
    assert (killed.status == "done").all() and (killed.attempts == 2).all()
    assert rows.status["hopeless"] == "failed" and rows.attempts["hopeless"] == 2 and "died" in rows.error["hopeless"]


def test_memory_is_that_of_the_kernel_and_all_it_starts(night):
    """Of Dask's worker it would be nothing."""
    _, rows = night
    assert rows.status["greedy"] == "failed" and rows.stage["greedy"] == "memory" and "more than its share of 0.9 GB" in rows.error["greedy"]


def test_nothing_is_left_of_a_night(night):
    folder, rows = night
    assert not left_over() and not list((folder / "out").rglob(".partial-*"))
    assert planned_jobs(folder / "out") == [("", name) for name in rows.index]


def test_d7_what_is_done_is_skipped_and_what_is_not_is_said(night, capsys):
    """D7: by content of inputs, values, code; a case cut short, or whose result is not whole, is done again."""
    folder, rows = night
    jobs = {job.case: job for job in plan_jobs(str(folder / "mine.ipynb"), folder / "cases.csv", folder / "out")}
    done = [name for name in rows.index if rows.status[name] == "done"]
    assert [name for name, job in jobs.items() if not why_to_do(job)] == done
    assert why_to_do(jobs["wrong"]) == "failed before"
    job, record = jobs["good"], read_record(Path(jobs["good"].folder))
    write_record(Path(job.folder), record | {"status": "running"})
    assert why_to_do(job) == "cut short"
    write_record(Path(job.folder), record)
    (Path(job.folder) / "manifest.json").write_text('{"format": "spinereg-result-1", "whole": true, "files": {"disp.nii.gz": {"size": 3}}}')
    assert why_to_do(job) == "its result is not whole"
    (Path(job.folder) / "manifest.json").unlink()
    assert why_to_do(job) == ""


# ends


@pytest.fixture
def sleepers(tmp_path):
    "A batch of which one case is done at once and the others sleep."
    app = notebook(tmp_path / "mine.ipynb", HEAD, BODY)
    child = "import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], start_new_session=True)"
    cases = table(tmp_path / "cases.csv", a="0", b=f"{child}; first and time.sleep(300)", c="first and time.sleep(300)")
    return tmp_path, ("batch", app, "--cases", cases, "--out", tmp_path / "out", "--jobs", "2")


def under_way(folder):
    "Whether the first case is done and the others are at it."
    return (folder / "out/a/result.txt").exists() and all((folder / "out" / name / "tried").exists() for name in "bc")


@POSIX
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_batch_that_is_ended_leaves_no_process_and_goes_on(sleepers, number):
    """Kernels and their children end with it; the same command does the rest, and nothing that is done."""
    folder, words = sleepers
    run = command(*words, cwd=folder)
    assert soon(lambda: under_way(folder), 120), run.stdout.read()
    done = (folder / "out/a/result.txt").stat().st_mtime_ns
    run.send_signal(number)
    said = run.communicate(timeout=60)[0]
    assert soon(lambda: not left_over(), 60)
    assert run.returncode == (-number if number == signal.SIGKILL else 130), said
    states = {name: read_record(folder / "out" / name)["status"] for name in "abc"}
    assert states["a"] == "done" and set(states.values()) <= {"done", "running", "stopped"}, states
    if number == signal.SIGTERM:
        again = command(*words, cwd=folder)
        said = again.communicate(timeout=120)[0]
        assert again.returncode == 0 and "3 of 3 jobs are done" in said and "1 done before, skipped" in said, said
        assert (folder / "out/a/result.txt").stat().st_mtime_ns == done and not left_over()
        page = (folder / "out/report.html").read_text("utf-8")
        assert "mine" in page


@POSIX
def test_two_batches_do_not_work_on_one_case(tmp_path):
    """The one that is at it is named, with its process and machine."""
    app = notebook(tmp_path / "mine.ipynb", HEAD, BODY)
    job = Job("mine", str(app), str(tmp_path / "out"), {"do": "0", "out_dir": str(tmp_path / "out")}, str(tmp_path))
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=os.environ | {MARK: "theirs"})
    try:
        record = {"format": "spinereg-job-1", "status": "running", "mark": "theirs", "host": os.uname().nodename, "runner": sleeper.pid}
        write_record(tmp_path / "out", record)
        with pytest.raises(RuntimeError, match=f"process {sleeper.pid} on .* is at it"):
            run_job(job)
        write_record(tmp_path / "out", record | {"host": "elsewhere"})
        assert is_alive(read_record(tmp_path / "out"), tmp_path / "out")
        os.utime(tmp_path / "out/job.json", (1e9, 1e9))
        assert not is_alive(read_record(tmp_path / "out"), tmp_path / "out"), "no sign of life for long"
    finally:
        sleeper.kill()
        sleeper.wait()


def test_an_executed_notebook_never_replaces_its_source(tmp_path):
    app = notebook(tmp_path / "mine.ipynb", HEAD, BODY)
    with pytest.raises(ValueError, match="would be replaced by its executed copy"):
        run_job(Job("mine", str(app), str(tmp_path), {}, str(tmp_path)))


# engines


@POSIX
def test_a_cluster_of_anybodys_and_its_scheduler(tmp_path):
    """Workers of a cluster object, or of a scheduler by its address, where a killed task would be run again up to three times."""
    distributed = pytest.importorskip("distributed")
    app = notebook(tmp_path / "mine.ipynb", HEAD, BODY)
    cases = table(tmp_path / "cases.csv", a="0", b=KILL.format("record['runner']"))
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster:
        assert cluster.scheduler.allowed_failures == 3
        rows = run_batch(str(app), cases, tmp_path / "out", scheduler=cluster.scheduler_address)
        assert cluster.scheduler.allowed_failures == 0 and rows.status.tolist() == ["done", "done"] and rows.attempts.tolist() == [1, 2]
        with executor_of(2, cluster=cluster) as pool:
            assert pool.submit(abs, -1).result() == 1
    assert count_no_failures(type("Scheduler", (), {})()) is None


@POSIX
def test_slurm_array_with_a_task_that_is_lost(tmp_path):
    """A stand-in for sbatch starts the tasks as processes; one is killed, and the same command makes it good."""
    app = notebook(tmp_path / "mine.ipynb", HEAD, BODY)
    cases = table(tmp_path / "cases.csv", a="0", b=KILL.format("record['runner']"), c="0", d="0")
    words = ("batch", app, "--cases", cases, "--out", tmp_path / "out", "--slurm", tmp_path / "array.sh", "--per_task", "2")

    def sbatch():
        text = (tmp_path / "array.sh").read_text()
        last = int(text.split("--array=0-")[1].split("\n")[0])
        tasks = [subprocess.Popen(["bash", tmp_path / "array.sh"], env=os.environ | {"SLURM_ARRAY_TASK_ID": str(n)}) for n in range(last + 1)]
        return [task.wait(120) for task in tasks]

    plan = command(*words, cwd=tmp_path)
    assert "4 of 4 jobs are to be done" in plan.communicate(timeout=60)[0]
    assert sbatch() == [-9, 0]
    assert soon(lambda: not left_over(), 60)
    plan = command(*words, cwd=tmp_path)
    assert "1 of 4 jobs are to be done" in plan.communicate(timeout=60)[0]
    assert sbatch() == [0]
    plan = command(*words, cwd=tmp_path)
    assert "all 4 jobs are done" in plan.communicate(timeout=60)[0]


def test_slurm_script_has_no_more_tasks_than_clusters_allow(tmp_path):
    jobs = [Job("mine", "mine.ipynb", str(tmp_path / str(n)), {}, ".", str(n)) for n in range(2501)]
    text = write_array(tmp_path / "array.sh", jobs, tmp_path / "my out", 2).read_text()
    assert "--array=0-833\n" in text and "3 in each task" in text
    assert subprocess.run(["bash", "-n", tmp_path / "array.sh"], check=False).returncode == 0


def test_a_job_whose_batch_is_over_ends(tmp_path):
    """A worker elsewhere learns of the end by the folder that is gone."""
    app = notebook(tmp_path / "mine.ipynb", HEAD, BODY)
    job = Job("mine", str(app), str(tmp_path / "out"), {"do": "time.sleep(100)", "out_dir": str(tmp_path / "out")}, str(tmp_path))
    with folder_aside(tmp_path) as mark:
        pass
    limits = share_machine(1)[1]._replace(batch=str(mark))
    start = time.monotonic()
    record = run_job(job, limits)
    assert record["status"] == "stopped" and time.monotonic() - start < 30 and not processes_of(record["mark"])


def test_cases_that_cannot_be_run_are_told_without_a_kernel(tmp_path, capsys):
    job = Job("register", "register.ipynb", str(tmp_path / "a"), {}, ".", "a", problem="there is no ct.nii.gz")
    run_jobs([job], tmp_path)
    assert "a: failed at files: there is no ct.nii.gz" in capsys.readouterr().out and read_record(tmp_path / "a")["status"] == "failed"


# what would be done twice, or not at all, or by the wrong one


def test_a_second_batch_leaves_the_record_of_the_first_alone(tmp_path):
    """Its jobs say who is at them; nothing of them is ended, and their records stay."""
    app = notebook(tmp_path / "mine.ipynb", HEAD, BODY)
    cases = table(tmp_path / "cases.csv", a="time.sleep(12)")
    first = command("batch", app, "--cases", cases, "--out", tmp_path / "out", "--jobs", "1", cwd=tmp_path)
    assert soon(lambda: processes_of(read_record(tmp_path / "out/a").get("mark", "?")), 60)
    rows = run_batch(str(app), cases, tmp_path / "out", jobs=1)
    assert rows.status.tolist() == ["failed"] and "is at it" in rows.error[0]
    assert read_record(tmp_path / "out/a")["status"] == "running"
    assert first.wait(60) == 0 and read_record(tmp_path / "out/a")["status"] == "done"


def test_what_a_setting_says_holds_for_every_case(tmp_path):
    """A file that was found may be left out by a setting; a value of a table and of a setting are one too many."""
    plan = plan_jobs("register", ROOT / "data_samples/test", tmp_path / "out", {"with": {}, "without": {"moving_labels": None}})
    labels = {(job.setting, job.case): job.parameters["moving_labels"] for job in plan}
    assert labels["without", "easy_0"] is None and str(labels["with", "easy_0"]).endswith("ct_mask.nii.gz")
    app = notebook(tmp_path / "mine.ipynb", HEAD, BODY)
    cases = table(tmp_path / "cases.csv", a="0")
    (job,) = plan_jobs(str(app), cases, tmp_path / "out", parameters={"do": "1"})
    assert job.parameters["do"] == "0", "a case may differ from all"
    with pytest.raises(ValueError, match="case a: do is given by the table and by a setting"):
        plan_jobs(str(app), cases, tmp_path / "out", {"one": {"do": "1"}})
    with pytest.raises(ValueError, match="two settings of it would have one name"):
        settings_of({"do": ["a/b", "a:b"]})


def test_an_old_result_does_not_stand_for_one_to_come(tmp_path):
    """Other parameters: the record says so until the job has run, and what cannot stand beside it leaves the plan."""
    app = notebook(tmp_path / "mine.ipynb", HEAD, BODY)
    cases = table(tmp_path / "cases.csv", a="0", b="0")
    assert run_batch(str(app), cases, tmp_path / "out", jobs=1).status.tolist() == ["done", "done"]
    table(cases, a="1")
    jobs = plan_jobs(str(app), cases, tmp_path / "out")
    set_aside(jobs, [why_to_do(job) for job in jobs])
    assert read_record(tmp_path / "out/a")["status"] == "outdated" and why_to_do(jobs[0]) == "outdated"
    write_plan(tmp_path / "out", str(app), jobs)
    assert planned_jobs(tmp_path / "out") == [("", "a"), ("", "b")]
    write_plan(tmp_path / "out", str(app), jobs[:1], {"do": "1"})
    assert planned_jobs(tmp_path / "out") == [("", "a")], "b was made otherwise"
    write_plan(tmp_path / "out", str(app), [job._replace(code={"app": "another"}) for job in jobs])
    assert planned_jobs(tmp_path / "out") == [("", "a")]


def test_a_file_named_by_a_default_is_an_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "atlas.txt").write_text("1")
    app = notebook(tmp_path / "mine.ipynb", HEAD + '\natlas = "atlas.txt"  # what is read', BODY)
    assert run_batch(str(app), None, tmp_path / "out", parameters={"do": "0"}, jobs=1).status.tolist() == ["done"]
    (job,) = plan_jobs(str(app), None, tmp_path / "out", parameters={"do": "0"})
    assert why_to_do(job) == ""
    (tmp_path / "atlas.txt").write_text("2")
    assert why_to_do(job) == "done with other files"


def test_folders_that_are_no_cases_and_words_that_are_no_paths(tmp_path):
    for name in ("data/easy/x", "data/.hidden", "data/out/case", "labels"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data/out/batch.json").write_text("{}")
    (tmp_path / "data/.DS_Store").write_text("")
    (tmp_path / "data/README").write_text("")
    for name in ("ct.nii.gz", "mr.nii.gz"):
        shutil.copy(ROOT / "data_samples/test/easy_0/ct.nii.gz", tmp_path / "data/easy" / name)
    known = parameters_of(find_app("register"))
    for cases in (tmp_path / "data", tmp_path / "data/*", tmp_path / "data/*/*.nii.gz"):
        assert [case.case for case in read_cases(cases, known)] == ["easy"], cases
    pd.DataFrame([{"case": "a", "prealign": "labels", "fixed": "data/easy/mr.nii.gz"}]).to_csv(tmp_path / "cases.csv", index=False)
    (given,) = read_cases(tmp_path / "cases.csv", known)
    assert given.parameters == {"prealign": "labels", "fixed": str(tmp_path / "data/easy/mr.nii.gz")}
    pd.DataFrame([{"case": "a", "fixed": "data/easy/mri.nii.gz"}]).to_csv(tmp_path / "cases.csv", index=False)
    (given,) = read_cases(tmp_path / "cases.csv", known)
    assert given.problem.startswith("no such file: fixed=") and "begin at its folder" in given.problem


def test_mistakes_of_the_command_line_are_a_sentence(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("a: [1, 2")
    (tmp_path / "list.yaml").write_text("- 1")
    notebook(tmp_path / "magic.ipynb", "%matplotlib")
    sweep = ("sweep", "register", "--cases", ROOT / "data_samples/test", "--out", tmp_path / "out", "--grid")
    mistakes = {
        "it is no YAML": (*sweep, tmp_path / "bad.yaml"),
        "expected names with lists": (*sweep, tmp_path / "list.yaml"),
        "spinereg batch has --jobs itself": ("batch", "evaluate", "--out", tmp_path / "out"),
        "is no plain Python": ("batch", tmp_path / "magic.ipynb", "--out", tmp_path / "out"),
        "there is no app": ("batch", "--jobs", "4", "registr", "--out", tmp_path / "out"),
    }
    for said, words in mistakes.items():
        assert main([*map(str, words)]) == 2
        assert said in capsys.readouterr().err, words
    (tmp_path / "good.yaml").write_text("fine: {step_mm: 1e-1}")
    assert read_grid([str(tmp_path / "good.yaml")], parameters_of(find_app("register"))) == {"fine": {"step_mm": 0.1}}


def test_a_machine_of_others_is_not_measured_by_this_one(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("spinereg.apps.batch.run_all", lambda work, pool, limits, bar: seen.append(limits) or {})
    monkeypatch.setattr("spinereg.apps.batch.executor_of", lambda *given: nullcontext())
    app = notebook(tmp_path / "mine.ipynb", HEAD, BODY)
    (job,) = plan_jobs(str(app), None, tmp_path / "out")
    run_jobs([job], tmp_path / "out")
    run_jobs([job], tmp_path / "out", scheduler="tcp://elsewhere:1")
    assert seen[0].threads == os.cpu_count() or seen[0].threads > 1 or os.cpu_count() == 1, "one job has the machine for itself"
    assert seen[1].threads == 0 and seen[1].memory_gb == float("inf")


@POSIX
def test_what_was_cut_short_goes_on_where_the_notebook_can(tmp_path):
    """A training that is killed would refuse its own checkpoint: the second try, and the same command later, resume. Whoever begins does not."""
    body = BODY.replace("exec(do)", "(out / f'resume_{resume}').touch()\nexec(do)")
    app = notebook(tmp_path / "mine.ipynb", HEAD + "\nresume = False  # go on", body)
    cases = table(tmp_path / "cases.csv", killed=KILL.format("os.getpid()"), good="0")
    assert run_batch(str(app), cases, tmp_path / "out", jobs=1).status.tolist() == ["done", "done"]
    marks = {name: sorted(path.name for path in (tmp_path / "out" / name).glob("resume_*")) for name in ("killed", "good")}
    assert marks == {"killed": ["resume_False", "resume_True"], "good": ["resume_False"]}
    assert not any(why_to_do(job) for job in plan_jobs(str(app), cases, tmp_path / "out")), "that it went on is no other parameter"
    data = tmp_path / "data.txt"
    for text, begun, goes_on in (("1", "stopped", True), ("2", "stopped", False), ("2", "outdated", False), ("2", "done", False)):
        job = Job("mine", str(app), str(tmp_path / "out/killed"), {"data": str(data)}, str(tmp_path))
        data.write_text("1")
        record = json.loads(json.dumps(job._asdict())) | {"status": begun, "inputs": inputs_of(job.reads, job.cwd, tmp_path / "out", hashed=True)}
        data.write_text(text)
        assert was_cut_short(record, job, inputs_of(job.reads, job.cwd, tmp_path / "out", hashed=True)) == goes_on, (text, begun)
