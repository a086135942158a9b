"""Several labels for each sample, each there or not."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.task.answered import Answered
from lit_prune.task.base import Term, register_task
from lit_prune.task.batches import describe
from lit_prune.task.classification import Classification


@register_task("multi_label")
class MultiLabel(Answered):
    """Binary cross-entropy of logits [B, ...] with labels in [0, 1] of the same shape; figure: F1 over all labels.

    The loss of a sample is the mean over its labels. F1 is 2·TP / (2·TP + FP + FN) at logit 0 (micro average).
    """

    metric_name = "f1"
    higher_is_better = True
    decides = True

    def labels(self, output: Any, batch: Any) -> Tensor:
        """Labels in the shape of the logits.

        Raises:
            InputError: there are none, or they do not fit.
        """
        logits, labels = self.prediction(output), self.target(batch)
        if not isinstance(labels, Tensor) or labels.numel() != logits.numel():
            raise InputError(f"batches: labels are {describe(labels)}; give 0 or 1 of shape {list(logits.shape)}")
        return labels.to(logits).reshape(logits.shape)

    def loss(self, output: Any, batch: Any) -> Tensor:
        """Binary cross-entropy of each sample, nats a label."""
        losses = F.binary_cross_entropy_with_logits(
            self.prediction(output), self.labels(output, batch), reduction="none"
        )
        return losses.reshape(len(losses), -1).mean(1)

    def metric(self, output: Any, batch: Any) -> Tensor:
        """True positives, false positives, false negatives."""
        said, there = self.prediction(output) > 0, self.labels(output, batch) > 0.5
        return torch.stack([(said & there).sum(), (said & ~there).sum(), (~said & there).sum()]).double()

    def figure(self, sums: Tensor) -> float:
        """F1; 1 where there is nothing to find and nothing was found."""
        right, wrong, missed = sums.tolist()
        return 2 * right / (2 * right + wrong + missed) if right + wrong + missed else 1.0

    def curvature_terms(self, output: Any, batch: Any, generator: torch.Generator) -> list[Term]:
        """The network's own labels, drawn for each sample; scaled so that they stand for the mean over labels."""
        logits = self.prediction(output)
        logits = logits.reshape(len(logits), -1)
        drawn = torch.bernoulli(logits.detach().sigmoid().cpu(), generator=generator).to(logits)
        losses = F.binary_cross_entropy_with_logits(logits, drawn, reduction="none").sum(1)
        return [Term(losses, torch.full_like(losses.detach(), 1 / logits.shape[1]))]

    def agreement(self, original: Tensor, other: Tensor) -> Tensor:
        """Share of labels on which both decide alike, float64 [B]."""
        return ((original > 0) == (other > 0)).double().reshape(len(original), -1).mean(1)

    @classmethod
    def suits(cls, logits: Tensor, target: Tensor, size: int) -> bool:
        """Logits with labels of 0 and 1 in the same shape; of maps, those of one class.

        A map of answers between 0 and 1 alone may be any image.
        """
        if target.numel() != logits.numel() or len(target) != size:
            return False
        if logits.ndim > 2 and (logits.shape[1] > 1 or bool(((logits >= 0) & (logits <= 1)).all())):
            return False
        if Classification.suits(logits, target, size):  # one label each: probabilities
            return False
        return bool(((target == 0) | (target == 1)).all())
