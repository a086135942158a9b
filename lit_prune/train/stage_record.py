"""The record of one structural stage: a line of `stages.jsonl`, made of plain values."""

import math
from typing import Any

from lit_prune.structure import Cost, Plan
from lit_prune.train.stages import PruningStage


def open_record(
    index: int, stage: PruningStage, dense: dict[str, Any], accuracy_before: float, counted: Cost
) -> dict[str, Any]:
    """What is known before the cut.

    Args:
        index: number of the stage, from 0.
        stage: what it removes, and when.
        dense: figures of the dense network: accuracy, accuracy_recalibrated, macs, params.
        accuracy_before: of the network as it comes into the stage, in 0..1.
        counted: its cost.
    """
    return {
        "stage": index,
        "name": stage.kind,
        "kind": stage.kind,
        "epoch": stage.epoch,
        "macs": {"dense": dense["macs"], "before": counted.macs},
        "params": {"dense": dense["params"], "before": counted.params},
        "accuracy": {
            "dense": dense["accuracy"],
            "dense_recalibrated": dense["accuracy_recalibrated"],
            "before": accuracy_before,
            "after_repair": math.nan,
        },
        "widths": {name: {"before": layer.out_channels, "after": 0} for name, layer in counted.layers.items()},
        "seconds": {"repair": 0.0},
    }


def complete_record(record: dict[str, Any], plan: Plan, counted: Cost) -> None:
    """Adds the plan that was carried out and the cost after it."""
    record["plan"] = plan.to_dict()
    record["macs"]["after"], record["params"]["after"] = counted.macs, counted.params
    for name, layer in counted.layers.items():
        record["widths"][name]["after"] = layer.out_channels


def describe_record(record: dict[str, Any]) -> str:
    """What a stage did, in a sentence for the terminal."""
    accuracy, macs = record["accuracy"], record["macs"]
    return (
        f"epoch {record['epoch']}: stage {record['name']} · MACs {macs['before'] / 1e6:.1f} M → "
        f"{macs['after'] / 1e6:.1f} M ({macs['after'] / macs['dense']:.0%} of dense) · "
        f"accuracy {accuracy['before']:.2%} → after surgery {accuracy['after_surgery']:.2%} → "
        f"recalibrated {accuracy['after_recalibration']:.2%}"
    )


def plain(value: Any) -> Any:
    """Tuples as lists: checkpoints load with weights_only, JSON knows no tuples."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
