"""Train a vision network, watch what its channels are for, prune it in stages, repair it, hand over a smaller one."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {  # public name -> module that defines it, imported at the first use
    "AxisTrace": "lit_prune.train.axis_trace",
    "BlockStage": "lit_prune.train.stages",
    "Budget": "lit_prune.structure",
    "ChannelStage": "lit_prune.train.stages",
    "Decorrelation": "lit_prune.train.decorrelation",
    "GradientTrace": "lit_prune.lab.trajectory.gradient_trace",
    "HubNetwork": "lit_prune.hub",
    "InputError": "lit_prune.errors",
    "LitClassifier": "lit_prune.train.classifier",
    "Plan": "lit_prune.structure",
    "Preparation": "lit_prune.preparation",
    "Recipe": "lit_prune.compression",
    "Repair": "lit_prune.train.distillation",
    "Replacement": "lit_prune.replace",
    "StagedPruning": "lit_prune.train.staged_pruning",
    "Task": "lit_prune.task",
    "added_loss": "lit_prune.train.added_loss",
    "apply_plan": "lit_prune.structure",
    "compress": "lit_prune.compression",
    "cost": "lit_prune.structure",
    "interchange": "lit_prune.replace",
    "load_compact": "lit_prune.structure",
    "load_pruned": "lit_prune.train.pruned_checkpoint",
    "make_plan": "lit_prune.structure",
    "measure": "lit_prune.measurement.channel_table",
    "recalibrate_batchnorm": "lit_prune.train.batchnorm",
    "register_score": "lit_prune.scores",
    "replace_mechanisms": "lit_prune.replace",
    "restore_structure": "lit_prune.train.pruned_checkpoint",
    "save_compact": "lit_prune.structure",
    "score": "lit_prune.scores",
}
_ROOMS = (  # parts of the package that pages name with what is in them, imported at the first use too
    "compression", "data", "errors", "hub", "lab", "measurement", "preparation", "replace", "scores", "structure",
    "task", "train",
)  # fmt: skip
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"lit_prune.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'lit_prune' has no attribute {name!r}")
    return globals().setdefault(name, getattr(import_module(_HOME[name]), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
