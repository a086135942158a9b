"""Values to be met: numbers, key points, heat maps, images."""

from typing import Any

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.task.answered import Answered
from lit_prune.task.base import Term, register_task
from lit_prune.task.batches import describe
from lit_prune.task.classification import Classification
from lit_prune.task.multi_label import MultiLabel
from lit_prune.task.segmentation import Segmentation


@register_task("regression")
class Regression(Answered):
    """Mean squared error over a sample's values; figure: the same, averaged over samples."""

    metric_name = "mean_squared_error"

    def loss(self, output: Any, batch: Any) -> Tensor:
        """Mean over values of (output - target)², [B].

        Raises:
            InputError: no target, or one of another shape.
        """
        values, target = self.prediction(output), self.target(batch)
        if not isinstance(target, Tensor) or target.numel() != values.numel():
            raise InputError(f"batches: the target is {describe(target)} for an output {list(values.shape)}; mend it")
        return (values - target.to(values).reshape(values.shape)).square().reshape(len(values), -1).mean(1)

    def curvature_terms(self, output: Any, batch: Any, generator: torch.Generator) -> list[Term]:
        """Random projections of the values; weighted so that they give the Gauss-Newton matrix of the loss."""
        values = self.prediction(output)
        weight = 2 * len(values) / values.numel()
        return [Term(v, weight * w) for v, w in super().curvature_terms(output, batch, generator)]

    @classmethod
    def suits(cls, values: Tensor, target: Tensor, size: int) -> bool:
        """As many values in the target as in the output, and nothing that says they are labels."""
        same = target.numel() == values.numel() and len(target) == size
        if not same or any(kind.suits(values, target, size) for kind in (Classification, MultiLabel, Segmentation)):
            return False
        return target.is_floating_point() or values.shape == target.shape
