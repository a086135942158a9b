"""What a pass can collect for scores: sums of all layers, saliencies, pooled outputs and inputs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.measurement.activations import Recording, record
from lit_prune.measurement.channel_table import NO_TARGET, task_values, variable_name
from lit_prune.measurement.labels import Pooled
from lit_prune.measurement.layers import out_channels, position_view, removing, select_layers
from lit_prune.measurement.protocol import DEFAULT_PROTOCOL
from lit_prune.measurement.sums import ActivationSums
from lit_prune.task import Task


class Sums:
    """Sums of all layers' raw outputs, see `lit_prune.measurement.channel_table.collect_sums`.

    Args:
        model: the network.
        task: what a batch and an output mean.
        target: the task variable; None takes the task's default, "none" none.
    """

    gradients = False

    def __init__(self, model: nn.Module, task: Task, target: str | None = None) -> None:
        self.model, self.task, self.target = model, task, target
        self.losses = target != NO_TARGET
        self.recording = Recording(DEFAULT_PROTOCOL)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See `Collector`."""
        with record(self.model) as self.recording:
            yield

    def add(self, output: Any, batch: Any) -> None:
        """See `Collector`. InputError: the task has no such variable for this batch."""
        name = variable_name(self.task, batch, self.target)
        if name is None and self.losses:
            self.task.losses(output, batch)  # says what is missing
        self.recording.add_target(task_values(self.task, output, batch, name))

    def result(self) -> ActivationSums:
        """The sums."""
        return self.recording.sums


class Saliency:
    """Σ over images of |Σ_p a·∂L/∂a| at every layer's raw output, L the image's loss.

    The sum runs over all positions (all tokens of a token layer).
    """

    gradients = losses = True

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.task = task
        self.layers = select_layers(model)
        self.outputs: list[tuple[str, Tensor]] = []
        self.totals = {name: torch.zeros(out_channels(m), dtype=torch.float64) for name, m in self.layers.items()}
        self.count = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See `Collector`."""

        def keep(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            self.outputs.append((name, output))
            return output.clone()  # what follows may overwrite its input in place

        with removing([module.register_forward_hook(partial(keep, name)) for name, module in self.layers.items()]):
            yield

    def add(self, output: Any, batch: Any) -> None:
        """See `Collector`. InputError: the task has no loss, or one that is not finite."""
        loss = self.task.losses(output, batch).sum()
        kept = [output for _, output in self.outputs]
        gradients = torch.autograd.grad(loss, kept, allow_unused=True, retain_graph=True)
        for (name, output), gradient in zip(self.outputs, gradients, strict=True):
            if gradient is not None:
                product = position_view(self.layers[name], output.detach() * gradient, token=None)
                self.totals[name] += product.float().sum(1).abs().sum(0).double().cpu()
        self.outputs.clear()
        self.count += self.task.size(batch)

    def result(self) -> dict[str, Tensor]:
        """The mean over images, float64 [N] a layer."""
        return {name: total / self.count for name, total in self.totals.items()}


class PooledInputs(Pooled):
    """The same of what layers read: the inputs of `readers`, float32 [n, C] a layer."""

    def __init__(self, model: nn.Module, task: Task, readers: Iterable[str]) -> None:
        super().__init__(model, task, {name: model.get_submodule(name) for name in readers})

    def seen(self, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """What is kept of a layer's call: its input."""
        return (*args, *kwargs.values())[0]
