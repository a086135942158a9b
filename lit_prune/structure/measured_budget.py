"""A budget of what can only be measured, such as seconds: plans by what it grows with, cut and measured."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from lit_prune.structure.budgets import STABLE, find_budget
from lit_prune.structure.cost_model import CostModel
from lit_prune.structure.groups import ChannelGraph
from lit_prune.structure.plan import Plan
from lit_prune.structure.ranking import Budget
from lit_prune.structure.surgery import apply_plan

MEASURED_TRIALS = 4
NEAR = 0.03  # share of a measured budget that may be left over
STEEPEST = 3.0


def plan_measured(
    model: nn.Module,
    graph: ChannelGraph,
    cost_model: CostModel,
    plan_at: Callable[[CostModel, Budget], Plan],
    request: Budget,
    example_input: Any,
) -> Plan:
    """Plans by what the cost grows with (`Quantity.work`), cut and measured until one is within the budget.

    The share of the dense cost is taken to be `1 - slope · (1 - work / dense work)`: with a slope of 1 first, then with
    the one that the last network has shown. Each takes turns with the dense network; `notes["spread"]` says by how much
    the latter's figures differ from trial to trial, relative to their median. Above `STABLE` a warning says so.

    Args:
        model: the network.
        graph: its groups.
        cost_model: of the same network.
        plan_at: plan for a budget under the prices of a cost model.
        request: the budget of a measured quantity, such as latency.
        example_input: the batch that is measured with.

    Returns:
        The plan that was measured nearest below the budget; notes: `achieved` (measured), `predicted`, `spread`,
        `macs_achieved`.
    """
    quantity = find_budget(request.kind)
    quantity.check(example_input)
    work = quantity.work(model, graph, cost_model, example_input)
    slope, whole, dense = 1.0, work(cost_model.sizes), []
    trials: list[Plan] = []
    seen: list[np.ndarray] = []
    for _ in range(MEASURED_TRIALS):
        share = lambda widths, slope=slope: 1 - slope * (1 - work(widths) / whole)  # noqa: E731
        wanted = request if not trials else replace(request, keep=request.share * (1 - NEAR / 2))
        plan = plan_at(replace(cost_model, measured=share), wanted)
        widths = cost_model.widths({**plan.keep_channels, **dict.fromkeys(plan.notes.get("dropped", ()), ())})
        if any((widths == other).all() for other in seen):
            break  # the nearest that there is
        seen.append(widths)
        small = model if plan.removes_nothing else apply_plan(model, plan, example_input)
        before, after = quantity.compare([model, small], example_input)
        dense.append(before)
        notes = {"predicted": share(widths), "achieved": after / before, "reason": plan.notes["reason"]}
        notes["macs_achieved"] = cost_model.macs(widths) / cost_model.macs(cost_model.sizes)
        trials.append(replace(plan, notes={**plan.notes, **notes}))
        if (1 - NEAR) * request.share <= notes["achieved"] <= request.share:
            break
        if work(widths) < whole:
            slope = float(np.clip((1 - notes["achieved"]) / (1 - work(widths) / whole), 1 / STEEPEST, STEEPEST))
    dense.append(quantity.compare([model], example_input)[0])  # one trial alone would say nothing of the spread
    return _nearest(trials, request, _spread(dense, request.kind, quantity.unit))


def _nearest(trials: Sequence[Plan], request: Budget, spread: float) -> Plan:
    """The plan that was measured nearest below the budget, or else the least."""
    achieved = np.array([plan.notes["achieved"] for plan in trials])
    met = bool((achieved <= request.share).any())
    plan = trials[int(np.argmax(np.where(achieved <= request.share, achieved, -1)) if met else np.argmin(achieved))]
    least = f"the best of {len(trials)} trials still takes {achieved.min():.3f} of the dense {request.kind}"
    reason = "" if met else f"{least}; {plan.notes['reason']}".removesuffix("; ")
    notes = {"budget": request.kind, "requested": request.share, "met": met, "reason": reason, "spread": spread}
    return replace(plan, notes={**plan.notes, **notes})


def _spread(values: Sequence[float], kind: str, unit: str) -> float:
    """Range over median of repeated measurements; warns where the device has no stable timing."""
    spread = (max(values) - min(values)) / float(np.median(values))
    if spread > STABLE:
        warnings.warn(
            f"{kind}: the dense network took {min(values):.3g} to {max(values):.3g} {unit} in {len(values)} "
            f"measurements, a spread of {spread:.0%}; the budget is met no more exactly than that: "
            "repeat it on an idle device, or give budget='macs'",
            stacklevel=3,
        )
    return spread
