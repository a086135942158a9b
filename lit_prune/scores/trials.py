"""How much of a predicted damage is left once the layers behind it are solved again too: trials of a plan's parts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lit_prune.progress import watched
from lit_prune.replace import Replacement
from lit_prune.replace.replacement import refitted, take_batches
from lit_prune.running import undisturbed
from lit_prune.scores.evidence import Evidence
from lit_prune.structure import ChannelGraph, Plan
from lit_prune.structure.allocation import Measured
from lit_prune.structure.ladders import Ladder
from lit_prune.task import Task

TRIAL = Replacement(towards="weights", rows=25_000, clipped=False, unsupported="delete")
IMAGES = 128  # for the solves of a trial, and as many others to judge it by
DEPTHS = 3  # parts of a role in forward order
SMALLEST = 4  # groups in a part, where a role is divided
BOUNDS = (0.1, 10.0)


def corrected_damage(evidence: Evidence, graph: ChannelGraph, measured: Measured, plan: Plan) -> Measured:
    """The tables of damage, each times a factor that is measured for its part of the network.

    A table says what the prediction loses when one group is cut and its readers are solved again. In `refit` all later
    layers are solved too, and repair more of a cut in an early block than of one near the end, and more of one inside a
    block than of one in the trunk. So each part of a plan (role, and place in forward order) is tried alone on a few
    samples: the squared change of the prediction over the one predicted is the factor of all groups of the part. Blocks
    that go as a whole are a part, and have a factor of their own.

    Args:
        evidence: the network and its calibration batches.
        graph: groups of the network.
        measured: group -> widths, damage at each.
        plan: which widths to try; a plan of a single part needs no trial.
    """
    parts = plan_parts(graph, plan)
    if len(parts) + bool(plan.drop_blocks) < 2:
        return measured
    samples = _samples(evidence)
    factors: dict[str, float] = {}
    for names in watched(parts, "parts of the plan tried"):
        part = Plan((), {n: plan.keep_channels[n] for n in names}, {n: plan.sizes[n] for n in names})
        expected = sum(_predicted(measured[name], len(plan.keep_channels[name])) for name in names)
        factors |= dict.fromkeys(names, _factor(evidence, part, samples, expected))
    dropped = 1.0
    if plan.drop_blocks:
        expected = sum(measured[name][1][0] for name in plan.notes["dropped"])
        dropped = _factor(evidence, Plan(plan.drop_blocks), samples, expected)
    return {
        name: (widths, _scaled(widths, errors, factors.get(name, 1.0), dropped))
        for name, (widths, errors) in measured.items()
    }


def _factor(evidence: Evidence, part: Plan, samples: tuple[list[Any], list[Any]], expected: float) -> float:
    """What a part of a plan does to the prediction, over what the tables say of it."""
    fitted, judged = samples
    small = refitted(evidence.model, part, fitted, evidence.example, TRIAL, evidence.task)
    found = _change(evidence.model, small, judged, evidence.task)
    return float(np.clip(found / expected, *BOUNDS)) if expected else 1.0


def plan_parts(graph: ChannelGraph, plan: Plan) -> list[list[str]]:
    """The groups that lose units, by role, and by place in forward order where a role has many."""
    roles: dict[str, list[str]] = {}
    for group in graph.prunable:
        if plan.removed(group.name):
            roles.setdefault(group.role, []).append(group.name)
    parts = []
    for names in roles.values():
        count = min(DEPTHS, max(1, len(names) // SMALLEST))
        parts += [part.tolist() for part in np.array_split(names, count)]
    return parts


def _samples(evidence: Evidence) -> tuple[list[Any], list[Any]]:
    """Samples to solve with, and others to judge by; the same where there is one only."""
    task = evidence.task
    batches = take_batches(evidence.batches, 2 * IMAGES, task)
    half = min(IMAGES, sum(map(task.size, batches)) // 2)
    taken: tuple[list[Any], list[Any]] = ([], [])
    counts = [0, 0]
    for batch in batches:
        start = 0
        for place in (0, 1):
            count = min(half - counts[place], task.size(batch) - start)
            if count > 0:
                taken[place].append(task.take(batch, slice(start, start + count)))
                counts[place], start = counts[place] + count, start + count
    return taken if half else (batches, batches)


def _change(model: nn.Module, small: nn.Module, batches: Sequence[Any], task: Task) -> float:
    """Squared change of the prediction, mean over samples."""
    total, count = 0.0, 0
    with undisturbed(model), undisturbed(small), torch.no_grad():
        for batch in batches:
            batch = task.to(batch, model)
            before, after = (task.compared(task.run(net, batch)).double() for net in (model, small))
            total, count = total + float((after - before).square().sum()), count + len(before)
    return total / count


def _predicted(table: tuple[Sequence[int], Sequence[float]], width: int) -> float:
    """Damage at a width, between those measured."""
    widths, errors = table
    return float(Ladder.interpolated(widths, errors, np.arange(1, max(widths) + 1)).errors[width - 1])


def _scaled(widths: Sequence[int], errors: Sequence[float], factor: float, dropped: float) -> list[float]:
    return [(factor if width else dropped) * error for width, error in zip(widths, errors, strict=True)]
