"""Several settings over the same cases: what the tables say, what an interval and a difference mean."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from spinereg.compare.evaluation import compare_settings, interval, read_run
from spinereg.learning.cases import find_cases
from spinereg.registration.register import register

ROOT = Path(__file__).resolve().parent.parent
RIGID = {"method": "rigid", "spacing_mm": 4.0, "prealign": "header"}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    "Two cases by their pre-alignment alone."
    out = tmp_path_factory.mktemp("out")
    for case in find_cases(ROOT / "data_samples", "test")[0]:
        register(**case.files(), **RIGID, out_dir=out / case.name)
    return out, *read_run(out)


def test_every_figure_of_the_result_files_is_in_the_tables(evaluated):
    """C5, C13: per case and per vertebra; pre-alignment alone is perfectly rigid and folds nowhere."""
    _, rows, vertebrae = evaluated
    assert set(rows.case) == {"easy_0", "clinical_0"}
    wanted = ["dice", "hd95_mm", "assd_mm", "n_missing", "rigid_dice", "residual_rms_mean_mm", "volume_change_max_percent", "tre_bone_p95_mm"]
    wanted += ["tre_soft_tissue_mean_mm", "tre_bone_below_2mm_percent", "folding_percent", "sdlogj", "sdlogj_l2r", "ndv_percent", "inverse_p99_mm"]
    assert rows[wanted].notna().all().all()
    assert rows.residual_rms_max_mm.max() < 1e-6 and rows.folding_percent.max() == 0 and rows.rigid_dice.min() == 1
    np.testing.assert_allclose(rows.tre_bone_mean_mm, rows.tre_bone_start_mean_mm, rtol=1e-9)
    assert {"residual_p95_mm", "oc", "pc", "dice", "angle_deg"} <= set(vertebrae) and set(vertebrae.case) == set(rows.case)
    summary = compare_settings(rows.assign(setting="rigid"), ["dice"], "rigid")
    assert summary.loc[("dice", "rigid"), "mean"] == pytest.approx(rows.dice.mean())


def test_a_folder_without_results_is_refused(tmp_path):
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


def test_settings_are_compared_case_by_case():
    """C5: cases differ far more than the settings do; the paired difference sees the settings all the same."""
    hard = np.random.default_rng(0).normal(10, 5, 8)
    gains = np.array([0.4, 0.5, 0.6, 0.5, 0.45, 0.55, 0.5, 0.5])
    rows = pd.DataFrame({"setting": ["a"] * 8 + ["b"] * 8, "case": list("stuvwxyz") * 2, "tre": np.r_[hard, hard - gains]})
    table = compare_settings(rows, ["tre", "absent"], "a")
    b = table.loc[("tre", "b")]
    assert b.difference == pytest.approx(-0.5) and -0.6 < b.difference_low < b.difference_high < -0.4 and b.beyond_chance
    assert b.low < table.loc[("tre", "a"), "mean"] < b.high and not table.loc[("tre", "a"), "beyond_chance"]
    with pytest.raises(ValueError, match="baseline='best': expected one of 'a', 'b'"):
        compare_settings(rows, ["tre"], "best")
