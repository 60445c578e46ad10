"""Several runs over the same cases: what is done again and what is not, what a failure costs, what an interval means."""

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from spinereg.compare.elastix import register_elastix
from spinereg.compare.evaluation import compare_runs, evaluate_runs, interval, is_done, read_run
from spinereg.learning.cases import find_cases
from spinereg.registration.register import register

ROOT = Path(__file__).resolve().parent.parent
RIGID = {"method": "rigid", "spacing_mm": 4.0, "prealign": "header"}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    for name in ("easy_0", "clinical_0"):
        shutil.copytree(ROOT / "data_samples/test" / name, folder / "test" / name)
    return folder


@pytest.fixture(scope="module")
def evaluated(cases):
    return cases / "out", evaluate_runs(cases, {"rigid": RIGID}, cases / "out")


def test_every_figure_of_the_result_files_is_in_the_tables(evaluated):
    """C5, C13: per case and per vertebra, in memory and as CSV; pre-alignment alone is perfectly rigid and folds nowhere."""
    out, (rows, vertebrae, summary) = evaluated
    assert set(rows.case) == {"easy_0", "clinical_0"} and set(rows.run) == {"rigid"}
    wanted = ["dice", "hd95_mm", "assd_mm", "n_missing", "rigid_dice", "residual_rms_mean_mm", "volume_change_max_percent", "tre_bone_p95_mm"]
    wanted += ["tre_soft_tissue_mean_mm", "tre_bone_below_2mm_percent", "folding_percent", "sdlogj", "sdlogj_l2r", "ndv_percent", "inverse_p99_mm"]
    assert rows[wanted].notna().all().all()
    assert rows.residual_rms_max_mm.max() < 1e-6 and rows.folding_percent.max() == 0 and rows.rigid_dice.min() == 1
    np.testing.assert_allclose(rows.tre_bone_mean_mm, rows.tre_bone_start_mean_mm, rtol=1e-9)
    assert {"residual_p95_mm", "oc", "pc", "dice", "angle_deg"} <= set(vertebrae) and set(vertebrae.case) == set(rows.case)
    pd.testing.assert_frame_equal(pd.read_csv(out / "cases.csv"), rows, check_dtype=False)
    assert summary.loc[("dice", "rigid"), "mean"] == pytest.approx(rows.dice.mean()) and (out / "runs.png").stat().st_size > 10_000


def test_d7_what_is_done_is_not_done_again_unless_something_changed(evaluated, cases):
    """D7: other parameters, a newer input: done again; otherwise kept."""
    (case,) = [case for case in find_cases(cases, "test")[0] if case.name == "easy_0"]
    folder = evaluated[0] / "rigid/easy_0"
    given = case.files() | RIGID
    assert is_done(given, register, folder) and is_done(given | {"moving": Path(case.moving)}, register, folder)
    assert not is_done(given | {"spacing_mm": 5.0}, register, folder)
    assert not is_done({name: value for name, value in given.items() if name != "method"}, register, folder), "another method"
    assert not is_done(given, register, folder.with_name("nowhere"))
    assert not is_done({name: value for name, value in given.items() if name != "method"}, register_elastix, folder)
    later = (folder / "metrics.json").stat().st_mtime + 10
    os.utime(case.moving, (later, later))
    assert not is_done(given, register, folder)


def test_d7_a_case_that_fails_does_not_stop_the_others(tmp_path):
    """D7: its row says why."""
    for name in ("easy_0", "clinical_0"):
        shutil.copytree(ROOT / "data_samples/test" / name, tmp_path / "test" / name)
    ct = tmp_path / "test/clinical_0/ct.nii.gz"
    ct.write_bytes(ct.read_bytes()[:5000])
    rows, vertebrae, _ = evaluate_runs(tmp_path, {"rigid": RIGID}, tmp_path / "out")
    failed = rows.set_index("case").loc["clinical_0"]
    assert "clinical_0/ct.nii.gz" in failed.error and "cut off" in failed.error
    assert np.isfinite(rows.set_index("case").loc["easy_0"].dice) and set(vertebrae.case) == {"easy_0"}


def test_when_every_registration_fails_the_reason_is_told(cases, tmp_path):
    with pytest.raises(RuntimeError, match="every registration failed.*smoothness"):
        evaluate_runs(cases, {"typo": {"smoothness": 1}}, tmp_path)
    with pytest.raises(FileNotFoundError, match="no <case>/metrics.json"):
        evaluate_runs(cases, {"typo": str(tmp_path / "nowhere")}, tmp_path)


def test_a_folder_of_results_stands_beside_a_run(evaluated, cases, tmp_path):
    rows, _, summary = evaluate_runs(cases, {"there": str(evaluated[0] / "rigid")}, tmp_path)
    pd.testing.assert_frame_equal(rows.drop(columns="run"), evaluated[1][0].drop(columns="run"))
    assert not list(tmp_path.glob("there*"))
    with pytest.raises(FileNotFoundError, match="no <case>/metrics.json"):
        read_run(tmp_path)


def test_interval_agrees_with_the_normal_one_for_many_values():
    """Against mean +- 1.96 s / sqrt(n); missing values are left out; a single value has no width."""
    values = np.random.default_rng(0).normal(5, 2, 400)
    mean, low, high = interval(np.r_[values, np.nan])
    half = 1.96 * values.std(ddof=1) / 20
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - half, abs=0.15 * half) and high == pytest.approx(mean + half, abs=0.15 * half)
    assert interval([3.0, 3.0]) == (3.0, 3.0, 3.0) and np.isnan(interval([np.nan])[0])
    assert interval([3.0])[0] == 3.0 and np.isnan(interval([3.0])[1:]).all(), "one case says nothing about others"


def test_runs_are_compared_case_by_case():
    """C5: cases differ far more than the runs do; the paired difference sees the runs all the same."""
    hard = np.random.default_rng(0).normal(10, 5, 8)
    gains = np.array([0.4, 0.5, 0.6, 0.5, 0.45, 0.55, 0.5, 0.5])
    rows = pd.DataFrame({"run": ["a"] * 8 + ["b"] * 8, "case": list("stuvwxyz") * 2, "tre": np.r_[hard, hard - gains]})
    table = compare_runs(rows, ["tre", "absent"], "a")
    b = table.loc[("tre", "b")]
    assert b.difference == pytest.approx(-0.5) and -0.6 < b.difference_low < b.difference_high < -0.4 and b.beyond_chance
    assert b.low < table.loc[("tre", "a"), "mean"] < b.high and not table.loc[("tre", "a"), "beyond_chance"]


def test_a_wrong_baseline_is_refused(cases, tmp_path):
    with pytest.raises(ValueError, match="baseline='best': expected one of rigid"):
        evaluate_runs(cases, {"rigid": RIGID}, tmp_path, baseline="best")
