"""What a run's stages ask of the network, compared with the network before anything is trained."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lit_prune.errors import InputError
from lit_prune.models import Block, find_blocks
from lit_prune.structure import CostModel
from lit_prune.structure.allocation import plan_channels
from lit_prune.structure.budgets import find_budget
from lit_prune.structure.groups import ChannelGraph, Group, trace_groups
from lit_prune.structure.ranking import equal_ranks, reasons_of, selected_groups
from lit_prune.structure.tracing import one_sample, run, traceable
from lit_prune.task.detection import detector_heads
from lit_prune.task.outputs import shared_outputs
from lit_prune.train.distillation import Repair, input_width, last_layer, nothing_shared
from lit_prune.train.stage_plans import check_count, choose_blocks, dense_costs
from lit_prune.train.stages import BlockStage, ChannelStage, Stage, budgets_of


def check_stages(network: nn.Module, stages: Sequence[Stage], example: Any, is_dense: bool = True) -> list[Group]:
    """Refuses stages that name what the network does not have, or ask for what it cannot lose.

    What depends on an earlier stage's choice is left to the stage itself. The network is left as it was found.

    Args:
        network: as it is now.
        stages: those to come.
        example: what the network is called with.
        is_dense: whether it is the network that budgets refer to; else the amounts are not looked at.

    Returns:
        The groups that some stage may cut.

    Raises:
        InputError: as said; the stage is named.
    """
    _check_order(stages)
    blocks, graph, cut = None, None, []
    for place, stage in enumerate(stages):
        first = is_dense and place == 0
        if isinstance(stage, BlockStage):
            blocks = blocks if blocks is not None else find_blocks(network, example)
            earlier = [one for one in stages[:place] if isinstance(one, BlockStage)]
            check_count(sum(one.remove_count or 0 for one in (*earlier, stage)), blocks)  # of those that say how many
            _check_blocks(network, stage, blocks, example, first, not earlier)
        elif isinstance(stage, ChannelStage):
            graph = graph or trace_groups(network, example)
            cut += _check_channels(network, stage, graph, example, first)
    return cut


def _check_order(stages: Sequence[Stage]) -> None:
    """Refuses a share of the dense network's cost that an earlier stage leaves no more than already."""
    least: dict[str, tuple[float, str]] = {}
    for stage in stages:
        keep, budget = getattr(stage, "keep", None), getattr(stage, "budget", None) or "macs"
        if keep is None or not find_budget(budget).of_network:
            continue
        before, name = least.get(budget, (1.0, "the dense network"))
        if keep >= before:
            raise InputError(
                f"stage {stage.name} removes nothing: keep={keep} of the dense {budget}, and {name} leaves "
                f"{before:g}; lower keep, or leave the stage out"
            )
        least[budget] = keep, f"stage {stage.name} before it"


def _check_blocks(
    network: nn.Module, stage: BlockStage, blocks: tuple[Block, ...], example: Any, first: bool, whole: bool
) -> None:
    """The most expensive blocks go first here, so that a budget that they do not meet cannot be met."""
    if not blocks:
        raise InputError(f"stage blocks: {type(network).__name__} has no block that could go; use a ChannelStage")
    quantity = find_budget(stage.budget or "macs")
    quantity.check(example)
    counted = stage.keep is None or not quantity.measured
    if (first and counted) or (whole and stage.keep_blocks is not None):
        sizes = {block.name: -_size(network, block) for block in blocks}
        choose_blocks(network, stage, blocks, sizes, example, dense_costs(network, example, budgets_of([stage])))


def _size(network: nn.Module, block: Block) -> int:
    parts = (network.get_submodule(member) for member in block.members)
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def _check_channels(
    network: nn.Module, stage: ChannelStage, graph: ChannelGraph, example: Any, first: bool
) -> list[Group]:
    request = stage.request(stage.keep)
    try:
        groups = selected_groups(graph, request)
    except InputError as error:
        raise InputError(f"stage {stage.name}: {error}") from error
    if not groups:
        raise InputError(
            f"stage {stage.name}: no group of channels may be cut (part={stage.part}, protect={list(stage.protect)}; "
            f"{reasons_of(graph)}); leave the stage out, or choose another part"
        )
    quantity = find_budget(stage.budget)
    quantity.check(example)
    if first and not quantity.measured:
        _check_amount(network, stage, graph, groups, example)
    return groups


def _check_amount(
    network: nn.Module, stage: ChannelStage, graph: ChannelGraph, groups: Sequence[Group], example: Any
) -> None:
    """Whatever the scores and the allocation, no network is smaller than with every group at its smallest width."""
    scores = equal_ranks(graph, groups)
    request = replace(stage.request(stage.keep), allocation="uniform", normalisation="none")
    plan = plan_channels(graph, CostModel.build(network, graph, example), scores, request)
    if plan.notes["achieved"] > stage.keep:
        raise InputError(f"stage {stage.name} cannot reach keep={stage.keep} of {stage.budget}: {plan.notes['reason']}")


def check_teacher(repair: Repair, teacher: nn.Module, network: nn.Module, example: Any, cut: Sequence[Group]) -> None:
    """Refuses a teacher of somebody else's that the network could not be compared with.

    Args:
        repair: how they will be compared.
        teacher: the network to learn from, on the device of `network`.
        network: the one that is taught, before its stages.
        example: what both are called with.
        cut: groups that a stage may cut.

    Raises:
        InputError: it does not take the network's inputs, answers something else, or has other features.
    """
    sample = one_sample(network, example)
    with traceable(network), torch.no_grad():
        answer = run(network, sample)
    with traceable(teacher), torch.no_grad():
        try:
            wanted = run(teacher, sample)
        except InputError as error:
            raise InputError(f"teacher: {error}") from error
    if not detector_heads(network) and not shared_outputs(answer, wanted):  # what a detector finds is compared at heads
        raise InputError(f"teacher: {nothing_shared(answer, wanted)}")
    if not repair.beta:
        return
    name = last_layer(teacher)
    other = input_width(teacher, name) != _width_or_none(network, name)
    if other or any(name in group.consumers for group in cut):
        why = "has other features than the network" if other else f"has features that a stage cuts (inputs of {name})"
        raise InputError(f"teacher {why}, which cannot be compared; set beta=0 in repair")


def _width_or_none(network: nn.Module, name: str) -> int | None:
    try:
        return input_width(network, name)
    except AttributeError:
        return None
