"""From the name of any method and a budget to a plan."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import nn

from lit_prune.errors import InputError
from lit_prune.models import find_blocks
from lit_prune.models.residual import residual_blocks
from lit_prune.replace.ladder import distortion_ladders
from lit_prune.replace.reconstruction import solvable_readers
from lit_prune.running import undisturbed
from lit_prune.scores.evidence import Evidence
from lit_prune.scores.method import OwnScore, find_score
from lit_prune.scores.outputs import moments_of_readers
from lit_prune.scores.trials import corrected_damage
from lit_prune.structure.allocation import Measured, check_no_blocks, plan_channels, plan_ladders
from lit_prune.structure.budgets import find_budget
from lit_prune.structure.cost import cost
from lit_prune.structure.cost_model import CostModel
from lit_prune.structure.example import Example
from lit_prune.structure.groups import ChannelGraph, Group
from lit_prune.structure.masking import mask_channels, plan_masks
from lit_prune.structure.measured_budget import plan_measured
from lit_prune.structure.plan import Plan
from lit_prune.structure.ranking import Budget, Ranks, equal_ranks, group_scores, selected_groups
from lit_prune.structure.record import example_input


def plan_method(
    evidence: Evidence, method: str | OwnScore, graph: ChannelGraph, cost_model: CostModel, request: Budget
) -> Plan:
    """Plan of any method under a budget; what the evidence has measured is not measured again.

    Make the evidence once for many methods and budgets: `Evidence(model, batches)`, `graph = evidence.graph`,
    `cost_model = CostModel.build(model, graph, evidence.example)`.

    Args:
        evidence: the network and its calibration batches.
        method: name of a score, with parameters where it has them (`lit_prune.scores.SCORES`).
        graph: groups of the evidence's network.
        cost_model: of the same network.
        request: the budget; latency is measured with one image.

    Returns:
        As `make_plan`, with the method's name and `score_ranges` (`scores`) among the notes.

    Raises:
        InputError: as in `score` and `make_plan`.
    """
    sparsity = channel_sparsity(graph, cost_model, request)
    ranks = find_score(method).at(sparsity).ranks(evidence)
    if request.allocation == "measured":
        blocks = droppable_groups(evidence.model, graph, evidence.example) if request.drops_blocks else {}
        measured = measured_damage(evidence, graph, ranks, request, blocks)
        first = plan_ladders(graph, cost_model, ranks, measured, _arithmetic(request), blocks)
        measured = corrected_damage(evidence, graph, measured, first)
        plan_at = lambda priced, wanted: plan_ladders(graph, priced, ranks, measured, wanted, blocks)  # noqa: E731
    else:
        check_no_blocks(request)
        plan_at = lambda priced, wanted: plan_channels(graph, priced, ranks, wanted)  # noqa: E731
    if find_budget(request.kind).measured and request.allocation != "layerwise":
        plan = plan_measured(evidence.model, graph, cost_model, plan_at, request, example_input(evidence.example))
    else:
        plan = plan_at(cost_model, request)
    name = method if isinstance(method, str) else find_score(method).name
    compared, _ = group_scores(graph, ranks, request)
    return replace(plan, notes={**plan.notes, "method": name, "scores": score_ranges(compared, plan)})


def score_ranges(scores: Mapping[str, np.ndarray], plan: Plan) -> dict[str, dict[str, list[float]]]:
    """Least, median and greatest score of what goes and of what stays, by group; groups that lose nothing are left out.

    Args:
        scores: group -> score of each unit [size], as they were compared.
        plan: what goes.

    Returns:
        Group -> `removed` and `kept`, three numbers each; `kept` is absent where nothing stays.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for group, units in plan.removals.items():
        goes = np.isin(np.arange(plan.sizes[group]), units)
        parts = {"removed": scores[group][goes], "kept": scores[group][~goes]}
        found[group] = {name: np.quantile(part, (0, 0.5, 1)).tolist() for name, part in parts.items() if len(part)}
    return found


def _arithmetic(request: Budget) -> Budget:
    """The request, or as many multiply-adds where it can only be measured."""
    return replace(request, kind="macs") if find_budget(request.kind).measured else request


def measured_damage(
    evidence: Evidence, graph: ChannelGraph, ranks: Ranks, request: Budget, blocks: Mapping[str, str] = {}
) -> Measured:
    """How far the prediction moves when one group alone is cut and its readers are solved again, by group and width.

    See `lit_prune.replace.ladder.distortion_ladders`. Groups that are read by a layer which cannot be solved again are
    left out, and so stay whole. Groups of `blocks` may be left nothing, but not all blocks of a stage.
    """
    scores, _ = group_scores(graph, ranks, request)
    solvable = {name: values for name, values in scores.items() if _all_solvable(evidence, graph.by_name[name])}
    moments = evidence.last(moments_of_readers)
    model, task, seed = evidence.model, evidence.task, evidence.seed
    found = distortion_ladders(model, graph, solvable, evidence.batches, moments, task, seed, blocks)
    return with_a_block_in_each_stage(model, evidence.example, blocks, found) if blocks else found


def _all_solvable(evidence: Evidence, group: Group) -> bool:
    return set(solvable_readers(evidence.model, group)) == set(group.consumers)


def method_needs(methods: Iterable[str]) -> tuple[str, ...]:
    """What these methods read from a pass, dead channels included: `evidence.gather(method_needs(...))` is one pass."""
    return tuple(dict.fromkeys(["sums", *(need for method in methods for need in find_score(method).needs)]))


def mask_method(evidence: Evidence, method: str, request: Budget) -> tuple[nn.Module, dict[str, Any]]:
    """The network with a method's removed channels masked, one convolution at a time: for comparison only.

    The protocol of the two-axis paper's companion code: every layer is a unit of its own under the same threshold, raw
    outputs become zero, a residual add still carries the other branch. Name it `removal="mask"` in every result.

    Args:
        evidence: as in `plan_method`.
        method: as in `plan_method`.
        request: a budget of "macs" or "channels", shared out "global" or "uniform".

    Returns:
        A masked copy, and plain values: `removal`, `method`, `kept` (layer -> channels; give it to `mask_channels` to
        mask another copy), `macs` and `dense_macs` (counted as if removed), `channels` (share that stays), `met`.

    Raises:
        InputError: as in `score` and `plan_masks`.
    """
    sparsity = 1 - request.keep if isinstance(request.keep, float | int) else 0.0
    ranks = find_score(method).at(sparsity).ranks(evidence)
    plan = plan_masks(evidence.graph, cost(evidence.model, evidence.example), ranks, request)
    found = asdict(plan) | {"kept": {name: list(channels) for name, channels in plan.kept.items()}}
    return mask_channels(evidence.model, plan.kept), {"removal": "mask", "method": method, **found}


def channel_sparsity(graph: ChannelGraph, cost_model: CostModel, request: Budget) -> float:
    """Share of the selected channels that a budget takes away, whatever the scores, in [0, 1).

    What is asked for where the budget counts channels; else the share that a uniform plan within the budget removes
    (for what is measured, a uniform plan with that share of the multiply-adds).
    """
    if request.kind == "channels" and not isinstance(request.keep, Mapping):
        return 1 - request.keep
    allocation = "uniform" if request.allocation in ("global", "measured") else request.allocation
    groups = selected_groups(graph, request)
    equal = equal_ranks(graph, groups)
    plan = plan_channels(graph, cost_model, equal, replace(_arithmetic(request), allocation=allocation))
    return sum(len(plan.removed(group.name)) for group in groups) / sum(group.size for group in groups)


def droppable_groups(model: nn.Module, graph: ChannelGraph, example: Example) -> dict[str, str]:
    """Group -> the residual block that computes nothing without it: all that the block adds to its input passes it.

    Blocks that hold a second group, or the layer that another group is named after, are left out.

    Args:
        model: the network.
        graph: its groups.
        example: what it is called with; one tensor.

    Raises:
        InputError: it is called with more than one tensor.
    """
    if len(example.args) != 1 or example.kwargs:
        raise InputError(
            "only: blocks of a network that reads more than one tensor cannot be dropped; leave 'blocks' out"
        )
    images = example.args[0]
    free = {block.name for block in find_blocks(model, images) if not block.protected and len(block.members) == 1}
    with undisturbed(model):
        residual = {block.name for block in residual_blocks(model, images)}
    found = {}
    for block in sorted(free & residual):
        inside = [group.name for group in graph.groups if group.name.startswith(f"{block}.")]
        group = graph.by_name[inside[0]] if len(inside) == 1 else None
        if group is not None and not group.protected and all(m.module.startswith(f"{block}.") for m in group.members):
            found[group.name] = block
    return found


def with_a_block_in_each_stage(
    model: nn.Module, example: Example, blocks: Mapping[str, str], measured: Measured
) -> Measured:
    """The tables without the width 0 of the block that would be missed most in a stage of which no other stays."""
    everything = find_blocks(model, example.args[0])
    named = {block: group for group, block in blocks.items()}
    kept = set()
    for stage in {block.stage for block in everything}:
        members = [block.name for block in everything if block.stage == stage]
        if all(name in named for name in members):
            kept.add(max((named[name] for name in members), key=lambda group: measured[group][1][0]))
    return {name: (table if name not in kept else (table[0][1:], table[1][1:])) for name, table in measured.items()}
