"""The benchmarks that nobody runs every day still run."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))  # as for a script that is started there
import gpu


def test_gpu_benchmark_is_rehearsed_on_the_cpu(tmp_path, capsys):
    """Every item on small images; a second call measures what is missing alone; nothing is begun without the time for it."""
    gpu.main([str(tmp_path), "--device", "cpu", "--small"])
    table, rows = (tmp_path / "table.md").read_text("utf-8"), json.loads((tmp_path / "rows.json").read_text("utf-8"))
    sections = ("Registration", "Training step", "Slowest kernels", "Fields of two runs", "Monitor of a training")
    assert [line for line in table.splitlines() if line.startswith("## ")] == [f"## {section}" for section in sections]
    assert "| the CPU | 0 | 0 | 0 | 0 |" in table
    kept = rows["rows"] | {"Training step: bf16": {"section": "Training step", "left out": "OutOfMemoryError: none left"}}
    (tmp_path / "rows.json").write_text(json.dumps(rows | {"rows": kept}), "utf-8")
    capsys.readouterr()
    gpu.main([str(tmp_path), "--device", "cpu", "--small", "--minutes", "0"])
    begun = [line for line in capsys.readouterr().out.splitlines() if " s left: " in line]
    assert len(begun) == 1 and "Training step: bf16: left out takes about 10 s" in begun[0]
    assert "## Left out\n\n- Training step: bf16" in (tmp_path / "table.md").read_text("utf-8")
