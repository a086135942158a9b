"""The run folder: what a run writes about itself, beside checkpoints and logs."""

import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import nn

from lit_prune.files import write_json, write_text
from lit_prune.structure import Plan, apply_plan, build_network, compare_profiles, save_compact

if TYPE_CHECKING:
    from lit_prune.modules import LitClassifier

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "numpy", "scipy", "timm", "torch-pruning")


def write_run(run_dir: Path, protocol: dict[str, Any]) -> None:
    """Writes `run.json`: versions of the packages and the machine's kind, then `protocol` (seed, data, fields)."""
    record = {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        **protocol,
    }
    write_json(run_dir / "run.json", record)


def write_stages(run_dir: Path, records: list[dict[str, Any]]) -> None:
    """Writes `stages.jsonl`, one line a structural stage."""
    write_text(run_dir / "stages.jsonl", "".join(json.dumps(record) + "\n" for record in records))


@dataclass(frozen=True)
class Network:
    """A pruned network with all that rebuilds it: weights, backbone name, arguments, image shape, plans."""

    model: nn.Module
    backbone: str
    arguments: dict[str, Any]
    image_shape: tuple[int, int, int]
    plans: tuple[Plan, ...]

    @classmethod
    def of(cls, module: "LitClassifier") -> "Network":
        """Network of a LightningModule as it stands."""
        return cls(module.backbone, module.backbone_name, module.arguments, module.image_shape, tuple(module.plans))

    @classmethod
    def from_checkpoint(cls, path: Path, image_shape: tuple[int, int, int]) -> "Network":
        """Network of a Lightning checkpoint written during `fit`."""
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved = checkpoint["lit_prune_structure"]
        plans = tuple(Plan.from_dict(plan) for plan in saved["plans"])
        model = build_network(saved["backbone"], saved["arguments"])
        for plan in plans:
            model = apply_plan(model, plan, torch.zeros(1, *image_shape))
        weights = {
            k.removeprefix("backbone."): v for k, v in checkpoint["state_dict"].items() if k.startswith("backbone.")
        }
        model.load_state_dict(weights)
        return cls(model.eval(), saved["backbone"], saved["arguments"], image_shape, plans)

    def save(self, folder: Path, report: dict[str, Any] | None = None) -> None:
        """Writes the folder that `load_compact` reads."""
        save_compact(
            folder,
            self.model,
            backbone=self.backbone,
            arguments=self.arguments,
            input_shape=self.image_shape,
            plans=self.plans,
            report=report,
        )


def stage_profiles(network: Network, dense: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Measured figures of the dense network, of each stage's network and of the compact one.

    Latency and throughput depend on the structure alone, so the intermediate networks are rebuilt with random weights;
    all are measured here, in turns in one process. A stage's accuracy is the one after recalibration and
    before repair; the compact network's is the one after the last repair.

    Returns:
        `{"dense": figures, "compact": figures, "stages": [{"name": ..., figures}]}`; figures as `structure.profile`.
    """
    example = torch.zeros(1, *network.image_shape)
    model = build_network(network.backbone, network.arguments).eval()
    for plan in network.plans[: dense["plans"]]:
        model = apply_plan(model, plan, example)
    models, accuracies = [model], [dense["accuracy"]]
    for record in records:
        models.append(apply_plan(models[-1], Plan.from_dict(record["plan"]), example))
        accuracies.append(record["accuracy"]["after_recalibration"])
    measured = compare_profiles(models, example, accuracies)
    stages = [{"name": r["name"], **figures} for r, figures in zip(records, measured[1:], strict=True)]
    compact = {**measured[-1], "accuracy": records[-1]["accuracy"]["after_repair"]}
    return {"dense": measured[0], "compact": compact, "stages": stages}


def write_compact(run_dir: Path, network: Network, dense: dict[str, Any], records: list[dict[str, Any]]) -> Table:
    """Hands over `compact/` (weights, structure, report) and returns the final table for the terminal."""
    from lit_prune.report import result_table

    report = stage_profiles(network, dense, records)
    network.save(run_dir / "compact", report)
    return result_table(report)
