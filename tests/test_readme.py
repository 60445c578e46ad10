"""README as a user meets it: what it points at is there, and every block of it runs when pasted, on a sample case."""

import ast
import functools
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pytest
import SimpleITK as sitk

import spinereg

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
APPS = sorted((ROOT / "nbs/apps").glob("*.ipynb"))
CASE = ROOT / "data_samples/test/easy_0"


def blocks(kind):
    "The code of README.md in a language, block by block."
    return re.findall(rf"(?ms)^```{kind}\n(.*?)^```", README)


def commands(block):
    "The lines of a block that do something, each in one."
    lines = (line.split("   #")[0].strip() for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


def test_links_pictures_and_targets_exist():
    """E3: every link, picture and make target named in README.md."""
    text = re.sub(r"(?s)<!--.*?-->", "", README)
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (ROOT / link).exists(), link
    targets = set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text("utf-8")))
    assert {"run", "test"} <= set(re.findall(r"(?m)^make (\w+)", text)) <= targets


def test_commands_are_found_without_activating_anything():
    """E3: in a fresh shell only make, python3 and what every system has are there; all else stands with its folder."""
    for line in sum(map(commands, blocks("sh")), []):
        assert line.split()[0] in {"make", "mkdir", "python3"} or line.startswith(".venv/bin/"), line


def test_python_calls_what_there_is():
    """E3: every call of the package in it fits the signature of what it calls."""
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("spinereg."):
                function = getattr(spinereg, ast.unparse(node.func).removeprefix("spinereg."))
                inspect.signature(function).bind(*node.args, **{word.arg: word.value for word in node.keywords})


def test_only_parameters_that_an_app_has_are_named():
    """D6, E3: a parameter in a documented command line is one that an app knows, where the line names the app, that one."""
    tagged = {}
    for app in APPS:
        cells = json.loads(app.read_text("utf-8"))["cells"]
        tagged[app.stem] = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])][0]
    known = {name: set(re.findall(r"(?m)^(\w+)", text)) for name, text in tagged.items()}
    for line in (README + (ROOT / "Makefile").read_text("utf-8")).replace("\\\n", " ").splitlines():
        named = re.search(r"nbs/apps/(\w+)\.ipynb", line)
        allowed = known[named.group(1)] if named else set().union(*known.values())
        assert set(re.findall(r"(?:-p |given,)(\w+)[ ,]", line)) - {"name"} <= allowed, line


# pasted


def stranger(folder):
    "The files of another tool: a displacement image that is nearly zero, and an affine map that is nearly none."
    image = sitk.ReadImage(str(folder / "mr.nii.gz"))
    still = sitk.GetArrayFromImage(image)[..., None] * np.zeros(3)
    field = sitk.GetImageFromArray(still + 0.1, isVector=True)
    field.CopyInformation(image)
    sitk.WriteImage(field, str(folder / "1Warp.nii.gz"))
    affine = sitk.AffineTransform(3)
    affine.Translate((0.5, 0.0, 0.0))
    sitk.WriteTransform(affine, str(folder / "0GenericAffine.mat"))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A checkout after `make run`, of one sample case, with the files of a user that README speaks of."
    if sys.platform == "win32" or not (Path(sys.prefix) / "pyvenv.cfg").exists():
        pytest.skip("the commands are those of Linux and macOS, for an environment as `make run` makes it")
    top = tmp_path_factory.mktemp("desk")
    for name in ("nbs", "spinereg", "settings.ini", "setup.py", "constraints.txt", "Makefile"):
        (top / name).symlink_to(ROOT / name)
    (top / ".venv").mkdir()
    for entry in Path(sys.prefix).glob("[!.]*"):
        (top / ".venv" / entry.name).symlink_to(entry)
    for stamp in (".python", ".run"):
        (top / ".venv" / stamp).touch()
    for folder in ("data_samples/test/easy_0", "data_dir/train/case_0", "data_dir/val/case_0"):
        shutil.copytree(CASE, top / folder)
    for path in CASE.iterdir():
        shutil.copy(path, top / path.name.replace("mr_t1", "mr"))
    (top / "settings.yaml").write_text("{epochs_similarity: [1], epochs_rigidity: [0]}", "utf-8")
    stranger(top)
    return top


RIGID = "{spacing_mm: 4.0, prealign: header, method: rigid}"
QUICK = {  # what is too long for a test, and how it is made short
    "make run": f"ARGS='-y \"{RIGID}\"'",
    "apps/register": f"-y '{RIGID}'",
    "spinereg register": "--spacing_mm 4.0 --prealign header --method rigid",
    "spinereg batch": "--spacing_mm 4.0 --prealign header --method rigid",
    "sweep register": "--spacing_mm 4.0 --prealign header --steps '[2, 2, 2]'",
    "sweep train": "--spacing_mm 4.0 --prealign header --crop '[16, 24, 32]'",
    "apps/train": "-y '{epochs_similarity: 1, epochs_rigidity: 1, crop: [16, 24, 32], spacing_mm: 4.0, prealign: header}'",
    "apps/halfreal": "-p scheme verse -y '{contrasts: [T1], seeds: [0]}'",
}
LEAVES = {  # what is there afterwards
    "make run ": "out/register/metrics.json",
    "spinereg register": "out/my_case/transform.h5",
    "apps/register.ipynb out/executed": "out/executed.ipynb",
    "spinereg batch": "out/night/report.html",
    "sweep register": "out/sweep/settings.csv",
    "sweep train": "out/trainings/report.html",
    "apps/train": "out/train/validation.csv",
    "apps/halfreal": "out/halfreal/T1_0/ct.nii.gz",
}
ELSEWHERE = ("make test", "-m venv", "pip install --constraint constraints.txt --editable", "ruff", "typos", "tests/notebooks.py", "bin/pytest")
PASTED = [block for block in blocks("sh") if not all(any(word in line for word in ELSEWHERE) for line in commands(block))]


def shell(desk):
    "What a login shell knows that nobody has set up."
    return {"PATH": "/usr/bin:/bin", "HOME": str(desk), "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}


@pytest.mark.parametrize("block", PASTED, ids=[" ".join(commands(block)[-1].split()[:3]) for block in PASTED])
def test_shell_when_pasted(block, desk):
    """E3: in a shell that knows nothing; what installs and what checks is run by CI itself, see the next test."""
    for line in commands(block):
        if any(word in line for word in ELSEWHERE):
            continue
        if "jupyter lab" in line:
            opens_in_jupyterlab(line, desk)
            continue
        line = re.sub(r"--spacing_mm \S+", "", line) + " " + " ".join(more for word, more in QUICK.items() if word in line)
        done = subprocess.run(["sh", "-c", line], cwd=desk, env=shell(desk), capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, line + done.stdout + done.stderr
        for word, left in LEAVES.items():
            assert word not in line or (desk / left).is_file(), line + done.stdout + done.stderr


def opens_in_jupyterlab(line, desk):
    "The server begins, and the page that it opens in a browser leads to the notebook."
    settings = {"ServerApp": {"allow_root": True, "port": 0}}
    (desk / ".jupyter").mkdir()
    (desk / ".jupyter/jupyter_server_config.json").write_text(json.dumps(settings), "utf-8")
    heard = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = shell(desk) | {"BROWSER": "echo opened %s"}
    server = subprocess.Popen(shlex.split(line), cwd=desk, env=environment, start_new_session=True, **heard)
    try:
        page = next(said.split()[1] for said in server.stdout if said.startswith("opened "))
        assert "/lab/tree/nbs/tutorials/quickstart.ipynb" in Path(url2pathname(urlsplit(page).path)).read_text("utf-8")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        server.stdout.close()


def test_without_make_are_the_lines_of_make(desk):
    """E3: what installs and what checks, line by line as `make` would run it in an environment that is not there yet."""
    listed = {}
    for target in ("run", "test"):
        command = ["make", "--dry-run", target, "VENV=.other"]
        said = subprocess.run(command, cwd=desk, capture_output=True, text=True, check=True).stdout
        listed[target] = said.replace("\\\n", " ").replace(".other", ".venv").replace("'", '"')
    lines = [line for block in blocks("sh") for line in commands(block) if any(word in line for word in ELSEWHERE) and "make" not in line]
    assert len(lines) == 7
    for line in lines:
        words = [word for word in shlex.split(line) if word not in ("python3", "-m", "pip")]
        assert any(all(word in shown for word in words) for shown in "".join(listed.values()).splitlines()), line


def test_python_when_pasted(desk, monkeypatch):
    """E3: block after block in one session; with large voxels, and the two trainings cut short."""
    monkeypatch.chdir(desk)
    shutil.rmtree("out", ignore_errors=True)
    large, near = {"spacing_mm": 4.0}, {"prealign": "header"}
    short = {"epochs_similarity": 1, "epochs_rigidity": 1, "crop": (16, 24, 32)}
    for name, quick in {"register": large | near, "rigidify": large, "fit": large | near | short}.items():
        monkeypatch.setattr(spinereg, name, functools.partial(getattr(spinereg, name), **quick))
    session = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), session)
    assert session["moved"].GetSize() == sitk.ReadImage(str(desk / "mr.nii.gz")).GetSize()
    assert Path("out/rigid/transform.h5").is_file() and Path("out/measured/metrics.json").is_file()
