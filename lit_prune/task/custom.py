"""A task made of functions."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.structure.example import Example
from lit_prune.task.base import Task
from lit_prune.task.batches import describe


@checked
class Custom(Task):
    """What the caller's functions say; what is not given is as in `Task`.

    Args:
        run: from (model, batch) to the output.
        loss: from (output, batch) to the loss of each sample [B], or to one number for the batch.
        prediction: from the output to the values that must stay as they are, [B, ...].
        variables: task variables by name, from (output, batch) to [B] or [B, V]; the first is the default.
        metric: from (output, batch) to sums [S] that add over batches; the figure is the first over the last. None
            takes the mean loss.
        metric_name: name of the figure.
        higher_is_better: of the figure.
        inputs: from the batch to (args, kwargs) of the network, where `run` does more than call it.
        size: from the batch to the number of samples.
        scalar_loss: the loss is one number for a batch (its mean over samples).
    """

    def __init__(
        self,
        *,
        run: Callable[[nn.Module, Any], Any] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        prediction: Callable[[Any], Tensor] | None = None,
        variables: Mapping[str, Callable[[Any, Any], Tensor]] | None = None,
        metric: Callable[[Any, Any], Tensor] | None = None,
        metric_name: str = "loss",
        higher_is_better: bool = False,
        inputs: Callable[[Any], tuple[tuple, dict]] | None = None,
        size: Callable[[Any], int] | None = None,
        scalar_loss: bool = False,
    ) -> None:
        self._run, self._loss, self._prediction, self._metric = run, loss, prediction, metric
        self._inputs, self._size = inputs, size
        self._variables = dict(variables or {})
        self.metric_name, self.higher_is_better, self.scalar_loss = metric_name, higher_is_better, scalar_loss
        self.needs_target = loss is not None or metric is not None

    def inputs(self, batch: Any) -> Example:
        """What the network is called with; caught from `run` where only that is known."""
        if self._inputs is not None:
            return Example(*self._inputs(batch))
        return super().inputs(batch) if self._run is None else _caught(self._run, batch)

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The network's output."""
        return super().run(model, batch) if self._run is None else self._run(model, batch)

    def respond(self, model: nn.Module, call: Example, batch: Any) -> Any:
        """What `run` makes of the batch, with this call as its first one of the network."""
        return super().respond(model, call, batch) if self._run is None else self._run(_Prepared(model, call), batch)

    def size(self, batch: Any) -> int:
        """Number of samples."""
        return super().size(batch) if self._size is None else self._size(batch)

    def loss(self, output: Any, batch: Any) -> Tensor:
        """Loss of each sample, or one number."""
        return super().loss(output, batch) if self._loss is None else self._loss(output, batch)

    def prediction(self, output: Any) -> Tensor:
        """The values that must stay."""
        return super().prediction(output) if self._prediction is None else self._prediction(output)

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the task variables."""
        return (*self._variables, *(("negative_loss",) if self._loss is not None else ()))

    def default_variable(self, batch: Any) -> str | None:
        """The first of the variables given, else `negative_loss` where there is a loss."""
        return next(iter(self.variables), None)

    def variable(self, output: Any, batch: Any, name: str) -> Tensor:
        """One of the variables given, or `negative_loss`."""
        if name not in self._variables:
            return super().variable(output, batch, name)
        found = self._variables[name](output, batch).detach().double()
        if len(found) != self.size(batch):
            raise InputError(f"task: the variable {name!r} is {describe(found)} for {self.size(batch)} samples")
        return found.reshape(len(found), -1)

    def metric(self, output: Any, batch: Any) -> Tensor:
        """Sums behind the figure."""
        return super().metric(output, batch) if self._metric is None else self._metric(output, batch).double()

    def figure(self, sums: Tensor) -> float:
        """First over last."""
        return float(sums[0] / sums[-1])


class _Prepared(nn.Module):
    """The network, whose first call gets arguments that somebody else made; its attributes are the network's."""

    def __init__(self, model: nn.Module, call: Example) -> None:
        super().__init__()
        self.model = model
        self.call: Example | None = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output."""
        call, self.call = self.call or Example(args, kwargs), None
        return self.model(*call.args, **call.kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


class _Caught(nn.Module):
    """Stands for the network to find out what it is called with."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises what it was called with."""
        raise _Called(Example(args, kwargs))


class _Called(Exception):
    """Carries what the network was called with."""


def _caught(run: Callable[[nn.Module, Any], Any], batch: Any) -> Example:
    """Arguments of the first call of the network.

    Raises:
        InputError: `run` does not call it.
    """
    try:
        with torch.no_grad():
            run(_Caught(), batch)
    except _Called as called:
        return called.args[0]
    except Exception as error:
        raise InputError(
            f"task: run cannot be followed to the call of the network ({type(error).__name__}: {error}); give inputs= "
            "from a batch to (args, kwargs)"
        ) from error
    raise InputError("task: run does not call the network; call model(...) in it, or give inputs=")
