"""One class for each pixel (or voxel), some of them void."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.task.answered import Answered
from lit_prune.task.base import Term, register_task
from lit_prune.task.batches import describe, is_one_hot
from lit_prune.task.outputs import softmax_divergence

VOID = (255, -100)  # what data sets and torch take for pixels without a label
IGNORED = -100


@checked
@register_task("segmentation")
class Segmentation(Answered):
    """Cross-entropy of logits [B, K, ...] with labels [B, ...] or one-hot [B, K, ...]; figure: mean IoU.

    Logits smaller than the labels are resized first (linear), as networks that answer at a fraction of the resolution
    are used. The loss of a sample is the mean over its pixels that are not void. The figure is the mean over classes
    that occur in labels or answers of TP / (TP + FP + FN), void pixels and void classes left out.

    Args:
        void: labels that are not counted; one below K is a class that the network has and nobody counts.
    """

    metric_name = "miou"
    higher_is_better = True
    decides = True

    def __init__(self, void: int | Sequence[int] = VOID) -> None:
        self.void = (void,) if isinstance(void, int) else tuple(void)

    def labels(self, output: Any, batch: Any) -> Tensor:
        """Labels int64 [B, ...] with `IGNORED` for void.

        Raises:
            InputError: there are none, or they do not fit.
        """
        logits, labels = self.prediction(output), self.target(batch)
        if isinstance(labels, Tensor) and labels.ndim == logits.ndim and labels.shape[1] == 1:
            labels = labels[:, 0]
        elif isinstance(labels, Tensor) and labels.ndim == logits.ndim and is_one_hot(labels, logits.shape[1]):
            labels = labels.byte().argmax(1)
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != logits.ndim - 1:
            raise InputError(f"batches: labels are {describe(labels)} for logits {list(logits.shape)}; give int64 maps")
        labels = labels.to(logits.device, torch.int64)
        for void in self.void:
            labels = torch.where(labels == void, IGNORED, labels)
        counted = labels[labels != IGNORED]
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < logits.shape[1]:
            raise InputError(
                f"batches: labels from {int(counted.min())} to {int(counted.max())} for {logits.shape[1]} classes; "
                "give task=Segmentation(void=...) of lit_prune.task if some are not counted"
            )
        return labels

    def resized(self, output: Any, labels: Tensor) -> Tensor:
        """Logits at the resolution of the labels."""
        logits = self.prediction(output)
        if logits.shape[2:] == labels.shape[1:]:
            return logits
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[logits.ndim - 2]
        return F.interpolate(logits, labels.shape[1:], mode=mode, align_corners=False)

    def loss(self, output: Any, batch: Any) -> Tensor:
        """Mean cross-entropy over a sample's pixels, [B], nats; 0 for a sample that is all void."""
        labels = self.labels(output, batch)
        return self._mean(F.cross_entropy(self.resized(output, labels), labels, reduction="none"), labels)

    def metric(self, output: Any, batch: Any) -> Tensor:
        """Confusion matrix [K, K], label by answer."""
        labels = self.labels(output, batch)
        logits = self.resized(output, labels)
        classes, seen = logits.shape[1], labels != IGNORED
        cells = labels[seen] * classes + logits.argmax(1)[seen]
        return torch.bincount(cells, minlength=classes**2).reshape(classes, classes).double()

    def figure(self, sums: Tensor) -> float:
        """Mean intersection over union."""
        right = sums.diagonal()
        union = sums.sum(0) + sums.sum(1) - right
        counted = [k for k in range(len(sums)) if union[k] > 0 and k not in self.void]
        return float((right[counted] / union[counted]).mean()) if counted else float("nan")

    def curvature_terms(self, output: Any, batch: Any, generator: torch.Generator) -> list[Term]:
        """The network's own labels, drawn for each pixel; scaled so that they stand for the mean over pixels."""
        logits = self.prediction(output)
        flat = logits.detach().movedim(1, -1).flatten(0, -2).softmax(1).cpu()
        drawn = torch.multinomial(flat, 1, generator=generator).reshape(len(logits), *logits.shape[2:])
        losses = F.cross_entropy(logits, drawn.to(logits.device), reduction="none").flatten(1)
        return [Term(losses.sum(1), torch.full_like(losses[:, 0].detach(), 1 / losses.shape[1]))]

    def agreement(self, original: Tensor, other: Tensor) -> Tensor:
        """Share of pixels with the same top class, float64 [B]."""
        return (original.argmax(1) == other.argmax(1)).double().flatten(1).mean(1)

    def divergence(self, original: Tensor, other: Tensor) -> Tensor:
        """KL(softmax(original) ‖ softmax(other)), mean over pixels, nats.

        Few pixels lie near a border, and rare classes have few: the squared change of logits hardly sees either.
        """
        return softmax_divergence(original, other)

    def _mean(self, losses: Tensor, labels: Tensor) -> Tensor:
        seen = (labels != IGNORED).flatten(1)
        return (losses.flatten(1) * seen).sum(1) / seen.sum(1).clamp_min(1)

    @classmethod
    def suits(cls, logits: Tensor, target: Tensor, size: int) -> bool:
        """Logits [B, K, ...] of two classes or more with integer labels [B, ...] or [B, 1, ...], or one-hot maps."""
        if logits.ndim < 3 or logits.shape[1] < 2 or len(target) != size:
            return False
        if target.is_floating_point() or target.shape[1:2] == logits.shape[1:2]:
            return target.ndim == logits.ndim and is_one_hot(target, logits.shape[1])
        return target.ndim == logits.ndim - 1 or (target.ndim == logits.ndim and target.shape[1] == 1)
