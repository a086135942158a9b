"""The record of one structural stage: a line of `stages.jsonl`, made of plain values."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lit_prune.errors import InputError
from lit_prune.structure import Cost
from lit_prune.train.stages import Stage

POINTS = ("dense", "dense_recalibrated", "before", "after_surgery", "after_recalibration", "after_repair")
FIELDS = ("stage", "name", "epoch", "metric", "macs", "params", "widths", "seconds", "plan", "protocol", "distillation")


def open_record(index: int, stage: Stage, dense: dict[str, Any], figure_before: float) -> dict[str, Any]:
    """What is known before the cut.

    Args:
        index: number of the stage, from 0.
        stage: what it removes, and when.
        dense: figures of the dense network: metric (name, mode, number of images), value, recalibrated, macs, params.
        figure_before: of the network as it comes into the stage.
    """
    return {
        "stage": index,
        "name": stage.name,
        "epoch": stage.epoch,
        "metric": dense["metric"],
        "macs": {"dense": dense["macs"]},
        "params": {"dense": dense["params"]},
        dense["metric"]["name"]: {
            "dense": dense["value"],
            "dense_recalibrated": dense["recalibrated"],
            "before": figure_before,
            "after_repair": math.nan,
        },
        "widths": {},
        "seconds": {"repair": 0.0},
    }


def figures_of(record: dict[str, Any]) -> dict[str, float]:
    """The figures of a record, by the points at which they were measured."""
    return record[record["metric"]["name"]]


def check_metric_name(name: str) -> None:
    """Raises InputError where a monitor is called like another field of the record."""
    if not name:
        raise InputError("monitor: it has no name; give the key that validation logs, or leave it out")
    if name in FIELDS:
        raise InputError(f"monitor: {name!r} is the name of a field of stages.jsonl; log the figure under another key")


def note_cost(record: dict[str, Any], counted: Cost, point: str) -> None:
    """Adds the cost and the widths `before` or `after` the cut; a layer that goes has the width 0 after it."""
    record["macs"][point], record["params"][point] = counted.macs, counted.params
    for name, layer in counted.layers.items():
        record["widths"].setdefault(name, {"before": 0, "after": 0})[point] = layer.out_channels


def describe_record(record: dict[str, Any]) -> str:
    """What a stage did, in a sentence for the terminal."""
    figures, macs, name = figures_of(record), record["macs"], record["metric"]["name"]
    shown = {key: format_figure(name, value) for key, value in figures.items()}
    return (
        f"epoch {record['epoch']}: stage {record['name']} · MACs {macs['before'] / 1e6:.1f} M → "
        f"{macs['after'] / 1e6:.1f} M ({macs['after'] / macs['dense']:.0%} of dense) · "
        f"{name} {shown['before']} → after surgery {shown['after_surgery']} → "
        f"recalibrated {shown['after_recalibration']}"
    )


def format_figure(name: str, value: float) -> str:
    """A figure for the terminal: accuracies in percent."""
    return f"{value:.2%}" if "acc" in name and 0 <= value <= 1 else f"{value:.4g}"


def check_done(records: Sequence[Mapping[str, Any]], stages: Sequence[Stage]) -> None:
    """Refuses a run whose stages that are done are not those of its configuration.

    Raises:
        InputError: the first that differs is named.
    """
    if len(records) > len(stages):
        raise InputError(f"stages: {len(records)} are done already, the configuration has {len(stages)}")
    for record, stage in zip(records, stages, strict=False):
        done, asked = record["protocol"]["stage"], plain(stage.to_dict())
        changed = [key for key in {**done, **asked} if done.get(key) != asked.get(key)]
        if changed:
            raise InputError(
                f"stage {record['name']} at epoch {record['epoch']} is done, with {changed[0]}={done.get(changed[0])}; "
                "only those that are not done can be corrected"
            )


def plain(value: Any) -> Any:
    """Tuples as lists: checkpoints load with weights_only, JSON knows no tuples."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
