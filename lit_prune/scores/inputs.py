"""What the layers read: collectors of the moments of their input channels, and the weights on them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.measurement.activations import position_view
from lit_prune.measurement.layers import removing
from lit_prune.measurement.moments import LayerSums
from lit_prune.structure.groups import Group, Member

Moments = tuple[float, Tensor, Tensor]  # count, mean, variance


class InputVariances:
    """Population variance of each input channel over images and positions, for every layer that reads a group."""

    gradients = False

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.readers = {name: model.get_submodule(name) for group in groups for name in group.consumers}
        self.moments: dict[str, Moments] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See `passes.Collector`."""

        def observer(name: str):
            def hook(module: nn.Module, inputs: tuple) -> None:
                values = position_view(module, inputs[0].detach(), token=None).float()
                spread, mean = torch.var_mean(values.flatten(0, 1), dim=0, correction=0)
                part = (values.shape[0] * values.shape[1], mean.double().cpu(), spread.double().cpu())
                self.moments[name] = _pooled(self.moments[name], part) if name in self.moments else part

            return hook

        with removing([module.register_forward_pre_hook(observer(name)) for name, module in self.readers.items()]):
            yield

    def add(self, output: Any, batch: Any) -> None:
        """Nothing: the hooks have seen it all."""

    def result(self) -> dict[str, Tensor]:
        """Layer -> float64 [C]."""
        return {name: spread for name, (_, _, spread) in self.moments.items()}


def _pooled(one: Moments, other: Moments) -> Moments:
    """Count, mean and variance of two samples put together (Chan et al. 1983)."""
    count = one[0] + other[0]
    share = other[0] / count
    move = other[1] - one[1]
    spread = (1 - share) * one[2] + share * other[2] + share * (1 - share) * move.square()
    return count, one[1] + share * move, spread


class UnitCovariances:
    """Covariance of a group's units where a layer reads them, over images and positions.

    The several columns that a flattened channel becomes count as positions.
    """

    gradients = False

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.model = model
        self.members = {
            (group.name, member.module): member for group in groups for member in group.members if reads(group, member)
        }
        self.sums: dict[tuple[str, str], LayerSums] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See `passes.Collector`."""

        def observer(key: tuple[str, str], positions: Tensor):
            def hook(module: nn.Module, inputs: tuple) -> None:
                values = position_view(module, inputs[0].detach(), token=None)  # [B, P, C]
                units = values[..., positions.to(values.device)].movedim(-1, 1).flatten(1, 2).float()  # [B, P·q, size]
                if key not in self.sums:
                    self.sums[key] = LayerSums.zeros(units.mean((0, 1)))
                shifted = units - self.sums[key].shift.float()
                self.sums[key].add(shifted.flatten(0, 1), shifted.mean(1))

            return hook

        handles = [
            self.model.get_submodule(key[1]).register_forward_pre_hook(observer(key, torch.tensor(member.positions)))
            for key, member in self.members.items()
        ]
        with removing(handles):
            yield

    def add(self, output: Any, batch: Any) -> None:
        """Nothing: the hooks have seen it all."""

    def result(self) -> dict[tuple[str, str], LayerSums]:
        """(group, layer that reads it) -> sums of its units."""
        return {key: sums.to("cpu") for key, sums in self.sums.items()}


def reads(group: Group, member: Member) -> bool:
    """Whether the member is the input of a convolution or linear layer that reads the group."""
    return member.axis == "in" and member.module in group.consumers


def input_weight_power(module: nn.Module) -> Tensor:
    """‖W[:,c]‖² of each input channel c of a Conv2d (grouped ones too) or Linear, float64 [C]."""
    weight = module.weight.detach().to("cpu", torch.float64)
    groups = getattr(module, "groups", 1)
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1).square().sum((1, 3)).flatten()
