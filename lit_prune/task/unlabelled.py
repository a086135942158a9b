"""Inputs alone: nothing to compare the output with."""

from typing import Any

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.task.base import Task, register_task
from lit_prune.task.detection import Detection


@register_task("unlabelled")
class Unlabelled(Task):
    """The output is to stay as it is; there is no loss and no task variable. Targets in a batch are not read.

    The figure is the mean square of the output: it says that two networks differ, not which is better.

    Args:
        refusal: why the targets of the batches are not understood; what needs a loss says so.
    """

    metric_name = "output_power"

    def __init__(self, refusal: str = "") -> None:
        self.refusal = refusal

    def loss(self, output: Any, batch: Any) -> Tensor:
        """None.

        Raises:
            InputError: always.
        """
        if self.refusal:
            raise InputError(self.refusal)
        return super().loss(output, batch)

    def default_variable(self, batch: Any) -> str | None:
        """None, where the batches have no targets; else the loss, which refuses."""
        return "negative_loss" if self.refusal else None

    def metric(self, output: Any, batch: Any) -> Tensor:
        """Squares, and values."""
        values = self.prediction(output).double()
        return torch.stack([values.square().sum(), values.new_tensor(values.numel())])

    @classmethod
    def fits(cls, output: Any, target: Any, size: int) -> bool:
        """No target, and no boxes."""
        return target is None and not Detection.fits(output, target, size)
