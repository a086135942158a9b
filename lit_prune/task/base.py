"""What a batch and an output mean: the only place that looks into either."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError, UndefinedLossError
from lit_prune.registry import Kinds, Named
from lit_prune.structure.example import Example
from lit_prune.task.batches import describe, fields_of, find_layout, is_listed, size_of, slice_batch, to_network
from lit_prune.task.outputs import joined


class Term(NamedTuple):
    """A scalar function of each sample, and how much it counts; see `Task.curvature_terms`."""

    values: Tensor
    weights: Tensor


class Task(Named):
    """How a batch goes through a network, what its output is compared with, and what must stay as it is.

    A subclass says what it knows: `loss`, `prediction`, `metric`, further task variables. Everything here reads a batch
    by its layout (`find_layout`), so most tasks need no more.

    Attributes:
        needs_target: whether its loss reads a target from the batch.
        scalar_loss: the loss is one number for a batch; samples are then run one by one where each one's is needed.
        metric_name: name of the figure, for tables.
        higher_is_better: of the figure.
        parameters: of the network's forward, by which dicts are read; `settle` fills them in.
        decides: whether its answers are decisions, on which two networks agree or not (`agreement` is then a share).
    """

    needs_target: bool = True
    parameters: Mapping[str, bool] = {}
    decides: bool = False
    scalar_loss: bool = False
    metric_name: str = "loss"
    higher_is_better: bool = False

    def inputs(self, batch: Any) -> Example:
        """What the network is called with for this batch."""
        args, kwargs = find_layout(batch, self.parameters).arguments(batch)
        return Example(args, kwargs)

    def target(self, batch: Any) -> Any:
        """What the output is compared with; None where the batch has none."""
        return find_layout(batch, self.parameters).target_of(batch)

    def relabelled(self, batch: Any, target: Any) -> Any:
        """The batch with another target, as a plain tuple or dict.

        Raises:
            InputError: the batch has none.
        """
        key = find_layout(batch, self.parameters).target
        if key is None:
            raise InputError(f"batches: a batch is {describe(batch)}, without a target; {GIVE_LOSS}")
        if isinstance(batch, Mapping) or fields_of(batch) is not None:
            return {**(fields_of(batch) or batch), key: target}
        return tuple(target if place == key else value for place, value in enumerate(batch))

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The network's output for a batch that `to` has prepared."""
        return self.respond(model, self.inputs(batch), batch)

    def respond(self, model: nn.Module, call: Example, batch: Any) -> Any:
        """The network's output for a call of it that somebody else made of the batch, such as a LightningModule."""
        return model(*call.args, **call.kwargs)

    def asked(self, call: Example) -> Example:
        """What of a call the network answers to in evaluation mode; here all of it."""
        return call

    def to(self, batch: Any, model: nn.Module) -> Any:
        """The batch on the network's device, floating-point values in its precision."""
        return to_network(batch, model)

    def size(self, batch: Any) -> int:
        """Number of samples B."""
        example = self.inputs(batch)
        return size_of((example.args, example.kwargs))

    def take(self, batch: Any, samples: slice | int) -> Any:
        """The samples of a batch that a slice names, or the first so many."""
        samples = slice(samples) if isinstance(samples, int) else samples
        return slice_batch(batch, samples, self.size(batch), is_listed(batch, self.parameters))

    def pieces(self, batch: Any) -> Iterable[Any]:
        """Batches on which `losses` says something of each sample: the batch, or its samples one by one."""
        if not self.scalar_loss:
            return (batch,)
        return (self.take(batch, slice(place, place + 1)) for place in range(self.size(batch)))

    def loss(self, output: Any, batch: Any) -> Tensor:
        """Loss of each sample, [B]; a scalar where only that exists.

        Raises:
            InputError: the task has none, or the batch has no target.
        """
        raise InputError(f"task: {self.name or type(self).__name__!r} has no loss, which this needs; {GIVE_LOSS}")

    def losses(self, output: Any, batch: Any) -> Tensor:
        """Loss of each sample, [B], whatever form `loss` has.

        Raises:
            InputError: as `loss`; one number for several samples; a value that is not finite.
        """
        found, size = self.loss(output, batch), self.size(batch)
        if found.ndim == 0 and size == 1:
            found = found[None]
        if found.shape != (size,):
            raise InputError(
                f"task: the loss has shape {list(found.shape)} for {size} samples; return one value a sample [{size}], "
                "or set scalar_loss=True, which runs samples one by one"
            )
        if not torch.isfinite(found.detach()).all():
            raise UndefinedLossError("batches: the loss is NaN or infinite; mend the network or the data")
        return found

    def prediction(self, output: Any) -> Tensor:
        """The values that must stay as they are, [B, ...]."""
        return joined(output)

    def paired(self, original: nn.Module, other: nn.Module) -> AbstractContextManager[None]:
        """Inside, the layers of `other` see the same samples, row by row, as those of `original` in the run before."""
        return nullcontext()

    def compared(self, output: Any) -> Tensor:
        """What the answers of two networks to one batch are compared by, [B, ...]; here the prediction."""
        return self.prediction(output)

    def divergence(self, original: Tensor, other: Tensor) -> Tensor:
        """How far the answers (`compared`) of two networks to the same samples are apart, [B], 0 where they are alike.

        A short repair lessens it (`distil`). Here the squared change, summed over a sample's values.
        """
        return (other - original).square().reshape(len(original), -1).sum(1)

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the task variables."""
        return ("negative_loss",)

    def default_variable(self, batch: Any) -> str | None:
        """Name of the variable that T is where nobody says; None where the batch gives none."""
        return "negative_loss" if not self.needs_target or self.target(batch) is not None else None

    def variable(self, output: Any, batch: Any, name: str) -> Tensor:
        """Task variables T of each sample, float64 [B, V].

        Raises:
            InputError: an unknown name, or as `losses`.
        """
        if name != "negative_loss":
            raise unknown_variable(name, self.variables)
        return -self.losses(output, batch).double()[:, None]

    def kinds(self, output: Any, batch: Any) -> Tensor:
        """What tells samples apart, [B]: int64 classes, or values that are to be cut into quantiles.

        Here the default task variable.

        Raises:
            InputError: as `losses`.
        """
        return self.variable(output, batch, self.default_variable(batch) or "negative_loss").detach()[:, 0]

    def metric(self, output: Any, batch: Any) -> Tensor:
        """Sums behind the figure of this batch, float64 [...]; they add over batches and ranks."""
        losses = self.losses(output, batch).double()
        return torch.stack([losses.sum(), losses.new_tensor(len(losses))])

    def figure(self, sums: Tensor) -> float:
        """The figure from the sums; here the first over the second."""
        return float(sums[0] / sums[1])

    def curvature_terms(self, output: Any, batch: Any, generator: torch.Generator) -> list[Term]:
        """Functions of each sample whose squared gradients add up to the curvature that counts.

        Here a random projection of the prediction with unit variance, so that the expected squared gradient is `JᵀJ`,
        the Gauss-Newton matrix of ½‖Δ prediction‖². Losses that are a negative log-likelihood draw targets from the
        network's own distribution instead, which gives the Gauss-Newton matrix of the loss.
        """
        values = self.prediction(output)
        values = values.reshape(len(values), -1)  # [B, D]
        drawn = torch.randn(values.shape, generator=generator).to(values)
        projected = (values * drawn).sum(1)
        return [Term(projected, torch.ones_like(projected.detach()))]

    def agreement(self, original: Tensor, other: Tensor) -> Tensor:
        """How far two networks answer alike on each sample, [B], at most 1: 1 - ‖Δ prediction‖² / ‖prediction‖²."""
        first, second = (v.double().reshape(len(v), -1) for v in (original, other))
        power = first.square().sum(1)
        return 1 - (second - first).square().sum(1) / torch.where(power > 0, power, 1.0)

    @classmethod
    def fits(cls, output: Any, target: Any, size: int) -> bool:
        """Whether batches with this target, answered with this output, are of this task."""
        return False


GIVE_LOSS = "give batches with targets, or task= with a loss"


def unknown_variable(name: str, known: Iterable[str]) -> InputError:
    """The refusal of a task variable that the task does not have."""
    return InputError(f"target: {name!r} is not one of {', '.join(known)}")


TASKS = Kinds("task", Task)
"""Tasks that can be named."""


def register_task(name: str) -> Callable[[type[Task]], type[Task]]:
    """Class decorator: the task can be named, and `recognise` tries it before those registered earlier."""
    return TASKS.register(name)
