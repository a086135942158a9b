"""The record of one structural stage: a line of `stages.jsonl`, made of plain values, and what loggers get of it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lit_prune.errors import InputError
from lit_prune.files import read_json
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


def check_done(records: Sequence[Mapping[str, Any]], stages: Sequence[Stage], earlier: Sequence[Path]) -> None:
    """Refuses a run whose stages that are done are not those that are asked for.

    Args:
        records: of the stages that are done.
        stages: those that are asked for.
        earlier: the checkpoint from before each stage, and one from after the last, whether there or not.

    Raises:
        InputError: the first that differs is named, and the checkpoint to go back to.
    """
    for place, record in enumerate(records):
        done = record["protocol"]["stage"]
        asked = plain(stages[place].to_dict()) if place < len(stages) else {}
        changed = [key for key in {**done, **asked} if done.get(key) != asked.get(key)]
        if not changed:
            continue
        key, file = changed[0], earlier[place]
        other = f"now with {key}={asked.get(key)}" if asked else "now left out"
        back = f"resume from {file}" if file.is_file() else "begin anew in another folder"
        raise InputError(
            f"stage {record['name']} at epoch {record['epoch']} is done, with {key}={done.get(key)}, and {other}; "
            f"{back} for other stages, or ask for those that are done"
        )


def plain(value: Any) -> Any:
    """Tuples as lists: checkpoints load with weights_only, JSON knows no tuples."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def log_figures(trainer: Trainer, values: Mapping[str, Any], prefix: str) -> None:
    """Logs the finite numbers among `values` under `prefix/name`, on rank 0, by Lightning's logger interface."""
    numbers = {
        f"{prefix}/{name}": float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    if trainer.is_global_zero and numbers:
        for logger in trainer.loggers:
            logger.log_metrics({**numbers, "epoch": trainer.current_epoch}, step=trainer.global_step)


def log_stage(trainer: Trainer, record: Mapping[str, Any]) -> None:
    """Logs what a stage left (`stage/macs`, `stage/kept`) and the figures around it (`stage/after_surgery`)."""
    macs, params = record["macs"], record["params"]
    costs = {"macs": macs.get("after"), "params": params.get("after"), "index": record["stage"]}
    costs["kept"] = macs["after"] / macs["dense"] if macs.get("after") else None
    log_figures(trainer, costs | figures_of(dict(record)), "stage")


def log_compact(trainer: Trainer, module: LightningModule) -> None:
    """Logs the figures of the network handed over (`compact/...`); the figure is the metric of the hyperparameters."""
    report = read_json(f"{trainer.default_root_dir}/compact/report.json")
    log_figures(trainer, report["compact"], "compact")
    value = report["compact"].get(report["metric"]["name"])
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and isinstance(value, int | float):
            logger.log_hyperparams(dict(module.hparams_initial), {"hp_metric": float(value)})
            logger.save()
