"""The project as a whole: what lies where, notebooks and modules in step, what an installed package holds and needs."""

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from notebooks import alike, as_stored
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import spinereg
from spinereg.space.geometry import transform_points

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
APPS = [path for path in NOTEBOOKS if path.parent.name == "apps"]
MODULES = sorted((ROOT / "spinereg").rglob("*.py"))
FLOORS = ("space", "files", "losses", "measure", "registration", "learning", "compare", "interactive", "phantom", "apps")
TOP_LEVEL = {
    *("nbs", "spinereg", "data_samples", "tests", "settings.ini", "setup.py", "README.md"),
    *("Makefile", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "constraints.txt"),
}


def name_of(path):
    return path.relative_to(ROOT / "nbs").as_posix()


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def parsed(path):
    "The syntax tree of all code cells, without lines for IPython."
    return ast.parse("\n".join(re.sub(r"(?m)^\s*[%!].*", "", source(cell)) for cell in cells(path)))


def settings():
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def requirements(*keys):
    return [Requirement(line) for key in keys for line in settings()[key].split()]


def extras():
    "The extras of settings.ini: `elastix` for its line `elastix_requirements`."
    return {key.removesuffix("_requirements") for key in settings() if key.endswith("_requirements")}


def python(*args, **kwargs):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False, **kwargs)


def tool(name, cwd):
    done = subprocess.run([Path(sys.executable).with_name(name)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_top_level_holds_only_what_convention_puts_there():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {line.split("/")[0].strip('"') for line in listed.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


# notebooks


def test_d8_notebooks_are_exported_and_clean(tmp_path):
    """D8: exporting and cleaning a copy of the project changes no file, makes none and leaves none out."""
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_proc")
    for folder in ("nbs", "spinereg"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for module in (tmp_path / "spinereg").rglob("*.py"):
        if module.name != "__init__.py":
            module.unlink()
    tool("nbdev_export", tmp_path)
    tool("nbdev_clean", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"nbs", "spinereg", "settings.ini"}
    for folder, pattern in (("nbs", "*.ipynb"), ("spinereg", "*.py")):
        here, there = ({path.relative_to(top): path.read_bytes() for path in (top / folder).rglob(pattern)} for top in (ROOT, tmp_path))
        here = {path: data for path, data in here.items() if not {".ipynb_checkpoints", "_proc"} & set(path.parts)}
        different = sorted(str(path) for path in here.keys() | there.keys() if here.get(path) != there.get(path))
        assert not different, f"run `make sync` and commit: {different}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_d10_notebook_carries_outputs_of_a_fresh_run_and_is_small(path):
    """D4, D10: outputs are stored, none is an error, no execution count, at most 1 MB."""
    code = cells(path)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs or not code, "run `make notebooks`"
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert all(cell["execution_count"] is None for cell in code)
    assert path.stat().st_size <= 1_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_opens_with_a_title_and_a_subtitle(path):
    first = source(cells(path, "markdown")[0])
    assert re.match(r"# \S.*\n\n> \S", first), first[:80]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_links_from_a_notebook_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#:]+)[)#]", "".join(source(cell) for cell in cells(path, "markdown")))
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize(
    ("stored", "fresh", "same"),
    [("Dice 0.58 of 7 vertebrae", "Dice 0.59 of 7 vertebrae", True), ("Dice 0.58", "Dice 0.60", False), ("0.3 mm", "0.3 voxels", False)]
    + [("['check', 'train']", "['check', 'elastix', 'train']", False), ("6 of 6 cases", "5 of 6 cases", False), ("L4", "L5", False)]
    + [("tensor(5.6624e-07)", "tensor(-3.1e-09)", True), ("(22797, 1.5e3)", "(22790, 1499.0)", True), ("0.943671875", "0.9451", False)],
)
def test_what_counts_as_a_stale_output(stored, fresh, same):
    assert alike(stored, fresh) == same


def test_a_stale_output_is_found_and_shown(tmp_path):
    """Notebook, cell, stored and fresh text; a cell that says why its output varies is left out."""
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "settings.ini", tmp_path)
    output = {"output_type": "stream", "name": "stdout", "text": ["3 apps\n"]}
    cell = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": [output]}
    sources = ["# a note", "print(2 + 2, 'apps')", "# output varies: it is a guess\nprint(5, 'apps')"]
    notebook = {"cells": [cell | {"id": str(number), "source": text} for number, text in enumerate(sources)]}
    (tmp_path / "nbs/a.ipynb").write_text(json.dumps(notebook | {"metadata": {}, "nbformat": 4, "nbformat_minor": 5}), "utf-8")
    done = python(str(ROOT / "tests/notebooks.py"), "--n_workers", "0", cwd=tmp_path)
    if as_stored():
        assert done.returncode == 1
        lines = ["a.ipynb: stale outputs", "cell 0", "  stored: 3 apps", "  fresh : ", "cell 1", "  stored: 3 apps", "  fresh : 4 apps", ""]
        assert "\n".join(lines) in done.stderr


BOOK = [path for path in NOTEBOOKS if re.match(r"\d", path.name)]


@pytest.mark.parametrize("path", BOOK, ids=name_of)
def test_notebook_is_named_after_its_floor_and_module(path):
    """`43_registration.optimise.ipynb` defines `spinereg.registration.optimise`; the first digit is the floor, counted from the ground."""
    number, floor, module = re.fullmatch(r"(\d\d)_(\w+)\.(\w+)", path.stem).groups()
    assert FLOORS.index(floor) == int(number[0])
    assert re.findall(r"#\| default_exp (\w+\.\w+)", path.read_text("utf-8")) == [f"{floor}.{module}"]


@pytest.mark.parametrize("path", BOOK, ids=name_of)
def test_notebook_imports_only_lower_numbers(path):
    number = {other.stem.split("_")[1]: other.stem.split("_")[0] for other in BOOK}
    imports = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spinereg")]
    names = {f"{node.module}.{alias.name}".split(".", 1)[1] for node in imports for alias in node.names}
    modules = {module for module in number for name in names if name == module or name.startswith(f"{module}.")}
    assert {name.split(".")[0] for name in names} == {module.split(".")[0] for module in modules}, "import from the module that defines a name"
    assert all(number[module] < path.stem.split("_")[0] for module in modules), modules


@pytest.mark.parametrize("path", APPS, ids=name_of)
def test_d6_app_has_one_cell_of_plain_commented_parameters(path):
    """D6: without the tag papermill ignores every parameter silently; plain values are what it can replace and check."""
    tagged = [source(cell) for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    statements = ast.parse(tagged[0]).body
    assert all(isinstance(line, ast.Assign | ast.AnnAssign) for line in statements)
    names = [getattr(line, "target", None) or line.targets[0] for line in statements]
    assert "out_dir" in {name.id for name in names}
    for line in statements:
        ast.literal_eval(line.value)
        assert "#" in tagged[0].splitlines()[line.end_lineno - 1], f"say what `{ast.unparse(line)}` means, in a comment behind it"


@pytest.mark.parametrize("path", [path for path in APPS if path.stem != "samples"], ids=name_of)
def test_d6_app_checks_all_that_papermill_set(path):
    """D6: papermill sets any name it is given; the app hands all names over before it does anything."""
    calls = [ast.unparse(node) for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    assert len([call for call in calls if call.startswith("given_parameters(globals(), ")]) == 1


@pytest.mark.parametrize("path", APPS, ids=name_of)
def test_app_defines_no_function(path):
    assert not [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)]


# the package


def test_e1_the_package_imports_without_the_tools_that_made_it():
    """E1, E2: neither the exporter nor MONAI (6 s of CPU) nor a viewer is imported with any module of the package."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES if path.stem != "_modidx"]
    names = [name.removesuffix(".__init__") for name in names]
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]; print(*{name.split('.')[0] for name in sys.modules})"
    done = python("-c", code, *names, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not {"nbdev", "fastcore", "execnb", "monai", "itkwidgets", "ipyniivue", "pytest"} & set(done.stdout.split())


def test_the_public_face_is_small_and_every_name_is_there():
    """`spinereg.<tab>` shows what users call; nothing of it is imported before it is asked for."""
    assert set(dir(spinereg)) == {*spinereg.__all__, "__version__"}
    for name in spinereg.__all__:
        assert getattr(spinereg, name).__module__ == f"spinereg.{spinereg.PUBLIC[name]}"
    named = set(re.findall(r"`(\w+)\(", (ROOT / "README.md").read_text("utf-8")))
    assert {"SliceViewer", "view3d", "TrainingMonitor"} <= named <= set(spinereg.__all__)
    done = python("-c", "import sys, spinereg; print(*sys.modules)", cwd=ROOT)
    assert not {"torch", "numpy", "spinereg.space"} & set(done.stdout.split())


def test_e1_every_requirement_is_bounded_below_and_above():
    """E1: an install does not break with time."""
    for need in requirements("requirements", *(f"{extra}_requirements" for extra in extras() - {"dev"})):
        bounds = {spec.operator for spec in need.specifier}
        assert "==" in bounds or {">=", "<"} <= bounds, str(need)


def test_e1_constraints_pin_every_requirement_within_its_bounds():
    """E1: the versions known to work together are versions that settings.ini allows."""
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert list(pins) == sorted(pins)
    for need in requirements("requirements", *(f"{extra}_requirements" for extra in extras())):
        assert need.specifier.contains(pins[canonicalize_name(need.name)], prereleases=True), str(need)


def test_shapes_in_signatures_are_checked_while_the_tests_run():
    """A shape that contradicts the signature must raise here; if not, .pytest.ini no longer switches the checks on."""
    with pytest.raises(TypeCheckError):
        transform_points(np.eye(4), torch.zeros(5, 2))


def test_version_is_one():
    version = settings()["version"]
    assert f'__version__ = "{version}"' in (ROOT / "spinereg/__init__.py").read_text("utf-8")
    assert re.search(rf"(?m)^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text("utf-8"))
    assert re.search(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8")).group(1) == version


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A folder as pip would fill it: the wheel, built from a plain checkout and unpacked."
    top = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for folder in ("nbs", "spinereg"):
        shutil.copytree(ROOT / folder, top / "checkout" / folder, ignore=ignore)
    for name in ("settings.ini", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, top / "checkout")
    done = python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(top), str(top / "checkout"))
    assert done.returncode == 0, done.stderr
    (wheel,) = top.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(top / "site")
    return top / "site"


@pytest.fixture(scope="module")
def metadata(site):
    "What the wheel says of itself."
    return Parser().parsestr(next(site.glob("*.dist-info/METADATA")).read_text("utf-8"))


def test_wheel_carries_modules_and_apps_and_needs_no_tools(site, metadata):
    """E1: unpacked elsewhere, `spinereg.apps.paths` finds the notebooks."""
    held = {path.relative_to(site / "spinereg").as_posix() for path in (site / "spinereg").rglob("*") if path.is_file()}
    carried = [*MODULES, *(ROOT / "spinereg/interactive/static").iterdir()]
    assert held == {path.relative_to(ROOT / "spinereg").as_posix() for path in carried} | {f"notebooks/{path.name}" for path in APPS}
    needed = {Requirement(line).name for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert needed == {need.name for need in requirements("requirements")}
    code = "from spinereg.apps.paths import apps; print(*(path for path in apps().values()), sep='\\n')"
    found = python("-c", code, cwd=site).stdout.split()
    assert [Path(path) for path in found] == [site / "spinereg/notebooks" / path.name for path in APPS]


def test_every_extra_that_is_offered_can_be_installed(metadata):
    """What README, an app or an error message says after `pip install` is an extra of the built package, with all its requirements."""
    texts = [path.read_text("utf-8") for path in (ROOT / "README.md", ROOT / "Makefile", *MODULES, *NOTEBOOKS)]
    offered = set(re.findall(r"(?:spinereg|\.)\[(\w+)\]\\?[\"']", "".join(texts)))
    assert {"dev", "elastix", "itkwidgets", "viewers"} <= offered <= set(metadata.get_all("Provides-Extra"))
    for extra in offered:
        needs = {str(Requirement(line.split(";")[0])) for line in metadata.get_all("Requires-Dist") if f'extra == "{extra}"' in line}
        assert needs == {str(need) for need in requirements(f"{extra}_requirements")}


# the README and its two commands


def test_readme_points_at_files_that_exist_and_commands_that_are_there():
    """E3: every link, picture and make target named in README.md exists; its Python compiles."""
    text = re.sub(r"(?s)<!--.*?-->", "", (ROOT / "README.md").read_text("utf-8"))
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (ROOT / link).exists(), link
    targets = set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text("utf-8")))
    assert {"run", "test"} <= set(re.findall(r"(?m)^make (\w+)", text)) <= targets
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(block, "README.md", "exec")


def test_readme_and_makefile_name_only_parameters_that_an_app_has():
    """D6: a parameter in a documented command line is one that an app knows, where the line names the app, that one."""
    tagged = {app.stem: [source(cell) for cell in cells(app) if "parameters" in cell["metadata"].get("tags", [])][0] for app in APPS}
    known = {name: set(re.findall(r"(?m)^(\w+)", text)) for name, text in tagged.items()}
    text = ((ROOT / "README.md").read_text("utf-8") + (ROOT / "Makefile").read_text("utf-8")).replace("\\\n", " ")
    for line in text.splitlines():
        named = re.search(r"nbs/apps/(\w+)\.ipynb", line)
        allowed = known[named.group(1)] if named else set().union(*known.values())
        assert set(re.findall(r"(?:-p |given,)(\w+)[ ,]", line)) - {"name"} <= allowed, line


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["run", "test"])
def test_second_call_installs_nothing(tmp_path, target):
    """Once the stamps are newer than settings.ini, setup.py and constraints.txt, no pip line is left to run."""
    command = ["make", "--dry-run", target, f"VENV={tmp_path.as_posix()}", "CASE=data"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for stamp in (".python", ".run", ".test"):
        (tmp_path / stamp).touch()
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "pip install" in first
    assert "pip install" not in second
