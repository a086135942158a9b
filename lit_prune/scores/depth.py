"""Residual blocks that may go as a whole, as one more width of the group inside them: none."""

from collections.abc import Mapping

from torch import nn

from lit_prune.errors import InputError
from lit_prune.models import find_blocks
from lit_prune.models.residual import residual_blocks
from lit_prune.running import undisturbed
from lit_prune.structure.allocation import Measured
from lit_prune.structure.example import Example
from lit_prune.structure.groups import ChannelGraph


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
