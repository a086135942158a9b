"""Merging of event files and the step-to-epoch map."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lit_prune.report.event_files import find_curve, read_scalars, steps_to_epochs


def test_resumed_run_has_every_step_once_with_its_latest_value(made_up, full_run: Path):
    scalars = read_scalars(full_run / "tensorboard")
    loss = scalars["val/loss"]
    assert loss["step"].tolist() == [(epoch + 1) * made_up.STEPS - 1 for epoch in range(made_up.EPOCHS)]
    shift = np.array([0.001] * 5 + [0.0] * 5)  # the first file's epochs 5 and 6 were overwritten by the second's
    expected = [made_up.scalar_at(epoch + 1)["val/loss"] for epoch in range(made_up.EPOCHS)] + shift
    np.testing.assert_allclose(loss["value"], expected, rtol=1e-6)


def test_order_of_file_names_does_not_decide(made_up, tmp_path: Path):
    made_up.write_events(tmp_path / "b_first", 0, 3, shift=0.5)  # older wall times than the shiftless file
    made_up.write_events(tmp_path / "a_second", 1, 3)
    values = read_scalars(tmp_path)["train/loss"]["value"]
    expected = [
        made_up.scalar_at(1)["train/loss"] + 0.5,
        made_up.scalar_at(2)["train/loss"],
        made_up.scalar_at(3)["train/loss"],
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_event_file_cut_off_in_a_record_keeps_the_records_before_it(made_up, tmp_path: Path):
    made_up.write_events(tmp_path, 0, 6)
    file = next(tmp_path.glob("events*"))
    file.write_bytes(file.read_bytes()[:-9])
    scalars = read_scalars(tmp_path)
    assert len(scalars["val/loss"]) == 6 and len(scalars["epoch"]) == 5


def test_folder_without_event_files_has_no_scalars(tmp_path: Path):
    assert read_scalars(tmp_path / "absent") == {}


def test_epoch_end_steps_map_to_finished_epochs_and_steps_between_are_linear():
    scalars = {"epoch": pd.DataFrame({"step": [4, 9, 14, 19], "value": [0.0, 0.0, 1.0, 1.0]})}
    steps = np.array([9, 19, 14, 4])
    np.testing.assert_allclose(steps_to_epochs(steps, scalars), [1.0, 2.0, 1.5, 0.5])


def test_epoch_is_unknown_without_its_tag():
    assert steps_to_epochs(np.array([1]), {}) is None


@pytest.mark.parametrize("tags, found", [(("a/x_step", "a/x_epoch"), "a/x_epoch"), (("a/x", "a/x_epoch"), "a/x")])
def test_curve_prefers_the_plain_tag_then_the_epoch_mean(tags: tuple[str, ...], found: str):
    scalars = {tag: pd.DataFrame({"step": [0], "value": [float(i)]}) for i, tag in enumerate(tags)}
    assert find_curve(scalars, "a/x") is scalars[found]
    assert find_curve(scalars, "b/x") is None
