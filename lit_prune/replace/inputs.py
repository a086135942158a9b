"""Collector of first and second moments of what layers read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lit_prune.measurement.activations import position_view
from lit_prune.measurement.layers import removing
from lit_prune.measurement.moments import LayerSums


@dataclass(frozen=True)
class InputSums:
    """What a layer reads: `sums` of its input channels over images and positions, `size` of the map it reads."""

    sums: LayerSums
    size: tuple[int, ...]


class InputMoments:
    """Sums of the input channels of layers over all images and positions (without padding).

    Args:
        model: any network.
        layers: names of convolutions and linear layers.
    """

    gradients = False

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.model, self.layers = model, layers
        self.found: dict[str, InputSums] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See `passes.Collector`."""
        modules = {name: self.model.get_submodule(name) for name in self.layers}
        handles = [module.register_forward_pre_hook(self._observer(name)) for name, module in modules.items()]
        with removing(handles):
            yield

    def _observer(self, name: str) -> Callable[[nn.Module, tuple], None]:
        """Adds what the layer reads while it runs, so that the inputs of one layer alone are held."""

        def hook(module: nn.Module, inputs: tuple) -> None:
            values = position_view(module, inputs[0].detach(), token=None)  # [B, P, C]
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            if name not in self.found:
                self.found[name] = InputSums(LayerSums.zeros(values.mean((0, 1))), tuple(inputs[0].shape[2:]))
            shifted = values - self.found[name].sums.shift.to(values.dtype)
            self.found[name].sums.add(shifted.flatten(0, 1), shifted.mean(1))

        return hook

    def add(self, output: Any, batch: Any) -> None:
        """Nothing: the hooks have seen it all."""

    def result(self) -> dict[str, InputSums]:
        """Layer -> sums."""
        return self.found
