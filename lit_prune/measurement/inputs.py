"""Moments of what layers read, by channel and by coupled unit, and the weights on them."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.measurement.layers import TRANSPOSED, position_view, removing
from lit_prune.measurement.moments import Moments
from lit_prune.structure.groups import Group, Member


@dataclass(frozen=True)
class InputSums:
    """What a layer reads: `moments` of its input channels over images and positions, `size` of the map it reads."""

    moments: Moments
    size: tuple[int, ...]


class InputMoments:
    """Collects the moments of the input channels of layers over all images and positions (without padding)."""

    gradients = False

    def __init__(self, model: nn.Module, layers: Sequence[str], diagonal: bool = False) -> None:
        self.model, self.diagonal = model, diagonal
        self.columns: dict[Hashable, tuple[str, Tensor | None]] = {name: (name, None) for name in layers}
        self.found: dict[Hashable, InputSums] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See `passes.Collector`."""
        handles = [
            self.model.get_submodule(layer).register_forward_pre_hook(self._observer(key, columns), with_kwargs=True)
            for key, (layer, columns) in self.columns.items()
        ]
        with removing(handles):
            yield

    def _observer(self, key: Hashable, columns: Tensor | None) -> Callable[[nn.Module, tuple, dict], None]:
        """Adds what the layer reads while it runs, so that the inputs of one layer alone are held."""

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            read = (*args, *kwargs.values())[0].detach()
            values = position_view(module, read, token=None)  # [B, P, C]
            if columns is not None:
                values = values[..., columns.to(values.device)].movedim(-1, 1).flatten(1, 2)  # [B, q·P, units]
            if key not in self.found:
                size = tuple(read.shape[2:]) if not isinstance(module, nn.Linear) else ()
                self.found[key] = InputSums(Moments.around(values, diagonal=self.diagonal), size)
            self.found[key].moments.add(values)

        return hook

    def add(self, output: Any, batch: Any) -> None:
        """Nothing: the hooks have seen it all."""

    def result(self) -> dict[Hashable, InputSums]:
        """Layer -> sums, on the CPU."""
        return {key: InputSums(found.moments.to("cpu"), found.size) for key, found in self.found.items()}


class UnitMoments(InputMoments):
    """Moments of a group's units where a layer reads them, over images and positions, by (group, layer).

    The several columns that a flattened channel becomes count as positions.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        super().__init__(model, ())
        self.columns = {
            (group.name, member.module): (member.module, torch.tensor(member.positions))
            for group in groups
            for member in group.members
            if reads(group, member)
        }


def reads(group: Group, member: Member) -> bool:
    """Whether the member is the input of a convolution or linear layer that reads the group."""
    return member.axis == "in" and member.module in group.consumers


def input_weight_power(module: nn.Module) -> Tensor:
    """‖W[:,c]‖² of each input channel c of a convolution (grouped and transposed too) or Linear, float64 [C]."""
    weight = module.weight.detach().to("cpu", torch.float64)
    if isinstance(module, TRANSPOSED):
        return weight.flatten(1).square().sum(1)
    groups = getattr(module, "groups", 1)
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1).square().sum((1, 3)).flatten()
