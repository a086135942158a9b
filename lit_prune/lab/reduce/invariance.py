"""Stress test of scores: two networks that compute the same function should lose the same units."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.replace.flow import observe
from lit_prune.running import undisturbed
from lit_prune.structure import Group, trace_groups
from lit_prune.task.batches import to_network

TOLERANCE = 1e-3  # of the logits' spread: more than that and the two networks are not the same function


@dataclass(frozen=True)
class Stress:
    """What the stress test draws.

    Attributes:
        ranges: (low, high) of the scalings, drawn log-uniform.
        draws: scalings a range.
        keep_ratio: share of the units kept.
        seed: of the scalings.
    """

    ranges: tuple[tuple[float, float], ...] = ((0.01, 100.0), (0.1, 10.0))
    draws: int = 10
    keep_ratio: float = 0.5
    seed: int = 0


DEFAULT_STRESS = Stress()
Ranking = Callable[[nn.Module], Mapping[str, Tensor]]  # network -> layer name -> scores [N], higher = keep


def rescaling_stress(
    model: nn.Module, group: str, scores: Mapping[str, Ranking], images: Tensor, *, stress: Stress = DEFAULT_STRESS
) -> pd.DataFrame:
    """Kept-set Jaccard of each score between `model` and copies whose units are rescaled without changing the function.

    Unit j of the group is multiplied by s_j > 0 where it is produced and divided by s_j where it is read.

    Args:
        model: network in which the group has one producer and passes ReLU (or another function with f(s·x) = s·f(x)).
        group: name of the group.
        scores: by name, such as `{"variance": lambda network: score(network, "variance", batches)}`.
        images: a batch [B, C, H, W] on which the function must stay the same.
        stress: ranges, draws, kept share.

    Returns:
        One row a score, range and draw: score, low, high, draw, jaccard, and logit_change, the largest one over the
        logits' standard deviation.

    Raises:
        InputError: the group is unknown or cannot be rescaled without changing the function.

    Source: causal mechanism reduction, section 5.1 and proposition 2.
    """
    found = trace_groups(model, images).by_name.get(group)
    if found is None:
        raise InputError(f"group={group!r} is not in the network; take a name of trace_groups")
    producer = found.producers[0] if len(found.producers) == 1 else None
    if producer is None:
        raise InputError(f"group={group!r} has {len(found.producers)} producers; a rescaling needs exactly one")
    before = {name: ranking(model)[producer] for name, ranking in scores.items()}
    rows = []
    for low, high in stress.ranges:
        generator = torch.Generator().manual_seed(stress.seed)
        for draw in range(stress.draws):
            uniform = torch.rand(found.size, generator=generator, dtype=torch.float64)
            scales = torch.exp(math.log(low) + uniform * math.log(high / low))
            other = rescale_units(model, found, scales, images)
            change = _logit_change(model, other, images, group)
            for name, ranking in scores.items():
                jaccard = kept_jaccard(before[name], ranking(other)[producer], stress.keep_ratio)
                values = (name, low, high, draw, jaccard, change)
                rows.append(dict(zip(("score", "low", "high", "draw", "jaccard", "logit_change"), values, strict=True)))
    return pd.DataFrame(rows)


def kept_jaccard(one: Tensor, other: Tensor, keep_ratio: float) -> float:
    """|A ∩ B| / |A ∪ B| of the units that two score vectors [N] keep, the best `round(keep_ratio · N)` each."""
    count = max(1, round(keep_ratio * len(one)))
    kept = [set(values.argsort(descending=True, stable=True)[:count].tolist()) for values in (one, other)]
    return len(kept[0] & kept[1]) / len(kept[0] | kept[1])


def rescale_units(model: nn.Module, group: Group, scales: Tensor, images: Tensor) -> nn.Module:
    """A copy of `model` whose unit j of the group is multiplied by scales[j] and divided by it where it is read.

    Args:
        model: the network.
        group: with one producer.
        scales: positive, [size].
        images: [B, C, H, W], for finding the norm behind the producer.
    """
    other = copy.deepcopy(model)
    flow = observe(other, images)
    with torch.no_grad():
        for member in group.members:
            module = dict(other.named_modules()).get(member.module)
            if member.axis == "in" and member.module in group.consumers:
                _multiply(module.weight, member.positions, 1 / scales, dim=1)
            elif member.module in group.producers:
                target = other.get_submodule(flow.norms.get(member.module, member.module))
                for parameter in (target.weight, target.bias):
                    if parameter is not None:
                        _multiply(parameter, member.positions, scales, dim=0)
    return other


def _multiply(parameter: Tensor, positions: Sequence[Sequence[int]], scales: Tensor, dim: int) -> None:
    factors = torch.ones(parameter.shape[dim], dtype=torch.float64)
    factors[torch.tensor(positions)] = scales[:, None]
    shape = [1] * parameter.dim()
    shape[dim] = -1
    parameter.mul_(factors.view(shape).to(parameter))


def _logit_change(model: nn.Module, other: nn.Module, images: Tensor, group: str) -> float:
    """Largest difference of the logits, over their standard deviation."""
    with undisturbed(model), undisturbed(other):
        first, second = (network(to_network(images, network)) for network in (model, other))
    change = float((first - second).abs().max() / first.std())
    if not change < TOLERANCE:
        raise InputError(
            f"group={group!r}: rescaling its units changes the logits by {change:.2g} of their spread; it is exact "
            "only where norm, ReLU and pooling lie between the producer and its readers"
        )
    return change
