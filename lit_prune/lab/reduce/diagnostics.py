"""Diagnostics of a reduction: kept sets under rescaling, cross-unit curvature, remainder of the second-order risk."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.lab.reduce.classifier_head import HeadEvidence
from lit_prune.lab.reduce.head import COLUMN_SCORES, HeadSite, HeadState
from lit_prune.lab.reduce.images import TASK, Batches, first_images
from lit_prune.lab.reduce.invariance import Stress, kept_jaccard, rescaling_stress
from lit_prune.lab.reduce.remainder import CROSS_ENTROPY, hessian_lipschitz, remainder_bound
from lit_prune.lab.reduce.request import ReduceRequest
from lit_prune.lab.reduce.sites import GroupSite, Site, site_scores
from lit_prune.replace.flow import observe

STRESSED = ("cmr_logit", "variance", "magnitude", "random")


def stress_rows(site: Site, batches: Batches, request: ReduceRequest, seed: int) -> list[dict[str, Any]]:
    """Kept-set Jaccard of each score between the network and rescaled copies: score, low, high, draw, jaccard, ...

    Scores: those of the request's methods, and cmr_logit, variance, magnitude and random. Half of the units stay. At
    the classifier's inputs the scaling acts on features and columns, as in the paper; `random` is drawn anew each time.

    Raises:
        InputError: the site has no units that can be rescaled.

    Source: causal mechanism reduction, section 5.1.
    """
    stress = Stress(draws=request.stress_draws, seed=seed)
    if isinstance(site, HeadSite):
        return _head_stress(site, batches, request, stress)
    if not isinstance(site, GroupSite):
        raise InputError("request.extras: 'stress' rescales channels; attention heads have none that ReLU undoes")
    names = list(dict.fromkeys((*STRESSED, *(method.score for method in request.methods))))
    group = site.group.name
    producer = site.group.producers[0]

    def ranking(name: str):
        def rank(network):
            return {producer: site_scores(network, group, name, batches, seed, site.example)}

        return rank

    whole = first_images(batches, TASK.size(batches[0]))
    table = rescaling_stress(site.model, group, {n: ranking(n) for n in names}, whole, stress=stress)
    return [{"seed": seed, **row} for row in table.to_dict("records")]


def _head_stress(site: HeadSite, batches: Batches, request: ReduceRequest, stress: Stress) -> list[dict[str, Any]]:
    state = site.begin(batches)
    wanted = dict.fromkeys((*STRESSED, *(method.score for method in request.methods)))
    names = [name for name in wanted if name in COLUMN_SCORES]
    generator = torch.Generator().manual_seed(stress.seed)
    rows = []
    for low, high in stress.ranges:
        for draw in range(stress.draws):
            uniform = torch.rand(site.size, generator=generator, dtype=torch.float64)
            scales = torch.exp(math.log(low) + uniform * math.log(high / low))
            other = _rescaled(state, scales)
            change = float((_logits(other) - _logits(state)).abs().max())
            for name in names:
                one, two = (
                    COLUMN_SCORES[name](part.evidence, 2 * draw + place + 1000 * stress.seed)
                    for place, part in enumerate((state, other))
                )
                jaccard = kept_jaccard(one, two, stress.keep_ratio)
                found = {"score": name, "low": low, "high": high, "draw": draw, "jaccard": jaccard}
                rows.append({"seed": stress.seed, **found, "logit_change": change})
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
