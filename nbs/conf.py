"""The documentation site: `make docs` turns the notebooks beside this file into pages, as they are, and reads what they define for the reference."""

import inspect
import json
import re
import warnings
from collections.abc import Iterator
from configparser import ConfigParser
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten

import spinereg
from spinereg.apps.help import meanings, say_kind

HERE = Path(__file__).parent
ROOT = HERE.parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(ROOT / "settings.ini", encoding="utf-8")
about = config["DEFAULT"]

project, author, copyright, release = about["title"], about["author"], about["copyright"], about["version"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
exclude_patterns = ["**/.ipynb_checkpoints", "_proc", "out"]

# notebooks: shown as they are stored; a widget needs a kernel, so that its text or picture is shown
smartquotes_action = "De"  # dashes, and no quotes: texts between them are to be copied
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}
nb_render_markdown_format = "myst"
nb_code_prompt_show = nb_code_prompt_hide = "Code of this cell"
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

# reference: names and defaults in the signature, types and meanings below it
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True, "undoc-members": True}
add_module_names = False
warnings.filterwarnings("ignore", "Unknown section")  # fastcore reads docstrings that a method inherits
toc_object_entries_show_parents = "hide"

# pages: nothing in them is loaded from elsewhere; MathJax is a file of the package that pip installs
html_theme = "furo"
html_title = f"{project} {release}"
html_baseurl = f"{about['doc_host']}{about['doc_baseurl']}/"
html_static_path = ["_static", str(Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax/tex-svg.js")]
html_css_files, html_js_files = ["site.css"], ["site.js"]
html_copy_source = False
mathjax_path = "tex-svg.js"

FLOORS = {}  # "0_space": the stems of its notebooks, in their order
for path in sorted(HERE.glob("[0-9]*.ipynb")):
    FLOORS.setdefault(f"{path.name[0]}_{re.split('[_.]', path.name)[1]}", []).append(path.stem)

CONTENTS = f"""
```{{toctree}}
:hidden:

README <pages/readme>
promises
```

```{{toctree}}
:caption: Tutorials
:hidden:
:glob:

tutorials/*
```

```{{toctree}}
:caption: Apps
:hidden:
:glob:

apps/*
```

```{{toctree}}
:caption: Floors
:hidden:
:glob:

pages/[0-9]*
```

```{{toctree}}
:caption: More
:hidden:

pages/api
pages/changelog
pages/contributing
Repository <{about["git_url"]}>
```
"""


def subtitle(stem: str) -> str:
    "What a notebook says of itself below its title."
    return "".join(json.loads((HERE / f"{stem}.ipynb").read_text("utf-8"))["cells"][0]["source"]).split("\n\n")[1].lstrip("> ")


def floor_page(floor: str) -> str:  # "0_space"
    "What a floor is for, its notebooks, and the reference of its modules."
    number, name = floor.split("_")
    stems = FLOORS[floor]
    lines = [f"# {number} {name}", inspect.getdoc(import_module(f"spinereg.{name}"))]
    lines += ["```{toctree}", ":hidden:", *(f"../{stem}" for stem in stems), "```"]
    lines += ["| notebook | subject |", "|---|---|", *(f"| [{stem.split('_', 1)[1]}](../{stem}.ipynb) | {subtitle(stem)} |" for stem in stems), ""]
    modules = ", ".join(f"[{module}](api/{name}.{module}.md)" for module in lessons(floor))
    return "\n".join([*lines, f"Reference: {modules}"])


def lessons(floor: str) -> dict[str, str]:  # "0_space"
    "Each module of a floor, with the notebook that defines it, or that says it tells of one that is written by hand; in the order of these."
    found = {}
    for path in (ROOT / "spinereg" / floor.split("_")[1]).glob("[!_]*.py"):
        named = (stem for stem in FLOORS[floor] if stem.endswith(f".{path.stem}") or path.name in (HERE / f"{stem}.ipynb").read_text("utf-8"))
        found[path.stem] = next(named)
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def module_page(name: str, module: str, stem: str) -> str:  # "space", "geometry", "00_space.geometry"
    "All that a module defines."
    lines = [f"# {name}.{module}", f"[The notebook](../../{stem}.ipynb) explains and checks it."]
    return "\n".join([*lines, "```{eval-rst}", f".. automodule:: spinereg.{name}.{module}", "```"])


def public_page() -> str:
    "The names of `spinereg` itself, each with its first line and a link to where it is told, and the pages of all modules."
    lines = ["# API", "What most people call is in `spinereg` itself:", "", "| name | what it is |", "|---|---|"]
    for name, module in spinereg.PUBLIC.items():
        said = inspect.getdoc(getattr(import_module(f"spinereg.{module}"), name)).splitlines()[0]
        lines.append(f"| {{py:obj}}`{name} <spinereg.{module}.{name}>` | {said} |")
    lines += ["", "All else is in the modules of its floors:", "", "```{toctree}", ":maxdepth: 1", ""]
    return "\n".join([*lines, *(f"api/{floor.split('_')[1]}.{module}" for floor in FLOORS for module in lessons(floor)), "```"])


def repository_page(name: str) -> str:
    "A text of the project's top folder; what it links to is a page here, or in the repository."
    text = re.sub(r"\]\(nbs/(?!apps/\))", "](../", (ROOT / name).read_text("utf-8"))
    return re.sub(r"\]\((?!https?:|\.\./|#)", f"]({about['git_url']}/blob/{about['branch']}/", text)


def write_pages(app, config):
    "Write the pages that are made of something else."
    pages = {floor: floor_page(floor) for floor in FLOORS} | {"api": public_page()}
    pages |= {name.lower(): repository_page(f"{name}.md") for name in ("README", "CHANGELOG", "CONTRIBUTING")}
    for floor in FLOORS:
        name = floor.split("_")[1]
        pages |= {f"api/{name}.{module}": module_page(name, module, stem) for module, stem in lessons(floor).items()}
    folder = Path(app.srcdir) / "pages"
    (folder / "api").mkdir(parents=True, exist_ok=True)
    for path in folder.rglob("*.md"):
        if path.relative_to(folder).with_suffix("").as_posix() not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")


def prepare_notebook(app, docname, content):
    "Directives of the exporter become tags, pictures get a text in their place, and the front page the table of contents."
    if not str(app.env.doc2path(docname)).endswith(".ipynb"):
        return
    notebook, prose, front = json.loads(content[0]), "", docname == app.config.root_doc
    notebook["metadata"]["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    notebook["cells"] = [cell for cell in notebook["cells"] if "#| default_exp" not in "".join(cell["source"])]
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            prose = shorten(re.sub(r"[#>*`\n]+|!\[.*", " ", text), 150, placeholder=" ...")
            continue
        directives = re.findall(r"(?m)^#\| *(\w+)", text)
        cell["source"] = re.sub(r"(?m)^#\|.*\n?", "", text)
        tags = cell["metadata"].setdefault("tags", [])
        tags += ["export"] * ("export" in directives) + ["hide-input"] * ("hide" in directives) + ["remove-input"] * front
        cell["metadata"]["mystnb"] = {"image": {"alt": f"Picture made by this cell. {prose}"}}
    if front:
        notebook["cells"].append({"cell_type": "markdown", "id": "contents", "metadata": {}, "source": CONTENTS})
    content[0] = json.dumps(notebook)


def as_rst(text: str) -> str:
    "A comment or docstring for docutils: code between backticks, all else as it is."
    plain, *rest = re.split(r"`([^`]*)`", text)
    parts = [re.sub(r"([*_|\\<>])", r"\\\1", part) if k % 2 == 0 else f"\\ ``{part}``\\ " for k, part in enumerate([plain, *rest])]
    return "".join(parts)


def parameters_of(thing: object) -> Iterator[tuple[str, str, str]]:  # name, type, meaning
    "The fields of a class with the comments behind them, or the parameters of a function."
    if inspect.isclass(thing) and "__annotations__" in vars(thing):
        yield from re.findall(r"(?m)^    (\w+): ([^=#\n]+?)(?: = .*?)?(?:  # (.*))?$", inspect.getsource(thing))
        return
    function = vars(thing).get("__init__") if inspect.isclass(thing) else inspect.unwrap(thing)
    if hasattr(function, "__code__"):
        said = meanings(function)
        for name, parameter in inspect.signature(function if inspect.isclass(thing) else thing).parameters.items():
            if name not in ("self", "cls"):
                yield name, "" if parameter.annotation is parameter.empty else say_kind(parameter.annotation).strip("'"), said.get(name, "")


def is_own(thing: object) -> bool:
    "Whether something was written here, and not by the package of a class above it."
    return str(getattr(thing, "__module__", "spinereg")).startswith("spinereg")


def tell_parameters(app, what, name, thing, options, lines):
    "The comments behind parameters, as fields of the docstring."
    if what == "module":
        lines[:] = map(as_rst, lines)
    if what not in ("class", "exception", "function", "method") or not is_own(thing):
        return
    lines[:] = [*map(as_rst, lines), ""]
    for parameter, kind, meaning in parameters_of(thing):
        lines += [f":param {parameter}: {as_rst(meaning)}", *([f":type {parameter}: ``{kind}``"] if kind else [])]
    if not inspect.isclass(thing) and (back := inspect.signature(thing).return_annotation) not in (None, inspect.Signature.empty):
        kind = say_kind(back).strip("'")
        lines.append(f":returns: (``{kind}``) {as_rst(meanings(thing)['return'])}")
    lines.append("")


def is_beside_the_point(app, what, name, thing, skip, options):
    "Constants and fields, and what a class has from other packages."
    return skip or not (isinstance(thing, property) or callable(thing) and is_own(thing))


def setup(app):
    app.connect("config-inited", write_pages)
    app.connect("source-read", prepare_notebook)
    app.connect("autodoc-process-docstring", tell_parameters)
    app.connect("autodoc-skip-member", is_beside_the_point)
