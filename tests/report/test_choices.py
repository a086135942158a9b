"""What the stages chose between, in the table and on the first screen."""

import json
import shutil

import pytest

from lit_prune.report.choices import tabulate_choices
from lit_prune.report.run_folder import AbsentInput, RunFolder
from lit_prune.report.verdict import find_verdict

INFORMATION = {"layer1.0": 0.25, "layer2.0": 0.31, "layer2.1": 0.5}
SCORES = {"layer1.0.conv1": {"removed": [0.1, 0.2, 0.3], "kept": [0.3, 0.7, 2.0]}}


@pytest.fixture
def run(full_run, tmp_path):
    """Factory of the made-up run with notes in the plans of its two stages."""

    def make(blocks: dict, channels: dict) -> RunFolder:
        folder = shutil.copytree(full_run, tmp_path / "run")
        stages = [json.loads(line) for line in (folder / "stages.jsonl").read_text().splitlines()]
        for stage, notes in zip(stages, (blocks, channels), strict=True):
            stage["plan"]["notes"] = notes
            stage["protocol"]["stage"] = {"score": "composite_ix"} if stage["name"] == "channels" else {}
        (folder / "stages.jsonl").write_text("".join(json.dumps(stage) + "\n" for stage in stages))
        return RunFolder(folder)

    return make


def shown(run: RunFolder) -> list[tuple[str, ...]]:
    return [tuple(cell.text for cell in row) for row in tabulate_choices(run).rows]


def test_a_block_has_its_information_on_the_side_where_it_ended(run):
    notes = {"information": INFORMATION, "protected": {"layer2.0": "changes shape"}}
    assert shown(run(notes, {})) == [
        ("blocks", "layer1.0", "label information", "kept", "–", "0.25 nats"),
        ("blocks", "layer2.0", "changes shape", "kept", "–", "0.31 nats"),
        ("blocks", "layer2.1", "label information", "dropped", "0.5 nats", "–"),
    ]


def test_a_group_has_the_scores_of_what_went_and_stayed_and_a_protected_one_its_reason(run):
    found = run({}, {"method": "composite_ix", "scores": SCORES, "protected": {"linear": "it is the output"}})
    (cut, whole) = tabulate_choices(found).rows
    assert [cell.text for cell in cut] == ["channels", "layer1.0.conv1", "composite_ix", "16 → 11", "0.2", "0.7"]
    assert [cell.note for cell in cut[4:]] == ["0.1 to 0.3", "0.3 to 2"]
    assert [cell.text for cell in whole] == ["channels", "linear", "it is the output", "kept", "–", "–"]


def test_the_first_screen_says_by_what_numbers_was_chosen(run):
    found = run({"information": INFORMATION}, {"scores": SCORES})
    said = " ".join(find_verdict(found).removed)
    assert "least label information first (0.5 nats went, 0.25 to 0.31 stayed)" in said
    assert "ranked by composite_ix (group medians: 0.2 went, 0.7 stayed)" in said


def test_a_run_from_before_scores_were_recorded_has_no_such_table(run):
    with pytest.raises(AbsentInput):
        tabulate_choices(run({}, {}))
