"""Scores from what layers put out and what the layers after them read."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lit_prune.activations import position_view
from lit_prune.layers import removing, to_model, undisturbed
from lit_prune.mechanisms.curvature import measure_curvature
from lit_prune.mechanisms.reconstruction import reconstruction_costs
from lit_prune.scores.evidence import Evidence
from lit_prune.structure.groups import Group, trace_groups


def activation_rms(evidence: Evidence) -> dict[str, Tensor]:
    """√(mean of Y_i² over images and positions), Y the raw output."""
    scores = {}
    for name, sums in evidence.sums.layers.items():
        mean = sums.first / sums.samples  # of z = y - shift
        square = sums.second.diagonal() / sums.samples + 2 * sums.shift * mean + sums.shift.square()
        scores[name] = square.clamp_min(0).sqrt().cpu()
    return scores


def variance(evidence: Evidence) -> dict[str, Tensor]:
    """Var(a_j) of the post-activation value, as the next layers read it: mean over consumers (VBP).

    One value per unit of a coupled group, given under the name of each of its producers; layers that nothing reads (the
    classifier) are left out.
    """
    return _group_scores(evidence, lambda module, values: values, torch.Tensor.mean)


def cmr_logit(evidence: Evidence) -> dict[str, Tensor]:
    """Var(a_j)·‖W[:,j]‖², a_j the value that a consumer reads and W[:,j] its weights for it, summed over consumers.

    It is invariant to rescaling a unit by any factor that its consumers undo. Per group, as `variance`.

    Source: the causal mechanism reduction paper; definitions in `mechanisms`.
    """
    return _group_scores(evidence, lambda module, values: values * input_weight_power(module), torch.Tensor.sum)


def reconstruction(evidence: Evidence, per_mac: float) -> dict[str, Tensor]:
    """Squared logit distortion that a unit adds when its readers are solved again without it, per multiply-add.

    Units go in greedy order, the cheapest of those left first; meant for the replacement kind `refit` and global
    allocation. `per_mac` is the power of the multiply-adds, 0 for no division. Per group, as `variance`; see
    `lit_prune.mechanisms.reconstruction_costs`.
    """
    costs = reconstruction_costs(evidence.model, evidence.batches, evidence.example, per_mac, evidence.seed)
    groups = trace_groups(evidence.model, evidence.example).groups
    return _by_producer(evidence, {group: costs[group.name] for group in groups if group.name in costs})


def cmr_const(evidence: Evidence) -> dict[str, Tensor]:
    """Rise of the loss when a unit takes its best constant: gradient and Gauss-Newton curvature of the cross-entropy.

    At a linear softmax head the curvature is exact. Summed over a unit's positions and consumers; per group, as
    `variance`.

    Source: the causal mechanism reduction paper, equation 9.
    """
    groups = _read_groups(evidence)
    names = sorted({name for group in groups for name in group.consumers})
    curvatures = measure_curvature(evidence.model, names, evidence.batches, evidence.seed)
    values = {name: curvature.scores() for name, curvature in curvatures.items()}
    return _by_producer(evidence, {group: _unit_values(group, values, torch.Tensor.sum) for group in groups})


def input_weight_power(module: nn.Module) -> Tensor:
    """‖W[:,c]‖² of each input channel c of a Conv2d (grouped ones too) or Linear, float64 [C]."""
    weight = module.weight.detach().to("cpu", torch.float64)
    groups = getattr(module, "groups", 1)
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1).square().sum((1, 3)).flatten()


def input_variances(evidence: Evidence, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Population variance of each input channel of the named layers over images and positions, float64 [C]."""
    moments: dict[str, tuple[float, Tensor, Tensor]] = {}

    def observer(name: str):
        def hook(module: nn.Module, inputs: tuple) -> None:
            values = position_view(module, inputs[0].detach(), token=None).float()
            spread, mean = torch.var_mean(values.flatten(0, 1), dim=0, correction=0)
            part = (values.shape[0] * values.shape[1], mean.double().cpu(), spread.double().cpu())
            moments[name] = _pooled(moments[name], part) if name in moments else part

        return hook

    handles = [module.register_forward_pre_hook(observer(name)) for name, module in modules.items()]
    with removing(handles), undisturbed(evidence.model):
        for images, _ in evidence.batches:
            evidence.model(to_model(evidence.model, images))
    return {name: spread for name, (_, _, spread) in moments.items()}


def _pooled(one: tuple, other: tuple) -> tuple[float, Tensor, Tensor]:
    """Count, mean and variance of two samples put together (Chan et al. 1983)."""
    count = one[0] + other[0]
    share = other[0] / count
    move = other[1] - one[1]
    spread = (1 - share) * one[2] + share * other[2] + share * (1 - share) * move.square()
    return count, one[1] + share * move, spread


def _group_scores(
    evidence: Evidence, channel_value: Callable[[nn.Module, Tensor], Tensor], reduce: Callable
) -> dict[str, Tensor]:
    """Values of the consumers' input channels, reduced over a unit's positions and consumers, by producer."""
    groups = _read_groups(evidence)
    modules = {name: evidence.model.get_submodule(name) for group in groups for name in group.consumers}
    variances = input_variances(evidence, modules)
    values = {name: channel_value(modules[name], spread) for name, spread in variances.items()}
    return _by_producer(evidence, {group: _unit_values(group, values, reduce) for group in groups})


def _read_groups(evidence: Evidence) -> list[Group]:
    """The groups that some layer reads."""
    return [group for group in trace_groups(evidence.model, evidence.example).groups if group.consumers]


def _by_producer(evidence: Evidence, unit_values: Mapping[Group, Tensor]) -> dict[str, Tensor]:
    """Values of the groups' units, each [size], at the output channels of the layers that produce them."""
    scores: dict[str, Tensor] = {}
    for group, values in unit_values.items():
        for member in group.members:
            if member.module in group.producers and member.axis == "out":
                channels = len(evidence.model.get_submodule(member.module).weight)
                vector = scores.setdefault(member.module, torch.full((channels,), torch.nan, dtype=torch.float64))
                vector[torch.tensor(member.positions)] = values[:, None]
    return {name: scores[name] for name in evidence.layers if name in scores}


def _unit_values(group: Group, values: dict[str, Tensor], reduce: Callable) -> Tensor:
    """One value a unit of the group, [size]: `reduce` over positions, then over consumers."""
    read = [m for m in group.members if m.axis == "in" and m.module in group.consumers and m.module in values]
    by_consumer = [reduce(values[m.module][torch.tensor(m.positions)], 1) for m in read]  # each [size]
    return reduce(torch.stack(by_consumer), 0) if by_consumer else torch.full((group.size,), torch.nan).double()
