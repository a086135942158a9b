"""Diagnostics of a reduction: kept sets under rescaling, cross-unit curvature, remainder of the second-order risk."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.lab.reduce.classifier_head import HeadEvidence
from lit_prune.lab.reduce.head import COLUMN_SCORES, HeadSite, HeadState
from lit_prune.lab.reduce.images import TASK, Batches, first_images
from lit_prune.lab.reduce.remainder import CROSS_ENTROPY, hessian_lipschitz, remainder_bound
from lit_prune.lab.reduce.request import ReduceRequest
from lit_prune.lab.reduce.sites import GroupSite, Site, site_scores
from lit_prune.replace.flow import observe
from lit_prune.running import undisturbed
from lit_prune.structure import Group, trace_groups
from lit_prune.task.batches import to_network

TOLERANCE = 1e-3  # of the logits' spread: more than that and the two networks are not the same function


RANGES = ((0.01, 100.0), (0.1, 10.0))
"""(low, high) of the scalings, drawn log-uniform."""
KEPT = 0.5
"""Share of the units that are kept."""
Ranking = Callable[[nn.Module], Mapping[str, Tensor]]  # network -> layer name -> scores [N], higher = keep
STRESSED = ("cmr_logit", "variance", "magnitude", "random")


def rescaling_stress(
    model: nn.Module, group: str, scores: Mapping[str, Ranking], images: Tensor, draws: int = 10, seed: int = 0
) -> pd.DataFrame:
    """Kept-set Jaccard of each score between `model` and copies whose units are rescaled without changing the function.

    Unit j of the group is multiplied by s_j > 0 where it is produced and divided by s_j where it is read.

    Args:
        model: network in which the group has one producer and passes ReLU (or another function with f(s·x) = s·f(x)).
        group: name of the group.
        scores: by name, such as `{"variance": lambda network: score(network, "variance", batches)}`.
        images: a batch [B, C, H, W] on which the function must stay the same.
        draws: scalings for each of `RANGES`.
        seed: of the scalings.

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
    for place, scales in _scalings(found.size, draws, seed):
        other = rescale_units(model, found, scales, images)
        change = _logit_change(model, other, images, group)
        for name, ranking in scores.items():
            jaccard = kept_jaccard(before[name], ranking(other)[producer], KEPT)
            rows.append({"score": name, **place, "jaccard": jaccard, "logit_change": change})
    return pd.DataFrame(rows)


def _scalings(units: int, draws: int, seed: int) -> Iterator[tuple[dict[str, float], Tensor]]:
    """Factors [units], each with its low, high and draw."""
    generator = torch.Generator().manual_seed(seed)
    for low, high in RANGES:
        for draw in range(draws):
            uniform = torch.rand(units, generator=generator, dtype=torch.float64)
            scales = torch.exp(math.log(low) + uniform * math.log(high / low))
            yield {"low": low, "high": high, "draw": draw}, scales


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


def stress_rows(site: Site, batches: Batches, request: ReduceRequest, seed: int) -> list[dict[str, Any]]:
    """Kept-set Jaccard of each score between the network and rescaled copies: score, low, high, draw, jaccard, ...

    Scores: those of the request's methods, and cmr_logit, variance, magnitude and random. Half of the units stay. At
    the classifier's inputs the scaling acts on features and columns, as in the paper; `random` is drawn anew each time.

    Raises:
        InputError: the site has no units that can be rescaled.

    Source: causal mechanism reduction, section 5.1.
    """
    if isinstance(site, HeadSite):
        return _head_stress(site, batches, request, seed)
    if not isinstance(site, GroupSite):
        raise InputError("request.extras: 'stress' rescales channels; attention heads have none that ReLU undoes")
    names = list(dict.fromkeys((*STRESSED, *(method.score for method in request.methods))))
    group = site.group.name
    producer = site.group.producers[0]

    def rank(name: str, network: nn.Module) -> dict[str, Tensor]:
        return {producer: site_scores(network, group, name, batches, seed, site.example)}

    whole = first_images(batches, TASK.size(batches[0]))
    table = rescaling_stress(site.model, group, {n: partial(rank, n) for n in names}, whole, request.stress_draws, seed)
    return [{"seed": seed, **row} for row in table.to_dict("records")]


def _head_stress(site: HeadSite, batches: Batches, request: ReduceRequest, seed: int) -> list[dict[str, Any]]:
    state = site.begin(batches)
    wanted = dict.fromkeys((*STRESSED, *(method.score for method in request.methods)))
    rows = []
    for place, scales in _scalings(site.size, request.stress_draws, seed):
        other = _rescaled(state, scales)
        change = float((_logits(other) - _logits(state)).abs().max())
        for name in (name for name in wanted if name in COLUMN_SCORES):
            one, two = (
                COLUMN_SCORES[name](part.evidence, 2 * place["draw"] + number + 1000 * seed)
                for number, part in enumerate((state, other))
            )
            found = {"score": name, **place, "jaccard": kept_jaccard(one, two, KEPT)}
            rows.append({"seed": seed, **found, "logit_change": change})
    return rows


def _logits(state: HeadState) -> Tensor:
    return state.evidence.values @ state.evidence.head.weight.T + state.evidence.head.bias


def _rescaled(state: HeadState, scales: Tensor) -> HeadState:
    evidence = state.evidence
    head = replace(evidence.head, weight=evidence.head.weight / scales)
    features = replace(evidence.features, values=evidence.features.values.double() * scales)
    return replace(state, evidence=HeadEvidence(head, features))


def curvature_rows(site: Site, batches: Batches, request: ReduceRequest, seed: int) -> list[dict[str, Any]]:
    """Off-diagonal ratio of the curvature over blocks of 32 units, and the remainder bound: one row a reader.

    `remainder_*` are quantiles over units of `ρ/6·E|c - a|³` in nats at each unit's best constant, `risk_*` those of
    the second-order risk itself; NaN where the product of norms is no bound (an addition lies behind the reader).

    Raises:
        InputError: the site is an attention.

    Source: causal mechanism reduction, propositions 5 and 6, theorem 4.
    """
    if isinstance(site, HeadSite):
        return [{"seed": seed, **_head_curvature(site, batches, seed)}]
    if not isinstance(site, GroupSite):
        raise InputError("request.extras: 'curvature' is for channels and classifier inputs, not for attention heads")
    rows = []
    flow = observe(site.model, site.example)
    for reader, curvature in site.curvature(site.begin(batches), seed).items():
        try:
            lipschitz = float(hessian_lipschitz(site.model, reader, flow, site.example).median())
        except InputError:
            lipschitz = math.nan
        row = {"reader": reader, "method": curvature.method, "off_diagonal": curvature.off_diagonal_ratio(seed=seed)}
        rows.append({"seed": seed, **row, "lipschitz_median": lipschitz})
    return rows


def _head_curvature(site: HeadSite, batches: Batches, seed: int) -> dict[str, Any]:
    evidence = site.begin(batches).evidence
    curvature = evidence.softmax.curvature()
    lipschitz = CROSS_ENTROPY * evidence.head.weight.norm(dim=0).pow(3)
    bounds = remainder_bound(lipschitz, evidence.values, curvature.constants())
    found = {"reader": site.reader, "method": curvature.method}
    found |= {"off_diagonal": curvature.off_diagonal_ratio(seed=seed), "lipschitz_median": float(lipschitz.median())}
    for name, values in (("remainder", bounds), ("risk", curvature.scores())):
        quantiles = np.quantile(values.numpy(), (0.1, 0.5, 0.9))
        found |= {f"{name}_{label}": float(v) for label, v in zip(("low", "median", "high"), quantiles, strict=True)}
    return found
