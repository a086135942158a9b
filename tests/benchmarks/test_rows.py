"""Rows of the benchmarks and the table that `make bench` makes of them."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a script of benchmarks/ as it is when it runs."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("rows", "run_all"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


def test_every_script_keeps_the_convention(benchmark):
    others = benchmark("run_all").NO_BENCHMARKS
    scripts = {file.stem: file.read_text() for file in (ROOT / "benchmarks").glob("*.py") if file.stem not in others}
    assert {"lesions", "measure", "mechanisms", "memory", "training"} <= set(scripts)
    assert all("def rows(names" in text and text.endswith(", __doc__)\n") for text in scripts.values())


def test_a_ratio_is_the_median_of_the_ratios_of_each_turn(benchmark):
    rows = benchmark("rows")
    row = rows.ratio_row("a / b", [2.0, 9.0, 4.0, 8.0, 6.0], [1.0, 3.0, 4.0, 4.0, 3.0])  # 2, 3, 1, 2, 2
    assert (row.ratio, row.spread, row.unit) == (2.0, 0.0, "×")
    assert rows.half_range([1.0, 2.0, 3.0, 4.0, 5.0]) == 1.0 and rows.half_range([7.0]) == 0.0


def test_work_is_done_in_turns_after_a_warm_up(benchmark):
    calls = []
    taken = benchmark("rows").in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2)
    assert calls == ["a", "b"] * 3 and [len(times) for times in taken.values()] == [2, 2]


def test_a_script_run_again_replaces_its_own_lines_only(benchmark, tmp_path, monkeypatch):
    run_all, rows = benchmark("run_all"), sys.modules["rows"]
    table = tmp_path / "results.md"
    found = {"measure": [rows.Row("x / y", 1.5, 0.1)], "memory": [rows.Row("peak", 161.0, unit="MiB")]}
    monkeypatch.setattr(run_all, "run_script", lambda name, quick: found[name])
    monkeypatch.setattr(sys, "argv", ["run_all.py", "measure", "memory", "--to", str(table)])
    run_all.main()
    found["measure"] = None
    monkeypatch.setattr(sys, "argv", ["run_all.py", "measure", "--to", str(table)])
    with pytest.raises(SystemExit, match="failed: measure"):
        run_all.main()
    lines = table.read_text().splitlines()
    assert "| memory | peak | 161 MiB | ± 0 |  |" in lines and "| measure | failed | | | |" in lines
    assert not any("x / y" in line for line in lines) and "torch " in table.read_text()
