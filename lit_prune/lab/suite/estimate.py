"""What a `fit` will cost: operations counted, seconds from a few steps measured on this device."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_prune.data import ImageData
from lit_prune.measurement.channel_table import collect_sums
from lit_prune.structure import cost
from lit_prune.task import Classification
from lit_prune.train.classifier import LitClassifier
from lit_prune.train.execution import check_precision

PASSES = 3  # forward, gradient of the inputs, gradient of the weights: as many operations each
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Estimate:
    """Cost of a whole run: `petaflop` of the training steps, `seconds` with validation and traces on one device."""

    epochs: int
    petaflop: float
    seconds: float


def estimate_fit(module: LitClassifier, data: ImageData, trainer: dict[str, Any]) -> Estimate:
    """Estimate of a run from a configuration; the network is stepped on a batch or two and then of no use.

    Training operations: `2 · 3 · MACs · images · epochs`. Seconds: one training step, one validation batch and one
    traced batch, the second of two each, times their numbers. Compilation is left out of both.
    """
    device = training_device(str(trainer.get("accelerator", "auto")))
    precision = str(trainer.get("precision") or "32-true")
    check_precision({"32": "32-true"}.get(precision, precision), device)
    module = module.to(device)
    train, evaluation = data.train_dataloader(), data.val_dataloader()
    epochs = int(trainer["max_epochs"])
    images = len(train) * data.batch_size
    macs = cost(module.backbone, module.example_input).macs
    batch = tuple(part.to(device) for part in next(iter(train)))
    step = _second_time(training_step(module, batch, AUTOCAST.get(precision)), device)
    shown = tuple(part.to(device) for part in next(iter(evaluation)))
    forward = _second_time(lambda: _forward(module, shown[0]), device)
    every = trainer.get("check_val_every_n_epoch") or 1
    seconds = step * len(train) + forward * len(evaluation) / every
    traced = traced_images(trainer.get("callbacks") or [], len(data.calibration_indices))
    if traced:
        record = _second_time(lambda: collect_sums(module.backbone, [shown]), device)
        seconds += record * traced / len(shown[0])
    return Estimate(epochs, 2 * PASSES * macs * images * epochs / 1e15, seconds * epochs)


def training_device(accelerator: str) -> torch.device:
    """The device that a run with this setting of the trainer uses."""
    cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def training_step(
    module: LitClassifier, batch: tuple[Tensor, Tensor], half: torch.dtype | None = None
) -> Callable[[], None]:
    """A bare training step on one batch: forward, cross-entropy, backward, optimizer."""
    task = Classification()
    optimizer = module.optimizer([p for p in module.parameters() if p.requires_grad])

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(module.device.type, half, enabled=half is not None):
            loss = task.loss(task.run(module, batch), batch).mean()
        loss.backward()
        optimizer.step()

    return step


def traced_images(callbacks: list[Any], calibration: int) -> float:
    """Calibration images that tracing callbacks read in one epoch, on average."""
    tracing = [callback for callback in callbacks if hasattr(callback, "every_n_epochs") and hasattr(callback, "limit")]
    return sum(min(callback.limit or calibration, calibration) / callback.every_n_epochs for callback in tracing)


@torch.no_grad()
def _forward(module: LitClassifier, images: Tensor) -> Tensor:
    return module(images)


def _second_time(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the second call."""
    for _ in range(2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - start
