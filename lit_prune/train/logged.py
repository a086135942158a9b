"""Figures of stages and of the compact network, sent to whatever loggers the Trainer has."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lit_prune.files import read_json
from lit_prune.train.stage_record import figures_of


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
