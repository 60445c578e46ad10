"""What all tests share: the same examples and random numbers in every run, and a JupyterLab in a browser.

Hypothesis draws the same examples in every run, so that a change alone turns a check red; HYPOTHESIS_PROFILE=default draws new ones.
"""

import os
import re

import browser
import pytest
import torch
from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def same_numbers():
    "Random numbers of torch that are the same in every run, whatever ran before."
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    "A folder that all workers of one run see; who makes something in it holds a lock."
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    "JupyterLab's server and a headless Chromium, for the tests of one file."
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if browser.CHROMIUM is None:
        pytest.skip("no Chromium found: apt-get install chromium")
    playwright.expect.set_options(timeout=60_000)
    with browser.jupyterlab(tmp_path_factory.mktemp("jupyterlab")) as server, playwright.sync_playwright() as driver:
        yield server, driver.chromium.launch(executable_path=browser.CHROMIUM, args=browser.FLAGS)


@pytest.fixture
def lab(chromium, request, record_property):
    "A fresh tab; its pictures land in out/browser, and nothing it shows may have asked for an address outside 127.0.0.1."
    server, application = chromium
    folder = browser.ROOT / "out/browser"
    folder.mkdir(parents=True, exist_ok=True)

    def shot(page, what):
        path = folder / f"{re.sub(r'[^a-z0-9]+', '-', request.node.name.lower()).strip('-')}-{what}.png"
        page.screenshot(path=path)
        record_property("screenshot", str(path))
        print(path)

    with application.new_context(viewport={"width": 1280, "height": 900}) as context:
        tab = browser.Lab(context.new_page(), server, shot, browser.offline(context))
        yield tab
        tab.shot("end")
        tab.close()
        assert not tab.tried
