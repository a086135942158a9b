"""Detection by torchvision's protocol: lists of images and targets in, losses in training, boxes in evaluation."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.running import modes_kept, removing
from lit_prune.structure.example import Example
from lit_prune.task.base import Task, register_task
from lit_prune.task.batches import describe
from lit_prune.task.outputs import answers
from lit_prune.task.proposals import shared_proposals

PROTOCOL = "torchvision.models.detection"
HEADS = ("head", "rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor", "roi_heads.keypoint_predictor")


@dataclass
class Detected:
    """What a detector gave for a batch.

    Attributes:
        losses: its losses by name; empty where the batch has no targets.
        boxes: its detections, a dict an image; empty where it gave losses.
        heads: the tensors of its heads, before any box is chosen.
        anchored: those of them that have a value for each anchor, whatever the network makes of the image.
        images: number of images.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    boxes: list[dict[str, Tensor]] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    anchored: list[Tensor] = field(default_factory=list)
    images: int = 1


@register_task("detection")
class Detection(Task):
    """Detectors that take a list of images and, in training, a list of targets (dicts with `boxes` and `labels`).

    With targets the network is run for its losses while norms, dropout and everything that is not of the detector's own
    code stay in evaluation mode; without them for its boxes. The loss is the sum of the network's losses, one number
    for a batch, so samples are run one by one where each one's is needed. The prediction is what the heads give before
    boxes are chosen. The figure is the mean loss of an image.
    """

    scalar_loss = True

    def inputs(self, batch: Any) -> Example:
        """The list of images."""
        return Example((list(super().inputs(batch).args[0]),), {})

    def run(self, model: nn.Module, batch: Any) -> Detected:
        """Losses or boxes, and what the heads gave."""
        return self.respond(model, self.inputs(batch), batch)

    def respond(self, model: nn.Module, call: Example, batch: Any) -> Detected:
        """Losses where the call or the batch has targets, else boxes; and what the heads gave."""
        images, targets = _arguments(*call.args, **call.kwargs)
        targets = self.target(batch) if targets is None else targets
        with watched_heads(model) as (heads, anchored):
            if targets is None:
                return Detected({}, model(images), heads, anchored, len(images))
            with _asked_for_losses(model):
                found = model(images, [dict(target) for target in targets])
        if not isinstance(found, Mapping):
            raise InputError(f"model: in training it returns {describe(found)}, not losses by name; give task=")
        return Detected(dict(found), [], heads, anchored, len(images))

    def asked(self, call: Example) -> Example:
        """The list of images."""
        return Example((_arguments(*call.args, **call.kwargs)[0],), {})

    def loss(self, output: Detected, batch: Any) -> Tensor:
        """Sum of the network's losses, one number.

        Raises:
            InputError: the batch has no targets.
        """
        if not output.losses:
            raise InputError("batches: no targets in a batch, but this needs some; give ([image], [{boxes, labels}])")
        return torch.stack(list(output.losses.values())).sum()

    def prediction(self, output: Detected) -> Tensor:
        """Head outputs of each image, [B, D]; proposals of an image with fewer of them count as zeros.

        Raises:
            InputError: no head of torchvision's names ran.
        """
        if not output.heads:
            raise InputError(f"model: none of the heads {', '.join(HEADS)} runs in it; give task= with a prediction")
        return torch.cat([_rows(value, output.images) for value in output.heads], 1)

    def paired(self, original: nn.Module, other: nn.Module) -> AbstractContextManager[None]:
        """Both networks work on the original's proposals."""
        return shared_proposals(original, other)

    def compared(self, output: Detected) -> Tensor:
        """The prediction without what is said of proposals, of which two networks make different ones."""
        if not output.anchored:
            return self.prediction(output)
        return torch.cat([_rows(value, output.images) for value in output.anchored], 1)

    @classmethod
    def fits(cls, output: Any, target: Any, size: int) -> bool:
        """A list of dicts with boxes."""
        return isinstance(output, list) and all(isinstance(found, Mapping) and "boxes" in found for found in output)


def _arguments(images: Any, targets: Any = None) -> tuple[list[Tensor], Any]:
    """Arguments of a detector, by the names that torchvision's have."""
    return list(images), targets


def _rows(value: Tensor, images: int) -> Tensor:
    """A head's tensor as [B, D]; rows of several images that do not divide are filled up with zeros."""
    missing = -len(value) % images
    value = torch.cat([value, value.new_zeros(missing, *value.shape[1:])]) if missing else value
    return value.reshape(images, -1)


def detector_heads(model: nn.Module) -> list[nn.Module]:
    """Heads of a detector, by the names that torchvision's have."""
    modules = dict(model.named_modules())
    return [modules[name] for name in HEADS if name in modules]


def reads_proposals(name: str) -> bool:
    """Whether the layer of this name has a row for each proposal, of which two networks make different ones."""
    return "roi_heads" in name.split(".")


@contextmanager
def watched_heads(model: nn.Module) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Tensors that the heads return inside: of all heads, and of those that do not read proposals."""
    found: list[Tensor] = []
    anchored: list[Tensor] = []

    def keep(name: str):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = list(answers(output))
            found.extend(tensors)
            anchored.extend([] if reads_proposals(name) else tensors)

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in HEADS if name in modules]
    with removing(handles):
        yield found, anchored


@contextmanager
def _asked_for_losses(model: nn.Module) -> Iterator[None]:
    """Training flags on for the network and the parts that torchvision's detection code defines, for nothing else."""
    asked = [m for m in model.modules() if m is model or type(m).__module__.startswith(PROTOCOL)]
    with modes_kept(model):
        for module in asked:
            module.training = True
        yield
