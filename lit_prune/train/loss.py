"""The loss seam: what a term added to the training loss gets to see."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class TrainingStep:
    """One training batch as a loss term sees it.

    Args:
        backbone: network being trained.
        images: [B, C, H, W], normalised.
        labels: [B], int64.
        logits: [B, K], with gradient.
        batch: index of the batch in its epoch.
        phase_epoch: epochs since the phase (training, or the repair after a stage) began, from 0.
        phase_epochs: length of the phase in epochs.
    """

    backbone: nn.Module
    images: Tensor
    labels: Tensor
    logits: Tensor
    batch: int
    phase_epoch: int
    phase_epochs: int


class LossTerm(Protocol):
    """A scalar to be added to the cross-entropy; callbacks put terms into `LitClassifier.loss_terms`."""

    def __call__(self, step: TrainingStep) -> Tensor:
        """Value of the term for one batch."""
        ...
