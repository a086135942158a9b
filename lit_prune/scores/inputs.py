"""What the layers read: moments of coupled units where a layer reads them, and the weights on them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_prune.measurement.inputs import InputMoments
from lit_prune.measurement.layers import TRANSPOSED
from lit_prune.structure.groups import Group, Member


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
