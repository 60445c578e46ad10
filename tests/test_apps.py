"""Every app notebook runs through papermill with its defaults, on data_samples, into a temporary folder."""

from pathlib import Path

import papermill
import pytest

ROOT = Path(__file__).resolve().parent.parent
APPS = sorted((ROOT / "nbs/apps").glob("*.ipynb"))


@pytest.mark.parametrize("path", APPS, ids=[path.stem for path in APPS])
def test_app_runs_on_data_samples_and_leaves_a_small_notebook(path, tmp_path):
    """D4: the executed notebook is at most 5 MB. What an app computes is the subject of the module tests."""
    executed = tmp_path / path.name
    papermill.execute_notebook(path, executed, parameters={"out_dir": str(tmp_path / "out")}, cwd=ROOT, kernel_name="python3", progress_bar=False)
    assert executed.stat().st_size <= 5_000_000
    assert any((tmp_path / "out").iterdir())
