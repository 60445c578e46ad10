"""The documentation site: built from the notebooks without a warning, whole, and without a network."""

import inspect
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import browser
import pytest
from filelock import FileLock

import spinereg
from spinereg.apps.help import meanings

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
LOADED = {("script", "src"), ("img", "src"), ("source", "src"), ("iframe", "src"), ("link", "href")}
NEEDED = ("sphinx", "myst_nb", "furo", "sphinx-mathjax-offline")
pytestmark = pytest.mark.skipif(not all(map(find_spec, NEEDED)), reason='the site needs the extra docs: pip install ".[docs]"')


class Page(HTMLParser):
    "What a page links to, what it loads, and the places in it that can be linked to."

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.ids = set(), set(), set()
        self.text = path.read_text("utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.add(value)
            if name in ("href", "src"):
                self.links.add(value)
            if (tag, name) in LOADED and ("rel", "canonical") not in attrs:
                self.loaded.add(value)


@pytest.fixture(scope="module")
def site(shared):
    "The site, built once from a copy of the notebooks, by the first of several workers; a warning is an error."
    top = shared / "docs"
    with FileLock(f"{top}.lock"):
        return top / "site" if (top / "site/index.html").exists() else build(top)


def build(top):
    shutil.rmtree(top, ignore_errors=True)
    shutil.copytree(NBS, top / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "_proc", "pages"))
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-c", NBS, "-d", top / "doctrees"]
    done = subprocess.run([*command, top / "nbs", top / "built"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return (top / "built").rename(top / "site")


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}


def test_e3_every_notebook_is_a_page_that_the_sidebar_leads_to(pages):
    """E3: the front page links to each of them, and to the promises, the README and the reference."""
    wanted = {path.relative_to(NBS).with_suffix(".html").as_posix() for path in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    wanted |= {"promises.html", "pages/readme.html", "pages/api.html", "pages/changelog.html", "pages/contributing.html"}
    sidebar = pages["index.html"].text.split('<div class="sidebar-tree">')[1].split('<div class="main">')[0]
    assert wanted <= pages.keys()
    assert wanted - {"index.html"} <= set(re.findall(r'href="([^"#]+)"', sidebar))


def test_e3_every_link_within_the_site_leads_somewhere(site, pages):
    """E3: files, pages, and the places in pages."""
    broken = []
    for name, page in pages.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme or address.netloc or link == "#":
                continue
            target = (site / name).parent / unquote(address.path) if address.path else site / name
            other = pages.get(target.resolve().relative_to(site.resolve()).as_posix())
            if not target.is_file() or address.fragment and other and unquote(address.fragment) not in other.ids:
                broken.append((name, link))
    assert not broken


def test_e3_no_page_loads_anything_from_elsewhere(site, pages):
    """E3: scripts, pictures and styles lie in the site; MathJax is one of them."""
    assert not {link for page in pages.values() for link in page.loaded if urlsplit(link).scheme not in ("", "data") or link.startswith("//")}
    styles = "".join(path.read_text("utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"url\(\s*[\"']?(?:https?:)?//[^)]*|@import[^;]*//[^;]*", styles)
    assert "_static/tex-svg.js" in {link.split("?")[0] for link in pages["index.html"].loaded}


@pytest.mark.parametrize("name", [name for name in spinereg.__all__ if inspect.isfunction(getattr(spinereg, name))])
def test_e3_the_reference_tells_every_parameter(pages, name):
    """E3: a public function has an entry with the meaning of each of its parameters, and the page of the API leads to it."""
    full = f"spinereg.{spinereg.PUBLIC[name]}.{name}"
    (link,) = [link for link in pages["pages/api.html"].links if link.endswith(f"#{full}")]
    entry = pages[f"pages/{link.split('#')[0]}"].text.split(f'id="{full}"')[1].split('<dl class="py')[0]
    said = plain(re.sub("<[^>]+>", "", entry))
    for parameter, meaning in meanings(getattr(import_module(f"spinereg.{spinereg.PUBLIC[name]}"), name)).items():
        assert parameter == "return" or plain(parameter) in said and plain(meaning) in said, (parameter, meaning)


def plain(text):
    "A text by its letters alone, without what typesetting changes."
    return re.sub(r"&\w+;|&#\w+;|[^A-Za-z0-9]", "", text)


def test_e3_equations_are_drawn_without_a_network(site):
    """E3: in a browser that reaches nothing, the front page has formulas and asks for no address."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if browser.CHROMIUM is None:
        pytest.skip("no Chromium found: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=browser.CHROMIUM, args=browser.FLAGS).new_page()
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "index.html").as_uri())
        page.wait_for_selector("mjx-container svg", timeout=60_000)
        assert page.locator("mjx-merror").count() == 0
        assert page.locator("img").evaluate_all("pictures => pictures.every(picture => picture.alt)")
        assert not [url for url in asked if browser.ELSEWHERE.match(url)]
