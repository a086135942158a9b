"""One class for each sample: logits [B, K] with labels [B] or one-hot [B, K], or probabilities [B, K] (mixup's)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.task.answered import Answered
from lit_prune.task.base import Term, register_task, unknown_variable
from lit_prune.task.batches import describe, is_one_hot

CLASSES = 10  # up to so many classes the curvature is exact in the label, above it is sampled


def _true_logit(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None])


def _true_margin(logits: Tensor, labels: Tensor) -> Tensor:
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return _true_logit(logits, labels) - others.amax(1, keepdim=True)


TARGETS: dict[str, Callable[..., Tensor]] = {
    "true_margin": _true_margin,
    "true_logit": _true_logit,
    "negative_loss": lambda logits, labels: _true_logit(logits.log_softmax(1), labels),
    "predicted_margin": lambda logits, labels: -logits.topk(2, dim=1).values.diff(dim=1),
    "predicted_logit": lambda logits, labels: logits.amax(1, keepdim=True),
    "one_vs_rest": lambda logits, labels: F.one_hot(labels, logits.shape[1]),
}
LABEL_FREE = ("predicted_margin", "predicted_logit")


def task_variable(name: str, logits: Tensor, labels: Tensor | None) -> Tensor:
    """Task variables T of a batch, float64 [B, V]; V = 1, but K for `one_vs_rest`.

    `true_margin`: logit of the label minus the largest other one. `true_logit`: the former alone. `negative_loss`:
    minus the cross-entropy. `predicted_margin`: largest minus second largest logit. `predicted_logit`: the largest.
    `one_vs_rest`: the 0/1 indicators of the classes.

    Args:
        name: one of `TARGETS`.
        logits: [B, K], K ≥ 2.
        labels: int64 [B], 0 to K-1; not read by the two `predicted` ones.

    Raises:
        InputError: an unknown name, logits that are not [B, K], a label out of range.
    """
    if name not in TARGETS:
        raise unknown_variable(name, TARGETS)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        raise InputError("model: its output is not logits [B, K] with K ≥ 2, as classification needs; give task=")
    if name not in LABEL_FREE:
        labels = check_labels(labels, *logits.shape).to(logits.device, torch.int64)
    return TARGETS[name](logits.double(), labels).double()


def check_labels(labels: Tensor | None, images: int, classes: int) -> Tensor:
    """The labels; raises InputError unless they are an integer tensor [images] with values 0 to classes-1."""
    if not isinstance(labels, Tensor) or labels.shape != (images,) or labels.is_floating_point():
        raise InputError(f"batches: labels are {describe(labels)}; give int64 of shape [{images}]")
    low, high = torch.stack(labels.aminmax()).tolist() if images else (0, 0)  # waits for the device once
    if not 0 <= low <= high < classes:
        raise InputError(
            f"batches: labels from {low} to {high}, but 0 to {classes - 1} expected; mend the labels, or where some "
            "samples have none give task='unlabelled', or a Custom of lit_prune.task with its own loss"
        )
    return labels


@register_task("classification")
class Classification(Answered):
    """Cross-entropy of logits [B, K] with labels int64 [B], one-hot [B, K], or probabilities [B, K]; figure: accuracy.

    Images alone are fine where nothing asks for labels: the task variables are then the two `predicted` ones. The
    margins need labels of classes; with probabilities the accuracy counts the likeliest class.
    """

    metric_name = "accuracy"
    higher_is_better = True
    decides = True
    variables = tuple(TARGETS)

    def target(self, batch: Any) -> Any:
        """Labels [B], of one-hot ones too, or probabilities [B, K]; None where the batch has none."""
        found = super().target(batch)
        return found.byte().argmax(1) if is_one_hot(found) and found.ndim == 2 else found

    def labels(self, output: Any, batch: Any) -> Tensor:
        """Labels int64 [B] or probabilities [B, K], checked and on the output's device.

        Raises:
            InputError: there are none, or they do not fit.
        """
        logits, labels = self.prediction(output), self.target(batch)
        if labels is None:
            raise InputError("batches: no labels in a batch, but this needs some; give (images, labels)")
        if logits.ndim != 2:
            raise InputError(f"model: its output is {describe(logits)}, not logits [B, K]; give task=")
        if isinstance(labels, Tensor) and labels.is_floating_point() and labels.shape == logits.shape:
            return labels.to(logits)
        return check_labels(labels, *logits.shape).to(logits.device, torch.int64)

    def loss(self, output: Any, batch: Any) -> Tensor:
        """Cross-entropy of each sample in nats."""
        return F.cross_entropy(self.prediction(output), self.labels(output, batch), reduction="none")

    def default_variable(self, batch: Any) -> str | None:
        """`true_margin`; `negative_loss` with probabilities; None without labels."""
        labels = self.target(batch)
        if labels is None:
            return None
        return "negative_loss" if isinstance(labels, Tensor) and labels.is_floating_point() else "true_margin"

    def variable(self, output: Any, batch: Any, name: str) -> Tensor:
        """One of `TARGETS`, see `task_variable`."""
        labels = self.target(batch)
        if name == "negative_loss" and labels is not None and labels.is_floating_point():
            return super().variable(output, batch, name)
        return task_variable(name, self.prediction(output).detach(), labels)

    def kinds(self, output: Any, batch: Any) -> Tensor:
        """The classes, int64 [B]; with probabilities the likeliest."""
        labels = self.labels(output, batch)
        return labels.argmax(1) if labels.is_floating_point() else labels

    def metric(self, output: Any, batch: Any) -> Tensor:
        """Right answers, and samples."""
        right = (self.prediction(output).argmax(1) == self.kinds(output, batch)).double()
        return torch.stack([right.sum(), right.new_tensor(len(right))])

    def curvature_terms(self, output: Any, batch: Any, generator: torch.Generator) -> list[Term]:
        """The network's own labels: all of few classes by probability, else one drawn for each sample."""
        logits = self.prediction(output)
        probabilities = logits.detach().softmax(1)
        if logits.shape[1] <= CLASSES:
            losses = -logits.log_softmax(1)
            return [Term(losses[:, k], probabilities[:, k]) for k in range(logits.shape[1])]
        drawn = torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(logits.device)
        return [Term(F.cross_entropy(logits, drawn, reduction="none"), torch.ones_like(probabilities[:, 0]))]

    def agreement(self, original: Tensor, other: Tensor) -> Tensor:
        """Whether the top classes are equal, float64 [B]."""
        return (original.argmax(1) == other.argmax(1)).double()

    @classmethod
    def suits(cls, logits: Tensor, target: Tensor, size: int) -> bool:
        """Logits [B, K] with integer labels [B], or with rows that are one-hot or probabilities."""
        if logits.ndim != 2 or logits.shape[1] < 2:
            return False
        if not target.is_floating_point():
            return target.shape == (size,) or (target.shape == logits.shape and is_one_hot(target))
        if target.shape != logits.shape:
            return False
        sums = target.sum(1)
        return bool((target >= 0).all() and torch.allclose(sums, torch.ones_like(sums)))
