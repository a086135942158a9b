"""A network on its way down, for the sites that run it at every step."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from lit_prune.lab.reduce.images import Batches


@dataclass(frozen=True)
class NetworkState:
    """A network with the units `kept` of the original, the calibration images, and what the last step reported."""

    batches: Batches
    model: nn.Module
    kept: tuple[int, ...]
    report: dict[str, Any]
    added_biases: tuple[str, ...] = ()
