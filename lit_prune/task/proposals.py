"""Two-stage detectors side by side: the second stage of both works on what the first one's first stage proposes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lit_prune.running import removing


@contextmanager
def shared_proposals(original: nn.Module, other: nn.Module) -> Iterator[None]:
    """Inside, `other` takes the proposals that `original` made of the batch before, and the samples it drew of them.

    Else the rows of both networks' second stages belong to other boxes and could not be compared. Of torchvision's
    detectors; other networks are left alone.
    """
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

    networks = (original, other)
    if not all(isinstance(network, GeneralizedRCNN) and _samples(network) for network in networks):
        yield
        return
    made: dict[str, Any] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        made["proposals"] = output[0]

    def take(module: nn.Module, args: Any, output: Any) -> Any:
        return made["proposals"], output[1]

    draw = original.roi_heads.select_training_samples

    def drawn(proposals: Any, targets: Any) -> Any:
        made["samples"] = draw(proposals, targets)
        return made["samples"]

    handles = [original.rpn.register_forward_hook(keep), other.rpn.register_forward_hook(take)]
    original.roi_heads.select_training_samples = drawn
    other.roi_heads.select_training_samples = lambda proposals, targets: made["samples"]
    try:
        with removing(handles):
            yield
    finally:
        for network in networks:
            del network.roi_heads.select_training_samples


def _samples(network: nn.Module) -> Callable | None:
    """The method by which a detector draws proposals to train on, where nobody has put another in its place."""
    heads = network.roi_heads
    return None if "select_training_samples" in vars(heads) else getattr(heads, "select_training_samples", None)
