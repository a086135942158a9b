"""The run folder: what a run writes about itself, beside checkpoints and logs."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_prune import __version__
from lit_prune.data import ImageData
from lit_prune.files import json_text, read_json, write_json, write_text
from lit_prune.structure.record import record_of
from lit_prune.version import commit

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "numpy", "scipy", "timm")


def write_run(run_dir: Path, protocol: dict[str, Any]) -> None:
    """Writes `run.json`: versions of the packages and the machine's kind, then `protocol` (seed, data, fields)."""
    record = {
        "lit_prune": {"version": __version__, "commit": commit()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        **protocol,
    }
    write_json(run_dir / "run.json", record)


def add_record(run_dir: Path, verb: str, record: dict[str, Any]) -> None:
    """Puts `record` under the key `verb` of run.json; begins the file where there is none."""
    file = run_dir / "run.json"
    if file.is_file():
        write_json(file, {**read_json(file), verb: record})
    else:
        write_run(run_dir, {"verb": verb, verb: record})


def subject(network: nn.Module, data: ImageData, limit: int | None = None) -> dict[str, Any]:
    """Plain values that say which network and which images a result is of; `limit` calibration images were used."""
    record = record_of(network)
    return {
        "backbone": {"name": record.backbone, "arguments": record.arguments},
        "plans": len(record.plans),
        "data": data.fingerprint(),
        "calibration_indices": data.calibration_indices[:limit],
    }


def write_stages(run_dir: Path, records: list[dict[str, Any]]) -> None:
    """Writes `stages.jsonl`, one line a structural stage."""
    write_text(run_dir / "stages.jsonl", "".join(json_text(record) + "\n" for record in records))
