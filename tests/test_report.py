"""The page of a batch: every planned job is on it whatever became of it, what it says is what was measured, and no text in it is more than text."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import time
from html.parser import HTMLParser
from urllib.parse import quote

import browser
import numpy as np
import pandas as pd
import pytest
import torch
from batches import copy_result, finished, plan, record, registered
from PIL import Image
from scipy import stats
from test_hostile import CLIMBING, NAMES, Tags, one_line

from spinereg.apps import report
from spinereg.apps.report import cohort_of, gather, write_report
from spinereg.compare.evaluation import FIGURES, best_setting, compare_settings, holm
from spinereg.compare.jobs import read_batch
from spinereg.files.problems import InputError
from spinereg.measure.pictures import CORONAL, SAGITTAL, Overview, cut
from spinereg.measure.planes import COLUMNS, ROWS, box_size, draw_planes, plane_size
from spinereg.registration.certainty import Doubt
from spinereg.registration.report import verdict
from spinereg.space.geometry import Grid


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "A result of ours."
    return registered(tmp_path_factory.mktemp("one"))


def folds(metrics):
    metrics |= {"verdict": "FAIL", "doubts": ["the map folds"]}
    metrics["verdicts"] = [{"reason": "the map folds", "value": 17, "threshold": 0, "concerns": "whole"}]


@pytest.fixture
def batch(one, tmp_path):
    "Jobs of every fate; the plan begins with the good one."
    out = tmp_path / "night"
    names = "good", "folded", "cut", "later", "damaged", "torn", "own", "empty", "running", "stopped", "outdated", "lost", "odd"
    plan(out, [("", name) for name in names])
    finished(one, out / "good")
    finished(one, out / "folded", folds)
    record(out / "cut", status="failed", stage="read", error="moving ct.nii.gz: it was cut off", hint="Copy it again.")
    finished(one, out / "damaged")
    (out / "damaged/metrics.json").write_text("{}")
    (out / "torn").mkdir()
    (out / "torn/job.json").write_text('{"status": "done", "app"')
    record(out / "own", app="/home/me/count.ipynb")
    said = {"lesions": 3, "name": "x", "volume": np.inf, "big": 10**400, "verdict": 5, "doubts": {"a": 1}}
    (out / "own/metrics.json").write_text(json.dumps(said))
    record(out / "empty")
    for status in ("running", "stopped", "outdated"):
        record(out / status, status=status, stage="optimise")
    record(out / "lost", status="running")
    os.utime(out / "lost/job.json", (0, time.time() - 200))
    record(out / "odd", app=["?"], status="done", parameters=3, code="x", inputs=[1], seconds="long", error=None, attempts=True)
    return out


def test_every_planned_job_has_its_row(batch, one):
    """D7, C13: in the order of the plan; a damaged one, or one of another app, costs no other its row."""
    cases, vertebrae = read_batch(batch)
    assert list(cases.columns[:8]) == ["setting", "case", "status", "verdict", "stage", "error", "hint", "reasons"]
    rows = cases.set_index("case")
    verdicts = dict.fromkeys(("own", "odd", "later", "running", "stopped", "outdated"), "UNJUDGED")
    verdicts["good"] = json.loads((one / "metrics.json").read_text())["verdict"]
    assert rows.verdict.to_dict() == {name: verdicts.get(name, "FAIL") for name in rows.index}
    assert rows.status[["cut", "later", "running", "good"]].tolist() == ["failed", "not begun", "running", "done"]
    assert "no sign of life for 120 s" in rows.error["lost"] and rows.hint["lost"] == "Run the batch again."
    cohort = cohort_of(gather(batch, embed=False), [""])
    assert cohort["unfinished"] == "1 not begun, 1 running, 1 stopped, 1 outdated" and "optimise" not in cohort["stages"]
    assert (rows.hint["cut"], rows.error["cut"], rows.stage["cut"]) == ("Copy it again.", "moving ct.nii.gz: it was cut off", "read")
    assert "metrics.json has 2 bytes" in rows.error["damaged"] and "no JSON" in rows.error["torn"] and "no metrics.json" in rows.error["empty"]
    assert rows.reasons["folded"] == "the map folds" and rows.lesions["own"] == 3
    assert np.isnan(rows.volume["own"] if "volume" in rows else np.nan) and np.isnan(rows.job_seconds["odd"])
    table = pd.read_csv(one / "vertebrae.csv")
    assert set(vertebrae.case) == {"good", "folded"} and rows.error_max_mm["good"] == pytest.approx(table.error_mm.max())
    assert rows.n_doubted["good"] == table.doubt.notna().sum() and rows.job_seconds["good"] == 35.2


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "not there"), ("[", "no JSON"), ("[]", "no names"), ('{"format": "other"}', "'other'"), ('{"format": "spinereg-batch-1"}', "jobs")]
    + [('{"format": "spinereg-batch-1", "jobs": [["a"]]}', "no list of")]
    + [('{"format": "spinereg-batch-1", "jobs": [["", "a"], ["", "a"]]}', "twice")],
)
def test_a_folder_without_a_plan_is_refused(tmp_path, text, said):
    """D7: which file, what was found, what to do; nothing is written."""
    if text is not None:
        (tmp_path / "batch.json").write_text(text)
    with pytest.raises(InputError, match=f"batch.json.*{said}"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


class Page(HTMLParser):
    "The scripts and styles of a page, its policy and its links."

    def __init__(self, text):
        super().__init__()
        self.raw, self.open, self.policy, self.attributes = {}, None, "", set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.attributes |= attrs.keys()
        if attrs.get("http-equiv") == "Content-Security-Policy":
            self.policy = attrs["content"]
        if tag in ("script", "style"):
            self.open = attrs.get("id", tag)
            self.raw[self.open] = ""

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, text):
        if self.open:
            self.raw[self.open] += text

    def detail(self, case):
        "What is told of a case."
        number = [row[1] for row in json.loads(self.raw["data"])["cases"]].index(case)
        return json.loads(self.raw[f"detail-{number}"])


def test_the_page_and_its_tables(batch, one):
    """C13: failures first, with stage, error and hint; pictures of the result itself; links to what is there; figures as in the tables."""
    page = Page(write_report(batch).read_text("utf-8"))
    data, tables = json.loads(page.raw["data"]), {name: pd.read_csv(batch / f"{name}.csv") for name in ("cases", "vertebrae", "settings")}
    order = [report.VERDICTS.index(row[2]) for row in data["cases"]]
    assert order == sorted(order) and [row[1] for row in data["cases"]] == tables["cases"].case.tolist() and len(order) == 13
    assert tables["settings"].set_index("figure").loc["dice", "mean"] == pytest.approx(tables["cases"].dice.mean())
    cut, good = page.detail("cut"), page.detail("good")
    assert [cut[name] for name in ("stage", "error", "hint")] == ["read", "moving ct.nii.gz: it was cut off", "Copy it again."]
    assert base64.b64decode(good["picture"]) == (one / "planes.webp").read_bytes() and cut["picture"] is None
    assert all((batch / link).is_file() for _, link in good["links"]) and {"job.json", "vertebrae.csv"} <= {name for name, _ in good["links"]}
    assert page.detail("folded")["reasons"] == [{"reason": "the map folds", "value": 17, "threshold": 0, "concerns": "whole"}]
    assert good["parameters"] == {"fixed": "/data/good/mr.nii.gz"} and data["parameters"] == {"spacing_mm": 4.0}
    shown = dict(zip(data["columns"], data["cases"][[row[1] for row in data["cases"]].index("good")][6:]))
    assert shown["dice"] == pytest.approx(tables["cases"].set_index("case").dice["good"], rel=1e-4)


def test_a_page_can_be_written_again_and_a_table_in_the_way_is_told(batch):
    """D7: as jobs are done, the same page is written anew; what cannot be written is an error with its path."""
    first = write_report(batch)
    finished_now = len(read_batch(batch)[0])
    assert write_report(batch) == first and len(pd.read_csv(batch / "cases.csv")) == finished_now
    (batch / "settings.csv").unlink()
    (batch / "settings.csv").mkdir()
    with pytest.raises(OSError, match="settings.csv"):
        write_report(batch)


def test_nothing_but_the_page_itself_may_run(batch):
    """F-hostile: the policy names the hashes of the one script and the one style, and allows no address; no attribute of the markup runs anything."""
    page = Page(write_report(batch).read_text("utf-8"))
    for kind in ("script", "style"):
        own = "sha256-" + base64.b64encode(hashlib.sha256(page.raw[kind].encode()).digest()).decode()
        assert f"{kind}-src '{own}';" in page.policy
    assert page.policy.startswith("default-src 'none';") and "img-src data:;" in page.policy and "unsafe" not in page.policy
    assert not any(name.startswith("on") or name in ("style", "src") for name in page.attributes)
    text = page.raw["script"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|fetch\(|XMLHttpRequest|https?:", text)


def test_names_and_texts_are_text(one, tmp_path):
    """F-hostile: cases and settings of every name, and what damaged or spiteful files say: the page has the elements of its template only."""
    out, evil = tmp_path / NAMES[4], NAMES[2]
    jobs = [(setting, name) for setting in (NAMES[0], NAMES[7]) for name in NAMES]
    plan(out, [*jobs, *((NAMES[0], name) for name in CLIMBING if name)])

    def spoil(metrics):
        folds(metrics)
        metrics["doubts"], metrics["verdicts"][0]["reason"], metrics["environment"] = [evil, "\udcff"], evil, {evil: evil}

    for setting, name in jobs:
        finished(one, out / setting / name, spoil, parameters={evil: [evil]}, inputs={evil: {"size": evil, "sha256": None}}, host=evil)
    for name in NAMES:
        (out / NAMES[0] / NAMES[1] / f"{name[:20]}.ipynb").touch()
    record(out / NAMES[7] / NAMES[3], status="failed", stage=evil, error="\udcff" + evil, hint="-->")
    text = write_report(out).read_text("utf-8")
    page, plain = Page(text), tmp_path / "plain"
    plan(plain, [("a", "b"), ("c", "b")])
    kinds = Tags(write_report(plain).read_text("utf-8")).kinds
    assert Tags(text).kinds <= kinds | {"figure", "figcaption", "svg", "g", "title", "line", "rect", "circle", "text", "details", "summary"} | {
        "ul", "b", "small", "table", "thead", "tbody"
    }
    data = json.loads(page.raw["data"])
    assert {row[1] for row in data["cases"]} >= {*NAMES} and {row[0] for row in data["cases"]} == {NAMES[0], NAMES[7]}
    assert one_line(NAMES[0]) in {one_line(word) for word in Tags(text).words} or NAMES[0] in text or "&lt;img" in text
    for row in data["cases"]:
        detail = page.detail(row[1])
        assert all(re.fullmatch(r"\./[\w.%~-]+/[\w.%~-]+/[\w.%~-]+", link) and "/../" not in link for _, link in detail["links"])
    assert not [row for row in data["cases"] if row[1] in ("..", "../climb") and row[2] != "FAIL"]
    assert set(pd.read_csv(out / "cases.csv", keep_default_na=False).case) >= {*NAMES}


# settings side by side


def two_settings(n=9, seed=0):
    rng = np.random.default_rng(seed)
    hard = rng.gamma(3, 1, n)
    gains = {"a": 0 * hard, "b": rng.normal(-0.3, 0.2, n), "c": rng.normal(0, 0.3, n)}
    rows = [{"setting": s, "case": k, "tre_bone_mean_mm": e, "dice": 1 - e / 20} for s, by in gains.items() for k, e in enumerate(hard + by)]
    return pd.DataFrame(rows)


def test_comparison_agrees_with_scipy():
    """C5: means, differences case by case, the signed-rank test, and its correction by hand; shuffled rows change nothing."""
    cases = two_settings()
    table, wide = compare_settings(cases, ["tre_bone_mean_mm", "dice"], "a"), cases.pivot(index="case", columns="setting", values="tre_bone_mean_mm")
    own = table.loc["tre_bone_mean_mm"]
    p = {name: stats.wilcoxon(wide[name], wide.a).pvalue for name in "bc"}
    assert own.p[["b", "c"]].to_dict() == pytest.approx(p) and np.isnan(own.p["a"])
    small, large = sorted(p.values())
    assert sorted(own.p_holm[["b", "c"]]) == pytest.approx([min(2 * small, 1), max(min(2 * small, 1), large)])
    assert own.difference.to_dict()["b"] == pytest.approx((wide.b - wide.a).mean())
    mixed = pd.concat([cases[cases.setting == name].sample(frac=1, random_state=1) for name in "abc"])
    columns = ["cases", "mean", "difference", "p", "p_holm"]
    pd.testing.assert_frame_equal(compare_settings(mixed, ["tre_bone_mean_mm", "dice"], "a")[columns], table[columns])


def test_holm_keeps_the_chance_of_a_false_alarm():
    """C5: of 2000 families of six true null hypotheses, one in twenty holds a rejection; without the correction one in four."""
    p = np.random.default_rng(0).uniform(size=(2000, 6))
    corrected = np.array([holm(row) for row in p])
    assert (corrected >= p).all() and 0.035 < (corrected.min(1) < 0.05).mean() < 0.065 and (p.min(1) < 0.05).mean() > 0.2


def test_the_best_setting_is_best_on_the_same_cases():
    """C5: landmarks decide before Dice; a setting that gives up on the hard cases does not win by that."""
    cases = two_settings()
    best, wide = best_setting(cases), cases.pivot(index="case", columns="setting", values="tre_bone_mean_mm")
    assert best.setting == wide.mean().idxmin() == "b" and best.apart and best.p == pytest.approx(stats.wilcoxon(wide.b, wide[best.next]).pvalue)
    hardest = wide.a.nlargest(4).index
    lazy = cases[~((cases.setting == "c") & cases.case.isin(hardest))]
    assert lazy[lazy.setting == "c"].tre_bone_mean_mm.mean() < lazy[lazy.setting == "b"].tre_bone_mean_mm.mean()
    assert best_setting(lazy).setting == "b" and best_setting(lazy).n == 5
    assert best_setting(cases.assign(tre_bone_mean_mm=np.nan)).figure == "dice" and best_setting(cases[cases.setting == "a"]) is None


def test_the_page_says_which_setting_is_best(one, tmp_path):
    """C5: by name, with what separates it from the next; the baseline is the first setting of the plan."""
    plan(tmp_path, [(setting, f"case {k}") for setting in ("first", "second") for k in range(6)])
    for setting, gain in (("first", 0.0), ("second", 0.5)):
        for k in range(6):

            def change(metrics, gain=gain, k=k):
                for group in metrics["landmarks"]:
                    group["mean_mm"] = 3 + k / 10 - gain - 0.01 * k * gain

            finished(one, tmp_path / setting / f"case {k}", change, setting=setting)
    text = write_report(tmp_path).read_text("utf-8")
    said = one_line(re.sub("<[^>]*>", "", text[text.index("Settings compared") : text.index("All figures")]))
    assert "second is best by tre_bone_mean_mm" in said and "does not contain zero" in said and "differences to first" in said
    settings = pd.read_csv(tmp_path / "settings.csv").set_index(["figure", "setting"])
    assert settings.loc[("tre_bone_mean_mm", "second"), "difference"] < -0.5 and settings.loc[("tre_bone_mean_mm", "second"), "p"] == 2 / 64


# verdicts


def test_one_rule_for_verdicts():
    """C13: one doubt about the whole is a failure, any other a warning."""
    part, whole = Doubt("L3 is hardly alike", 0.1, 0.2, whole=False), Doubt("the map folds", 3, 0)
    assert [verdict(each) for each in ([], [part], [whole], [part, whole])] == ["PASS", "WARN", "FAIL", "FAIL"]


def test_verdicts_of_a_result_say_value_and_limit(one):
    """C13: `metrics.json` holds the verdict, the words as before, and what was measured against which limit."""
    metrics, table = json.loads((one / "metrics.json").read_text("utf-8")), pd.read_csv(one / "vertebrae.csv", index_col=0)
    assert [each["reason"] for each in metrics["verdicts"]] == metrics["doubts"] and metrics["verdict"] in ("WARN", "FAIL")
    for name, row in table[table.doubt.notna()].iterrows():
        (told,) = [each for each in metrics["verdicts"] if each["reason"] == f"{name} is {row.doubt}"]
        assert told["concerns"] == "part" and told["value"] == pytest.approx(row.doubt_value, rel=1e-4)
        assert told["threshold"] == pytest.approx(row.doubt_limit, rel=1e-4)


# pictures


def test_tiles_lie_on_one_another():
    """C13: in every row the four tiles have one frame; a voxel is at one pixel in all of them, right, front and top where a reader expects them."""
    grid = Grid((20, 30, 50), np.diag([2.0, 2.0, 2.0, 1]))
    volume = torch.zeros(grid.shape)
    volume[12:16, 20:24, 35:39] = 1.0  # to the right of the middle, in front, high up
    view = Overview(grid, volume, volume, volume, None, None, (), 1 + 0.5 * volume)._replace(labels=None)
    place = (13, 21, 36)
    sheet = np.asarray(draw_planes(view._replace(labels=(volume > 0).int(), labels_before=(volume > 0).int(), names=("L1",))))
    width, height = box_size(view)
    assert sheet.shape == (3 * height, 4 * width, 3)
    boxes = sheet.reshape(3, height, 4, width, 3).transpose(0, 2, 1, 3, 4).astype(int)
    for row, plane in enumerate(ROWS):
        across, up = plane_size(view, plane)
        left, top = (width - across) // 2, (height - up) // 2
        x = left + across * (1 - (place[plane.across] + 1) / grid.shape[plane.across])
        y = top + up * (1 - (place[plane.up] + 1) / grid.shape[plane.up])
        for column, name in enumerate(COLUMNS):
            spot = boxes[row, column, round(y) - 12 : round(y) - 9, round(x) - 12 : round(x) - 9].mean((0, 1))
            assert spot[0] > 90 if name == "jacobian" else spot.min() > 200, (plane.name, name, spot)
        frames = [(box.max(-1) > 0)[:, left : left + across].any() for box in boxes[row]]
        assert all(frames) and np.array_equal(boxes[row, 0], boxes[row, 2])
    assert cut(volume, SAGITTAL, 13).any() and cut(volume, CORONAL, 21).any()


def test_the_picture_of_a_result_is_small(one):
    """C13: 200 of them fit into a page of 25 MB."""
    data = (one / "planes.webp").read_bytes()
    assert len(data) < 90_000 and Image.open(io.BytesIO(data)).format == "WEBP"
    assert "planes.webp" in json.loads((one / "manifest.json").read_text("utf-8"))["files"]


def test_a_result_without_pictures_or_of_an_older_version_is_shown(one, tmp_path):
    """D7: no verdict is made up for it; its doubts are told."""
    plan(tmp_path, [("", "old")])

    def older(metrics):
        folds(metrics)
        del metrics["verdict"], metrics["verdicts"]

    copy_result(one, tmp_path / "old", older, files=("metrics.json", "vertebrae.csv"))
    record(tmp_path / "old")
    page = Page(write_report(tmp_path).read_text("utf-8"))
    (row,) = json.loads(page.raw["data"])["cases"]
    assert row[2] == "UNJUDGED" and row[4] == "the map folds" and page.detail("old")["picture"] is None


# in a browser

SHOWN = "() => document.getElementById('shown').textContent"
TILE = """([box, column]) => {
    const canvas = document.querySelectorAll('#planes canvas')[box], other = document.createElement('canvas')
    Object.assign(other, {width: canvas.width, height: canvas.height})
    const {width, height} = canvas
    other.getContext('2d').drawImage(picture, column * width, box * height, width, height, 0, 0, width, height)
    return canvas.toDataURL() === other.toDataURL()
}"""


@pytest.fixture(scope="module")
def chromium_alone():
    "A headless Chromium."
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if browser.CHROMIUM is None:
        pytest.skip("no Chromium found: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=browser.CHROMIUM, args=browser.FLAGS)


@pytest.fixture
def tab(chromium_alone):
    "A tab in which nothing may be refused by the policy, fail, or ask for an address."
    complaints = []
    with chromium_alone.new_context(viewport={"width": 1440, "height": 900}, accept_downloads=True) as context:
        tried, page = browser.offline(context), context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page
        assert not complaints and not tried


def visit(tab, path):
    "Open a page and wait until it can be used; seconds."
    tab.goto(path.as_uri())
    tab.wait_for_selector("html[data-ready]")
    return tab.evaluate("performance.now()") / 1000


def open_case(tab, name):
    tab.locator("#table").get_by_role("link", name=name, exact=True).click()
    tab.wait_for_selector("#planes[data-ready]")


def test_flicker_and_keys(one, tmp_path, tab):
    """C13: one case after the other by keys; fixed, before and moved take one another's place, pixel for pixel as in the result's picture."""
    plan(tmp_path, [("", name) for name in ("a", "b", "c")])
    finished(one, tmp_path / "a")
    finished(one, tmp_path / "b", folds)
    finished(one, tmp_path / "c")
    visit(tab, write_report(tmp_path))
    names = tab.locator("#table tbody a").all_text_contents()
    open_case(tab, names[0])
    title = tab.locator("#case-title")
    assert tab.evaluate(SHOWN) == "moved" and all(tab.evaluate(TILE, [box, 2]) for box in range(3))
    for key, held, column in ((" ", "fixed", 0), ("b", "before", 1)):
        tab.keyboard.down(key)
        assert tab.evaluate(SHOWN) == held and all(tab.evaluate(TILE, [box, column]) for box in range(3))
        tab.keyboard.up(key)
        assert tab.evaluate(SHOWN) == "moved"
    tab.locator("#planes canvas").first.hover()
    assert tab.evaluate(SHOWN) == "fixed" and tab.evaluate(TILE, [0, 0])
    tab.mouse.move(1400, 890)
    for key, name in zip("1243", ("fixed", "before", "det J", "moved")):
        tab.keyboard.press(key)
        assert tab.evaluate(SHOWN) == name
    for key, name in (("ArrowRight", names[1]), ("j", names[2]), ("j", names[2]), ("k", names[1]), ("ArrowLeft", names[0])):
        tab.keyboard.press(key)
        tab.wait_for_function("name => document.getElementById('case-title').textContent === name", arg=name)
    assert title.evaluate("node => node === document.activeElement") and tab.locator("img").count() == 0
    tab.keyboard.press("?")
    assert tab.locator("#keys").is_visible()
    tab.keyboard.press("Escape")
    assert tab.locator("#keys").is_hidden() and tab.locator("#case").is_visible()
    tab.keyboard.press("Escape")
    tab.wait_for_selector("#table", state="visible")
    assert tab.evaluate("document.activeElement.textContent") == names[0]


def judged(tab, tmp_path, name):
    "Export the judgements; the file."
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Export CSV").click()
    download.value.save_as(tmp_path / name)
    return tmp_path / name


def test_judging_is_kept_exported_and_compared(one, tmp_path, tab):
    """C13: keys judge, u takes back, a reload and a file keep it; two readers are compared by Cohen's kappa; formulas stay text in a spreadsheet."""
    out, names = tmp_path / "out", ["=1+1", 'quo"ted, name', *(f"case {k}" for k in range(8))]
    plan(out, [("", name) for name in names])
    for name in names:
        finished(one, out / name)
    page = write_report(out)
    visit(tab, page)
    tab.locator("#reader").fill("Ann")
    tab.locator("#reader").blur()
    order = tab.locator("#table tbody a").all_text_contents()
    open_case(tab, order[0])
    for k, key in enumerate("pfapfapfap"):
        tab.wait_for_function("name => document.getElementById('case-title').textContent === name", arg=order[k])
        tab.keyboard.press(key)
        tab.keyboard.press("j")
    tab.keyboard.press("u")  # the last one is taken back, and judged anew
    assert tab.locator("#judge [aria-pressed=true]").count() == 0
    tab.keyboard.press("f")
    tab.keyboard.press("r")
    tab.keyboard.type("=p, f and\na")
    tab.keyboard.press("Escape")
    assert tab.locator("#judge [aria-pressed=true]").inner_text().startswith("fail")
    visit(tab, page)
    tab.keyboard.press("Escape")
    ann = judged(tab, tmp_path, "ann.csv")
    table = pd.read_csv(ann, keep_default_na=False).set_index("case")
    assert list(table.columns) == ["setting", "verdict", "judgement", "remark", "reader", "time"] and set(table.reader) == {"Ann"}
    words = dict(zip("pfa", ("pass", "fail", "artefact")))
    assert table.judgement.tolist() == [words[key] for name in table.index for key in ["pfapfapfaf"[order.index(name.removeprefix("'"))]]]
    assert "'=1+1" in table.index and 'quo"ted, name' in table.index and "'=p, f and\na" in table.remark.tolist()
    # the other reader: another opinion on three cases
    other = pd.read_csv(ann, keep_default_na=False)
    other.loc[:2, "judgement"] = other.judgement[:3].map({"pass": "fail", "fail": "artefact", "artefact": "pass"})
    other.assign(reader="Bob").to_csv(tmp_path / "bob.csv", index=False)
    tab.locator("#agree").set_input_files([ann, tmp_path / "bob.csv"])
    tab.wait_for_selector("#agreement li")
    one_by, two_by = table.judgement.to_numpy(), other.judgement.to_numpy()
    chance = sum((one_by == word).mean() * (two_by == word).mean() for word in words.values())
    said = tab.locator("#agreement").inner_text()
    assert "agree on 7 of 10" in said and f"kappa {(0.7 - chance) / (1 - chance):.2f}" in said and tab.locator("#agreement li").count() == 3
    tab.evaluate("localStorage.clear()")
    visit(tab, page)
    tab.locator("#import").set_input_files(ann)
    tab.wait_for_function("() => document.getElementById('said').textContent.startsWith('10 judgements')")
    again = judged(tab, tmp_path, "again.csv")
    assert again.read_bytes() == ann.read_bytes()
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    tab.locator("#import").set_input_files(tmp_path / "wrong.csv")
    tab.wait_for_function("() => document.getElementById('said').textContent.includes('no column case')")


def test_hostile_names_are_read_and_not_run(one, tmp_path, tab):
    """F-hostile: in the table, on the page of a case, in its links and its picture."""
    plan(tmp_path, [("", name) for name in NAMES])
    for name in NAMES:
        finished(one, tmp_path / name, error=name, parameters={name: name}, host=name)
    visit(tab, write_report(tmp_path))
    assert {one_line(text) for text in tab.locator("#table tbody a").all_text_contents()} == {one_line(name) for name in NAMES}
    for number in range(len(NAMES)):
        tab.evaluate("number => { location.hash = `case-${number}` }", number)
        tab.wait_for_selector(f"#planes[data-ready='{number}']")
    assert tab.evaluate("window.ran") is None and tab.locator("img, main input[autofocus], svg[onload]").count() == 0
    with tab.expect_popup() as popup:
        tab.get_by_role("link", name="job.json").click()
    assert popup.value.url.startswith(tmp_path.as_uri()) and popup.value.url.endswith("job.json") and "100" not in popup.value.title()
    assert json.loads(popup.value.locator("body").inner_text())["host"] in NAMES


def write_many(folder, n, of):
    "The page of a batch of a job that is done and one that has not begun, as if there were n jobs, all of them like one of the two but the last."
    embed, names = n <= report.EMBEDDED, [f"case {k:05}" for k in range(n)]
    few = report.gather(folder, embed)
    at = {name: few.cases.case.tolist().index(name) for name in ("one", "later")}
    which = [at[of]] * (n - 1) + [at["one"]]
    details = [dict(few.details[k]) for k in which]
    for name, detail in zip(names, details):
        detail["links"] = [(file, link.replace("/one/", f"/{quote(name)}/")) for file, link in detail["links"]]
    cases = few.cases.iloc[which].reset_index(drop=True).assign(case=names)
    many = report.Gathered(cases, few.vertebrae, details, few.shared)
    path, comparison = folder / "report.html", compare_settings(cases, FIGURES, "")
    path.write_text(report.render(many, comparison, folder, [("", name) for name in names], [""]), "utf-8", newline="\n")
    shutil.copytree(folder / "one", folder / names[-1])
    return path


def open_many(one, folder, tab, capsys, count, last):
    "A page of many cases, and the seconds until it can be used."
    plan(folder, [("", "one"), ("", "later")])
    finished(one, folder / "one")
    path = write_many(folder, count, last)
    seconds = min(visit(tab, path) for _ in range(3))
    with capsys.disabled():
        print(f"\n{count} cases: {path.stat().st_size / 1e6:.1f} MB, usable after {seconds:.2f} s")
    return path, seconds


def test_a_page_of_two_hundred_cases(one, tmp_path, tab, capsys):
    """D7: at most 25 MB, usable within two seconds; only the picture of the case that is open is decoded."""
    path, seconds = open_many(one, tmp_path, tab, capsys, 200, "one")
    assert path.stat().st_size < 25e6 and seconds < 2
    assert tab.locator("#table tbody tr").count() == 100 and tab.locator("img").count() == 0
    tab.get_by_role("button", name="Next rows").click()
    assert tab.locator("#count").inner_text() == "101 to 200 of 200"
    tab.locator("#search").fill("case 0007")
    assert tab.locator("#table tbody tr").count() == 10
    tab.get_by_role("button", name="case", exact=True).click()
    tab.get_by_role("button", name="case", exact=True).click()
    assert tab.locator("#table tbody a").first.inner_text() == "case 00079" and tab.locator("th[aria-sort=descending]").count() == 1


def test_a_page_of_ten_thousand_cases_reads_its_pictures_from_the_folders(one, tmp_path, tab, capsys):
    """D7: usable within two seconds; above a thousand jobs pictures are files beside the page, and the page says so."""
    path, seconds = open_many(one, tmp_path, tab, capsys, 10_000, "later")
    assert seconds < 2 and "read from the folders beside it" in tab.locator("#overview").inner_text()
    tab.locator("#search").fill("case 09999")
    open_case(tab, "case 09999")
    assert tab.evaluate("picture.src.startsWith('file:') && picture.naturalWidth > 0")


def test_a_judgement_holds_for_the_result_that_was_seen(one, tmp_path, tab):
    """A case that is done again is to be judged again, and told so; what was said of others stays, also when cases are added."""
    out = tmp_path / "out"
    plan(out, [("", "again"), ("", "same")])
    for name in ("again", "same"):
        finished(one, out / name)
    visit(tab, write_report(out))
    for name in ("again", "same"):
        open_case(tab, name)
        tab.keyboard.press("p")
        tab.keyboard.press("Escape")
    plan(out, [("", "again"), ("", "same"), ("", "new")])
    record = json.loads((out / "again/job.json").read_text())
    (out / "again/job.json").write_text(json.dumps(record | {"ended": "later"}))
    visit(tab, write_report(out))
    open_case(tab, "again")
    assert tab.locator("#judge [aria-pressed=true]").count() == 0 and "was judged pass" in tab.locator("#said").inner_text()
    tab.keyboard.press("Escape")
    open_case(tab, "same")
    assert tab.locator("#judge [aria-pressed=true]").inner_text().startswith("pass")
