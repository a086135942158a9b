"""Collector of first and second moments of what layers read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_prune.activations import position_view
from lit_prune.moments import LayerSums
from lit_prune.passes import keeping_inputs


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
        with keeping_inputs(self.model, self.layers) as self.inputs:
            yield

    def add(self, logits: Tensor, labels: Tensor | None) -> None:
        """See `passes.Collector`."""
        for name, inputs in self.inputs.items():
            values = position_view(self.model.get_submodule(name), inputs.detach(), token=None)  # [B, P, C]
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            if name not in self.found:
                self.found[name] = InputSums(LayerSums.zeros(values.mean((0, 1))), tuple(inputs.shape[2:]))
            shifted = values - self.found[name].sums.shift.to(values.dtype)
            self.found[name].sums.add(shifted.flatten(0, 1), shifted.mean(1))

    def result(self) -> dict[str, InputSums]:
        """Layer -> sums."""
        return self.found
