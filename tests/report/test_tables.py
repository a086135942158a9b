"""Values of the tables."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from lit_prune.errors import InputError
from lit_prune.report import result_table
from lit_prune.report.page import tabulate_protocol
from lit_prune.report.run_folder import RunFolder
from lit_prune.report.tables import (
    ABSENT,
    ACCURACY,
    COSTS,
    format_bytes,
    format_count,
    format_percent,
    result_cells,
    summarise_plan,
    tabulate_stages,
)


def test_result_rows_hold_exactly_the_values_of_the_json(made_up):
    result = made_up.result_record()
    rows = result_cells(result).rows
    entries = [result["dense"], *result["stages"], result["compact"]]
    assert [row[0].text for row in rows] == ["dense", "after blocks", "after channels", "compact"]
    for row, entry in zip(rows, entries, strict=True):
        assert [json.loads(cell.exact) for cell in row[1:]] == [entry[q.key] for q in (ACCURACY, *COSTS)]


def test_changes_are_points_for_accuracy_and_percent_of_dense_for_the_rest():
    dense = {"accuracy": 0.9, "macs": 1000, "params": 10, "latency_ms": 2.0, "throughput": 100.0, "bytes": 0}
    compact = {"accuracy": 0.885, "macs": 500, "params": 10, "latency_ms": 1.5, "throughput": 250.0, "bytes": 5}
    notes = [cell.note for cell in result_cells({"dense": dense, "compact": compact}).rows[-1][1:]]
    assert notes == ["−1.50 pt", "−50.0 %", "±0.0 %", "−25.0 %", "+150.0 %", ""]


@pytest.mark.parametrize("value", [None, math.nan])
def test_what_was_not_measured_is_a_dash_without_a_change(made_up, value: float | None):
    result = made_up.result_record()
    result["compact"]["latency_ms"] = value
    cell = result_cells(result).rows[-1][4]
    assert (cell.text, cell.note) == (ABSENT, "")


def test_result_without_compact_network_is_an_input_error():
    with pytest.raises(InputError, match="no object compact"):
        result_cells({"dense": {}})


def test_formats_round_to_the_shown_digits():
    assert [format_count(n) for n in (999, 1000, 40_813_184, 4.1e9)] == ["999", "1.00 k", "40.81 M", "4.10 G"]
    assert [format_bytes(n) for n in (12, 1_082_000)] == ["12 B", "1.08 MB"]
    assert format_percent(0.91728) == "91.73 %"


def test_terminal_table_is_the_same_for_a_folder_and_its_report_and_fits_80_columns(made_up, full_run: Path):
    texts = []
    for source in (full_run, made_up.result_record()):
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(result_table(source))
        texts.append(console.export_text().splitlines()[1:])
    assert texts[0] == texts[1]
    text = "\n".join(texts[0])
    assert all(shown in text for shown in ("85.12 %", "−0.37 pt", "5.10 M", "−58.9 %", "4,015 /s", "after channels"))
    assert "…" not in text


def test_folder_without_result_is_an_input_error(tmp_path: Path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="compact/report.json"):
        result_table(tmp_path)


def test_stages_table_has_each_measured_accuracy(made_up, full_run: Path):
    table = tabulate_stages(RunFolder(full_run))
    assert table.columns == ("stage", "blocks", "channels")
    by_title = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    for key in ("dense", "after_surgery", "after_recalibration", "after_repair"):
        expected = [format_percent(stage["accuracy"][key]) for stage in made_up.stage_records()]
        assert by_title[f"accuracy {key.replace('_', ' ')}"] == expected
    assert by_title["time"] == ["65 s", "65 s"]


def test_plan_summary_counts_blocks_and_only_the_groups_that_are_cut(made_up):
    keep = {name: list(range(n)) for name, n in made_up.CUT.items()} | {"conv1": list(range(16))}
    plan = {"drop_blocks": ["layer2.1"], "keep_channels": keep, "sizes": made_up.WIDTHS}
    total = sum(made_up.WIDTHS[name] for name in made_up.CUT)
    expected = (
        f"1 block dropped: layer2.1; {sum(made_up.CUT.values())} of {total} channels kept in {len(made_up.CUT)} groups"
    )
    assert summarise_plan(plan) == expected
    assert summarise_plan({}) == "nothing removed"


def test_protocol_flattens_and_shortens(full_run: Path):
    fields = {row[0].text: row[1].text for row in tabulate_protocol(RunFolder(full_run)).rows}
    assert fields["versions.torch"] == "2.9" and fields["seed"] == "1"
    assert fields["calibration_indices"] == "0, 1, 2, 3, 4, 5, 6, 7, … (512 values)"
    assert fields["stage channels: score"] == "composite_ix"
