"""The first screen: what a reader wants to know of the compact network before anything else."""

import json
import shutil

import pytest

from lit_prune.report import write_report
from lit_prune.report.run_folder import RunFolder
from lit_prune.report.verdict import find_verdict, terminal_verdict


@pytest.fixture
def run(full_run, tmp_path):
    """Factory of the made-up run with values of its result, stages and record replaced."""
    folder = tmp_path / "run"

    def make(accuracy: float = 0.8475, keep: float = 0.5, budget: str = "macs", **record):
        shutil.copytree(full_run, folder)
        report = folder / "compact" / "report.json"
        result = json.loads(report.read_text())
        result["compact"]["accuracy"] = accuracy
        report.write_text(json.dumps(result))
        lines = [json.loads(line) for line in (folder / "stages.jsonl").read_text().splitlines()]
        lines[-1]["protocol"]["stage"] = {"keep": keep, "budget": budget, "score": "composite_ix"}
        (folder / "stages.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        run_file = folder / "run.json"
        run_file.write_text(json.dumps(json.loads(run_file.read_text()) | record))
        return RunFolder(folder)

    return make


@pytest.mark.parametrize(
    ("accuracy", "level"), [(0.86, "good"), (0.8475, "good"), (0.83, "fair"), (0.80, "poor"), (None, "open")]
)
def test_the_level_follows_the_loss_of_accuracy(run, accuracy, level):
    assert find_verdict(run(accuracy)).level == level


def test_a_missed_budget_is_poor_and_said(run):
    verdict = find_verdict(run(keep=0.3))
    assert verdict.level == "poor"
    assert any("Budget missed: 30% of the MACs asked for, 41.1% left" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(("met", "level", "word"), [(True, "good", "met"), (False, "poor", "missed")])
def test_a_budget_of_time_is_judged_by_what_was_measured_at_the_cut(run, met, level, word):
    made = run(budget="latency")
    lines = [json.loads(line) for line in (made.path / "stages.jsonl").read_text().splitlines()]
    notes = {"budget": "latency", "requested": 0.5, "achieved": 0.62, "met": met, "spread": 0.04}
    lines[-1]["plan"] = {**(lines[-1].get("plan") or {}), "notes": notes}
    (made.path / "stages.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    verdict = find_verdict(RunFolder(made.path))
    assert verdict.level == level
    assert any(
        f"Budget {word}: 50% of the latency before the last cut asked for, 62.0% measured after it (±2%)" in reason
        for reason in verdict.reasons
    )


def test_the_interval_of_the_drop_is_that_of_two_independent_shares(run):
    verdict = find_verdict(run(0.80, validation={"split": "val", "images": 1000}))
    half = 196 * ((0.8512 * 0.1488 + 0.8 * 0.2) / 1000) ** 0.5
    assert f"±{half:.1f} points from 1,000 images" in verdict.reasons[0]


def test_a_bad_result_is_said_in_colour_with_a_remedy_and_a_good_one_is_not(run):
    bad = terminal_verdict(run(0.2275).path)
    assert "Warning" in bad.plain and "Repair longer" in bad.plain and "red" in str(bad.style)


@pytest.mark.parametrize(
    ("name", "mode", "values", "words"),
    [
        ("val/hits", "max", (40.0, 31.0), "val/hits got worse by more than 3%;"),
        ("val/loss", "min", (0.5, 0.7), "val/loss got worse by more than 3%;"),
        ("val/iou", "max", (0.6, 0.5), "val/iou got worse by more than 0.03;"),
    ],
)
def test_only_accuracies_are_told_in_points(run, name, mode, values, words):
    found = run(validation={"split": "val", "images": 1000})
    metric = {"metric": {"name": name, "mode": mode, "images": 1000}}
    parts = zip(("dense", "compact"), values, strict=True)
    figures = {part: found.result[part] | {name: value} for part, value in parts}
    (found.path / "compact" / "report.json").write_text(json.dumps(found.result | metric | figures))
    verdict = find_verdict(RunFolder(found.path))
    assert verdict.level == "poor" and words in " ".join(verdict.reasons) and "points" not in " ".join(verdict.reasons)


def test_a_good_result_has_no_warning(run):
    good = terminal_verdict(run(0.86).path)
    assert good.style == "green" and "Warning" not in good.plain


def test_validation_on_the_test_split_is_said(run):
    found = dict(find_verdict(run(validation={"split": "test", "images": 360})).trust)
    assert found["figures of"] == "360 images of the test split, which choices were made by too"


@pytest.mark.usefixtures("without_drawing")
def test_the_page_begins_with_the_verdict_and_says_how_the_network_is_used(run):
    folder = run(0.80).path
    page = write_report(folder).read_text()
    assert page.index('class="verdict poor"') < page.index('<section id="result"')
    assert "load_compact" in page
    assert "lit-prune export" in page


def test_a_run_without_a_compact_network_has_no_verdict(run):
    found = run()
    (found.path / "compact" / "report.json").unlink()
    assert find_verdict(RunFolder(found.path)) is None


def test_the_day_of_the_times_and_a_busy_machine_are_said(run):
    folder = run().path
    report = folder / "compact" / "report.json"
    said = {"device": "cpu (x86_64)", "threads": 1, "date": "2026-11-26T08:45:40+00:00", "load": 12.1, "cores": 2}
    report.write_text(json.dumps(json.loads(report.read_text()) | {"timing": said}))
    times = dict(find_verdict(RunFolder(folder)).trust)["times"]
    assert times == "2026-11-26, cpu (x86_64), load 12.1: too busy, measure again"
