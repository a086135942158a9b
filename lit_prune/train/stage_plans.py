"""What a stage removes: the plan, decided by information under its budget, and the cut."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lit_prune.errors import InputError
from lit_prune.measurement.labels import block_information
from lit_prune.models import Block, dropped_by_keep_configuration, find_blocks
from lit_prune.replace import replace_mechanisms
from lit_prune.scores import Evidence, plan_method
from lit_prune.structure import CostModel, Plan, apply_plan
from lit_prune.structure.budgets import find_budget
from lit_prune.task import Task
from lit_prune.train.stages import STAND_IN_SETTINGS, BlockStage, ChannelStage, Stage

Batches = Iterable[Any]
Costs = Mapping[str, float]  # budget -> cost of the dense network, which stages keep a share of


def dense_costs(model: nn.Module, example: Any, budgets: Iterable[str] = ("macs", "params")) -> dict[str, float]:
    """Cost of the dense network under each budget."""
    return {name: find_budget(name).of(model, example) for name in budgets}


@dataclass(frozen=True)
class Probe:
    """What a network is measured with.

    Attributes:
        example: what it is called with, for tracing.
        task: what batches and outputs mean; None recognises it.
        limit: samples at the most that block information is measured on.
    """

    example: Any
    task: Task | None = None
    limit: int = 5000


def removable_in_order(blocks: tuple[Block, ...], information: Mapping[str, float]) -> list[str]:
    """Names of the blocks that may go, least information first, never emptying a stage.

    Greedy: ascending information, skipping protected blocks and the last survivor of each stage.

    Source: m2m_dc section 3.1.
    """
    left = {stage: sum(block.stage == stage for block in blocks) for stage in {block.stage for block in blocks}}
    order = []
    for block in sorted((b for b in blocks if not b.protected), key=lambda b: information[b.name]):
        if left[block.stage] > 1:
            left[block.stage] -= 1
            order.append(block.name)
    return order


def removable(blocks: tuple[Block, ...]) -> int:
    """How many blocks may go together."""
    return len(removable_in_order(blocks, {block.name: 0.0 for block in blocks}))


def blocks_of_ratio(blocks: tuple[Block, ...], ratio: float) -> int:
    """How many blocks a share of the free ones is: `floor(r * free)`, or as many as may go."""
    return min(removable(blocks), int(ratio * sum(not block.protected for block in blocks)))


def check_count(count: int, blocks: tuple[Block, ...]) -> None:
    """Raises InputError where fewer blocks may go."""
    if count > removable(blocks):
        raise InputError(
            f"stage blocks: remove_count asks for {count} blocks, and {removable(blocks)} can go (one of each stage "
            "stays); give fewer"
        )


def plan_block_stage(model: nn.Module, stage: BlockStage, batches: Batches, dense: Costs, probe: Probe) -> Plan:
    """Plan that drops the blocks with the least information about the label.

    Raises:
        InputError: the network has no removable blocks, or the stage would remove none.

    Source: m2m_dc sections 3.1 and 3.3.
    """
    blocks = find_blocks(model, probe.example)
    information = block_information(model, blocks, batches, limit=probe.limit, task=probe.task)
    notes: dict[str, Any] = {
        "information": information,
        "protected": {b.name: b.protected for b in blocks if b.protected},
    }
    names = choose_blocks(model, stage, blocks, information, probe.example, dense)
    return Plan(drop_blocks=tuple(names), keep_channels={}, sizes={}, notes=notes)


def choose_blocks(
    model: nn.Module,
    stage: BlockStage,
    blocks: tuple[Block, ...],
    information: Mapping[str, float],
    example: Any,
    dense: Costs,
) -> list[str]:
    """Names of the blocks that a stage drops. InputError: none, or too few for the budget."""
    if stage.keep_blocks is not None:
        names: list[str] = list(dropped_by_keep_configuration(blocks, stage.keep_blocks))
    else:
        order = removable_in_order(blocks, information)
        names = order[: _block_count(model, order, blocks, stage, example, dense)]
    if not names:
        raise InputError(
            f"stage blocks removes nothing: {len(blocks)} blocks, {sum(not b.protected for b in blocks)} free; "
            "raise remove_ratio, lower keep, or leave the stage out"
        )
    return names


def _block_count(
    model: nn.Module,
    order: list[str],
    blocks: tuple[Block, ...],
    stage: BlockStage,
    example: Any,
    dense: Costs,
) -> int:
    """How many blocks of `order` go: `floor(r * free)`, or as few as bring the cost under the budget."""
    if stage.remove_ratio is not None:
        return blocks_of_ratio(blocks, stage.remove_ratio)
    if stage.remove_count is not None:
        check_count(stage.remove_count, blocks)
        return stage.remove_count
    budget = stage.budget or "macs"
    quantity, target = find_budget(budget), (stage.keep or 0.0) * dense[budget]
    for count in range(len(order) + 1):
        plan = Plan(drop_blocks=tuple(order[:count]), keep_channels={}, sizes={}, notes={})
        smaller = apply_plan(model, plan, example) if count else model
        if quantity.of(smaller, example) <= target:
            return count
    raise InputError(
        f"stage blocks cannot reach keep={stage.keep} of {budget}: all {len(order)} removable blocks are too few"
    )


def plan_channel_stage(model: nn.Module, stage: ChannelStage, batches: Batches, dense: Costs, probe: Probe) -> Plan:
    """Plan that slices channels by `stage.score` until the budget, a share of the dense network's cost, is met.

    Raises:
        InputError: the network is already within the budget, or a score or budget is invalid.
    """
    keep, quantity = stage.keep, find_budget(stage.budget)
    if quantity.of_network:
        keep = stage.keep * dense[stage.budget] / quantity.of(model, probe.example)
    if keep >= 1:
        raise InputError(
            f"stage {stage.name} removes nothing: the network already costs {stage.keep / keep:.1%} of the dense "
            f"{stage.budget}, keep={stage.keep} asks for no less"
        )
    evidence = Evidence(model, batches, task=probe.task)
    cost_model = CostModel.build(model, evidence.graph, probe.example)
    there = tuple(name for name in stage.protect if name in evidence.graph.by_name)  # others went with their blocks
    plan = plan_method(evidence, stage.score, evidence.graph, cost_model, replace(stage, protect=there).request(keep))
    if plan.notes["achieved"] > keep and not plan.notes["met"]:
        warnings.warn(
            f"stage {stage.name} misses its budget: {keep:.1%} of the network's {stage.budget} asked for, "
            f"{plan.notes['achieved']:.1%} left; {plan.notes['reason']}",
            stacklevel=2,
        )
    return plan


def cut(
    model: nn.Module, plan: Plan, stage: Stage, batches: Batches, example_input: Any, task: Task | None = None
) -> tuple[nn.Module, Plan]:
    """The network after the plan with the stage's stand-ins in place, and the plan that rebuilds its structure.

    Layers in which nothing can stand in (a reader that is not affine) are left with what is kept.
    """
    if stage.stands_in == "delete":
        return apply_plan(model, plan, example_input), plan
    settings = STAND_IN_SETTINGS
    reduced = replace_mechanisms(model, plan, batches, stage.stands_in, example_input, settings=settings, task=task)
    return reduced.model, reduced.plan


def plan_stage(model: nn.Module, stage: Stage, batches: Batches, dense: Costs, probe: Probe) -> Plan:
    """Plan of any stage; see `plan_block_stage` and `plan_channel_stage`."""
    if isinstance(stage, BlockStage):
        return plan_block_stage(model, stage, batches, dense, probe)
    assert isinstance(stage, ChannelStage), "a stage is one of the two"
    return plan_channel_stage(model, stage, batches, dense, probe)
