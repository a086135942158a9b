"""From scores and a budget to a plan: how many channels each group keeps, and which."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.structure.budgets import STABLE, find_budget
from lit_prune.structure.cost_model import CostModel
from lit_prune.structure.groups import ChannelGraph, trace_groups
from lit_prune.structure.ladders import Ladder, cheapest_damage
from lit_prune.structure.plan import Plan
from lit_prune.structure.ranking import Budget, Ranks, group_scores
from lit_prune.structure.surgery import apply_plan
from lit_prune.structure.widths import Price, Steps, allowed_widths, global_widths, uniform_widths

MEASURED_TRIALS = 4
NEAR = 0.03  # share of a measured budget that may be left over
STEEPEST = 3.0
Measured = Mapping[str, tuple[Sequence[int], Sequence[float]]]  # group -> widths, damage at each
_TOLERANCE = 0.01


@checked
def make_plan(
    model: nn.Module,
    ranks: Ranks,
    example_input: Any,
    budget: str = "macs",
    keep: float | Mapping[str, float] = 0.5,
    allocation: str = "global",
    round_to: int = 1,
    *,
    normalisation: str = "none",
    cap: float = 0.95,
    only: str | Iterable[str] | None = None,
    protect: Iterable[str] = (),
) -> Plan:
    """Plan that keeps the channels with the best scores within a budget; the model is left as it was found.

    Args:
        model: any network that `trace_groups` can follow.
        ranks: layer name -> scores [N] of its output channels, higher = keep. A group's score is the mean over its
            layers that have scores; a group without any is not pruned.
        example_input: [B, C, H, W].
        budget: "macs", "params", "channels" or "latency", see `Budget`.
        keep: share kept of the present network, in (0, 1], or a dict for "layerwise".
        allocation: "global", "uniform" or "layerwise".
        round_to: widths are multiples of it.
        normalisation: "none", "layer_mean", "layer_max", "rank", "z" or "isomorphic".
        cap: largest share of a group that may go.
        only: "mid", "planes", "heads", "width", "head_width", a list of them and of group names, or None for all but
            the last two.
        protect: names of groups that stay whole.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> make_plan(net, {"0": torch.arange(8.0)}, torch.zeros(1, 4), keep=0.5).keep_channels
    {'0': (4, 5, 6, 7)}

    Returns:
        A plan whose cost is at most the budget and within 1 % of it; where the structure does not allow that,
        `plan.notes["met"]` is False and `plan.notes["reason"]` says where.

    Raises:
        InputError: an argument outside its range, scores that are NaN or of the wrong length, nothing to prune.
    """
    request = Budget(budget, keep, allocation, round_to, normalisation, cap, only, protect)
    graph = trace_groups(model, example_input)
    cost_model = CostModel.build(model, graph, example_input)
    if find_budget(budget).measured and allocation != "layerwise":
        plan_at = lambda priced, wanted: plan_channels(graph, priced, ranks, wanted)  # noqa: E731
        return plan_measured(model, graph, cost_model, plan_at, request, example_input)
    return plan_channels(graph, cost_model, ranks, request)


def plan_channels(graph: ChannelGraph, cost_model: CostModel, ranks: Ranks, request: Budget) -> Plan:
    """The arithmetic of `make_plan`: no forward pass, no surgery.

    The budget is met by bisection over the steps in order of their score (a step is `round_to` units of one group),
    then the best removed steps that still fit are taken back.

    Raises:
        InputError: as `make_plan`.
    """
    scores, notes = group_scores(graph, ranks, request)
    if request.allocation == "layerwise":
        return _plan_layerwise(graph, cost_model, scores, request, notes)
    _check_arithmetic(request)
    choose = global_widths if request.allocation == "global" else uniform_widths
    return _plan_widths(graph, cost_model, scores, request, notes, choose)


def plan_ladders(graph: ChannelGraph, cost_model: CostModel, ranks: Ranks, measured: Measured, request: Budget) -> Plan:
    """Plan whose widths do the least summed damage within the budget, see `cheapest_damage`.

    Args:
        graph: the groups.
        cost_model: of the same network.
        ranks: which units of a group go first.
        measured: group -> widths and the damage done when the group alone is cut to each; a group without stays whole.
        request: the budget; its `allocation` is not read.

    Raises:
        InputError: as `make_plan`.
    """
    scores, notes = group_scores(graph, ranks, request)
    left_out = [name for name in scores if name not in measured]
    scores = {name: values for name, values in scores.items() if name in measured}
    if not scores:
        raise InputError(
            f"nothing to prune: {', '.join(left_out[:6])} are read by layers that cannot be solved again; give "
            "allocation='global' or 'uniform' and a score that needs no solve, such as 'magnitude'"
        )

    def choose(steps: Steps, price: Price, target: float) -> np.ndarray:
        allowed = [allowed_widths(len(values), request.round_to, request.cap) for values in scores.values()]
        ladders = [Ladder.interpolated(*measured[name], widths) for name, widths in zip(scores, allowed, strict=True)]
        return cheapest_damage(ladders, price, target)

    return _plan_widths(graph, cost_model, scores, request, notes | {"without_damage": left_out}, choose)


def _check_arithmetic(request: Budget) -> None:
    """Refuses what needs more than scores."""
    if request.allocation == "measured":
        raise InputError("allocation='measured' has to look at data; use plan_method or compress")


def _plan_widths(
    graph: ChannelGraph,
    cost_model: CostModel,
    scores: dict[str, np.ndarray],
    request: Budget,
    notes: dict[str, Any],
    choose: Callable[[Steps, Price, float], np.ndarray],
) -> Plan:
    columns = np.array([cost_model.names.index(name) for name in scores])
    steps = Steps.build(list(scores.values()), request.round_to, request.cap)
    price = find_budget(request.kind).price(cost_model, columns)
    dense = price(steps.sizes)
    target = request.share * dense
    widths = choose(steps, price, target)
    achieved = price(widths) / dense
    reason = _shortfall(graph, steps, scores, widths, price, target)
    notes |= {"budget": request.kind, "requested": request.share, "achieved": achieved, "met": not reason}
    return _plan(scores, dict(zip(scores, widths.tolist(), strict=True)), notes | {"reason": reason})


def _shortfall(
    graph: ChannelGraph, steps: Steps, scores: dict, widths: np.ndarray, price: Callable, target: float
) -> str:
    """Why the budget is not met within 1 %, or ""."""
    achieved = price(widths)
    if achieved <= target and achieved >= (1 - _TOLERANCE) * target:
        return ""
    names = list(scores)
    dense = price(steps.sizes)
    if achieved > target:
        kept = ", ".join(group.name for group in graph.groups if group.name not in scores)
        return (
            f"with every selected group at its smallest width (cap, round_to) {achieved / dense:.4f} remains; "
            f"not pruned: {kept or 'none'}"
        )
    larger = {name: steps.wider(index, widths) for index, name in enumerate(names)}
    rises = {name: price(wide) - achieved for name, wide in larger.items() if wide is not None}
    name = min(rises, key=rises.__getitem__) if rises else ""
    return (
        f"widths are too coarse: the smallest step back, in {name!r}, is {rises[name] / dense:.4f} of the dense cost"
        if name
        else ""
    )


def _plan(scores: Mapping[str, np.ndarray], widths: Mapping[str, int], notes: dict[str, Any]) -> Plan:
    """Keeps the best units of each group; a tie goes to the lower index. Groups that lose nothing are not named."""
    keep, sizes = {}, {}
    for name, values in scores.items():
        if widths[name] < len(values):
            best = np.argsort(-values, kind="stable")[: widths[name]]
            keep[name], sizes[name] = tuple(np.sort(best).tolist()), len(values)
    return Plan((), keep, sizes, notes)


def _plan_layerwise(
    graph: ChannelGraph, cost_model: CostModel, scores: dict[str, np.ndarray], request: Budget, notes: dict[str, Any]
) -> Plan:
    """Given shares: widths to the nearest allowed one."""
    for name in request.shares:
        if name not in scores:
            known = graph.by_name.get(name)
            why = (
                "there is no such group" if known is None else known.protected or "it is not selected or has no scores"
            )
            raise InputError(f"keep[{name!r}]: {why}; the groups are {', '.join(list(scores)[:6])}")
    chosen = {name: scores[name] for name in scores if name in request.shares}
    steps = Steps.build(list(chosen.values()), request.round_to, request.cap)
    shares = np.array([request.shares[name] for name in chosen])
    widths = dict(zip(chosen, steps.nearest(shares * steps.sizes).tolist(), strict=True))
    plan = _plan(chosen, widths, notes)
    macs = cost_model.macs(cost_model.widths(plan.keep_channels)) / cost_model.macs(cost_model.sizes)
    found = {"budget": "layerwise", "requested": dict(request.shares), "achieved": macs, "met": True, "reason": ""}
    return replace(plan, notes=notes | found)


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
    for _ in range(MEASURED_TRIALS):
        share = lambda widths, slope=slope: 1 - slope * (1 - work(widths) / whole)  # noqa: E731
        wanted = request if not trials else replace(request, keep=request.share * (1 - NEAR / 2))
        plan = plan_at(replace(cost_model, measured=share), wanted)
        widths = cost_model.widths(plan.keep_channels)
        if any(plan.keep_channels == other.keep_channels for other in trials):
            break  # the nearest that there is
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
