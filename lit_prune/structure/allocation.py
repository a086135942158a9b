"""From scores and a budget to a plan: how many channels each group keeps, and which."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.structure.budgets import find_budget
from lit_prune.structure.cost_model import CostModel
from lit_prune.structure.groups import ChannelGraph, trace_groups
from lit_prune.structure.ladders import Ladder, cheapest_damage
from lit_prune.structure.measured_budget import plan_measured
from lit_prune.structure.plan import Plan
from lit_prune.structure.ranking import Budget, Ranks, group_scores
from lit_prune.structure.widths import Price, Steps, allowed_widths, global_widths, uniform_widths

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
    round_to: int | None = 1,
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
        round_to: widths are multiples of it, see `Budget`.
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
    check_no_blocks(request)
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
    if request.allocation == "measured":
        raise InputError("allocation='measured' has to look at data; use plan_method or compress")
    choose = global_widths if request.allocation == "global" else uniform_widths
    plan = _plan_widths(graph, cost_model, scores, request, notes, choose)
    return plan_channels(graph, cost_model, ranks, replace(request, round_to=1)) if _is_coarse(plan, request) else plan


def plan_ladders(
    graph: ChannelGraph,
    cost_model: CostModel,
    ranks: Ranks,
    measured: Measured,
    request: Budget,
    blocks: Mapping[str, str] | None = None,
) -> Plan:
    """Plan whose widths do the least summed damage within the budget, see `cheapest_damage`.

    Args:
        graph: the groups.
        cost_model: of the same network.
        ranks: which units of a group go first.
        measured: group -> widths and the damage done when the group alone is cut to each; a group without stays whole.
        request: the budget; its `allocation` is not read.
        blocks: group -> block that is dropped where the group is left nothing; a width of 0 is among those measured.

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
        none = [np.zeros(int(0 in measured[name][0]), dtype=np.int64) for name in scores]
        allowed = [np.concatenate(pair) for pair in zip(none, allowed, strict=True)]
        ladders = [Ladder.interpolated(*measured[name], widths) for name, widths in zip(scores, allowed, strict=True)]
        return cheapest_damage(ladders, price, target)

    plan = _plan_widths(graph, cost_model, scores, request, notes | {"without_damage": left_out}, choose, blocks)
    if _is_coarse(plan, request):
        return plan_ladders(graph, cost_model, ranks, measured, replace(request, round_to=1), blocks)
    return plan


def _is_coarse(plan: Plan, request: Budget) -> bool:
    """Whether nobody asked for even widths and the budget cannot be used up with them."""
    return request.round_to is None and bool(plan.notes["reason"])


def check_no_blocks(request: Budget) -> None:
    """Refuses to drop blocks by scores of channels."""
    if request.drops_blocks:
        raise InputError(f"only: 'blocks' go by allocation='measured' alone, not by {request.allocation!r}")


def _plan_widths(
    graph: ChannelGraph,
    cost_model: CostModel,
    scores: dict[str, np.ndarray],
    request: Budget,
    notes: dict[str, Any],
    choose: Callable[[Steps, Price, float], np.ndarray],
    blocks: Mapping[str, str] | None = None,
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
    return _plan(scores, dict(zip(scores, widths.tolist(), strict=True)), notes | {"reason": reason}, blocks or {})


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


def _plan(
    scores: Mapping[str, np.ndarray], widths: Mapping[str, int], notes: dict[str, Any], blocks: Mapping[str, str] = {}
) -> Plan:
    """Keeps the best units of each group; a tie goes to the lower index. Groups that lose nothing are not named.

    A group that is left nothing goes with its block; `notes["dropped"]` says which.
    """
    keep, sizes = {}, {}
    dropped = {name: block for name, block in blocks.items() if not widths.get(name, 1)}
    for name, values in scores.items():
        if name not in dropped and widths[name] < len(values):
            best = np.argsort(-values, kind="stable")[: widths[name]]
            keep[name], sizes[name] = tuple(np.sort(best).tolist()), len(values)
    return Plan(tuple(dropped.values()), keep, sizes, notes | ({"dropped": dropped} if dropped else {}))


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
