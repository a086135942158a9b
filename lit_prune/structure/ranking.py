"""What is asked for (a budget), and the score of each unit of each group that may be pruned."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.structure.budgets import find_budget
from lit_prune.structure.groups import ChannelGraph, Group

Ranks = Mapping[str, Tensor]

BLOCKS = "blocks"
ROLES = ("mid", "planes", "heads", "width", "head_width", BLOCKS)
ASKED = ("width", "head_width")
"""Roles that go only where they are asked for."""
ALLOCATIONS = {
    "global": "one threshold over all groups",
    "uniform": "the same share of every group",
    "layerwise": "a share for each group, given as a dict",
    "measured": "widths by what they do to the prediction",
}


def _centred(scores: np.ndarray, live: np.ndarray) -> np.ndarray:
    return (scores - live.mean()) / (live.std() or 1.0)


def _quantiles(scores: np.ndarray, live: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return (rankdata(scores) - 0.5) / len(scores)


NORMALISATIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {  # (scores, finite scores) -> scores
    "none": lambda scores, live: scores,
    "layer_mean": lambda scores, live: scores / (np.abs(live).mean() or 1.0),
    "layer_max": lambda scores, live: scores / (np.abs(live).max() or 1.0),
    "rank": _quantiles,
    "z": _centred,
}
ISOMORPHIC = "isomorphic"


LEAST_KEEP = 1e-3
"""A smaller share of a network is a slip of the keyboard: no group can lose its last unit."""


@checked
@dataclass(frozen=True)
class Budget:
    """What may be kept, and how it is shared out.

    Attributes:
        kind: what is counted: "macs", "params", "channels" (units of the prunable groups), or seconds ("latency",
            "latency_64", "latency_onnx", "latency_onnx_64": measured; only `make_plan` and `plan_method` can).
        keep: share kept of the present network, in (0, 1]; with "layerwise" a dict group name -> share.
        allocation: "global" (one threshold over all groups), "uniform" (the same share in every group), "layerwise",
            or "measured" (what each group's width does to the prediction; needs data: only `plan_method` can).
        round_to: widths are multiples of it (a group that loses nothing keeps its width). None: of 8 in groups of 32
            units and more whose width is one, which kernels are made for, free in others; all are free where the budget
            cannot be used up so, as in a network of few groups.
        normalisation: of the scores inside each group before the global threshold: "none", "layer_mean" and
            "layer_max" (of absolute values), "rank" (to quantiles), "z"; or "isomorphic": to quantiles over all groups
            of one kind (heads with heads, MLP widths with MLP widths), so that each kind loses the same share.
        cap: largest share of a group that may go.
        only: "mid", "planes", "heads", "width", "head_width" (see `Group`), a list of them and of group names, or
            None for all but "width", which changes the statistics of norms, and "head_width", since one plan takes
            whole heads of an attention or narrows them. With "blocks" among them residual blocks may go as a whole too
            (allocation "measured").
        protect: names of groups that stay whole.
    """

    kind: str = "macs"
    keep: float | Mapping[str, float] = 0.5
    allocation: str = "global"
    round_to: int | None = 1
    normalisation: str = "none"
    cap: float = 0.95
    only: str | Iterable[str] | None = None
    protect: Iterable[str] = ()

    def __post_init__(self) -> None:
        """Checks the values. InputError: one is outside its range."""
        find_budget(self.kind)
        for name, value, allowed in (
            ("allocation", self.allocation, ALLOCATIONS),
            ("normalisation", self.normalisation, (*NORMALISATIONS, ISOMORPHIC)),
        ):
            if value not in allowed:
                raise InputError(f"{name}={value!r} is unknown; use one of {', '.join(allowed)}")
        if (self.round_to is not None and self.round_to < 1) or not 0 <= self.cap <= 1:
            raise InputError(f"round_to={self.round_to} must be at least 1 and cap={self.cap} within [0, 1]")
        object.__setattr__(self, "protect", _names("protect", self.protect))
        if self.only is not None and self.only not in ROLES:
            object.__setattr__(self, "only", _names("only", self.only))
        self._check_keep()

    @property
    def drops_blocks(self) -> bool:
        """Whether residual blocks may go as a whole."""
        return isinstance(self.only, tuple) and BLOCKS in self.only

    @property
    def share(self) -> float:
        """The share kept of all groups together; "layerwise" has none."""
        assert not isinstance(self.keep, Mapping), "layerwise has a share for each group"
        return self.keep

    @property
    def shares(self) -> Mapping[str, float]:
        """The shares of "layerwise", by group; empty otherwise."""
        return self.keep if isinstance(self.keep, Mapping) else {}

    def _check_keep(self) -> None:
        if (self.allocation == "layerwise") != isinstance(self.keep, Mapping):
            raise InputError(
                f"allocation={self.allocation!r} does not go with keep={self.keep!r}; 'layerwise' takes a dict "
                "{group: share kept}, the others one number"
            )
        if isinstance(self.keep, Mapping) and not self.keep:
            raise InputError("keep={}: give the share to keep of one group at least")
        for share in self.shares.values() if isinstance(self.keep, Mapping) else (self.share,):
            if not LEAST_KEEP <= share <= 1:
                raise InputError(
                    f"budget outside (0,1], or below {LEAST_KEEP}: keep={share}; give the share to keep, such as 0.5"
                )


def group_scores(graph: ChannelGraph, ranks: Ranks, request: Budget) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Normalised score of each unit of each group to be pruned, and notes on the groups left out.

    Returns:
        group name -> float64 [size]; `{"allocation", "round_to", "normalisation", "protected", "without_scores"}`.

    Raises:
        InputError: NaN scores, a wrong length, an unknown group name, or no group left.
    """
    groups = selected_groups(graph, request)
    raw = {group.name: unit_scores(graph, group, ranks) for group in groups}
    known = {name: values for name, values in raw.items() if values is not None}
    if request.normalisation == ISOMORPHIC:
        scores = _quantiles_by_kind(graph, known)
    else:
        scores = {name: normalise(values, request.normalisation) for name, values in known.items()}
    if not scores:
        widths = sum(group.role == "width" for group in graph.prunable)
        asked = f"; {widths} are widths under norms, which go where they are asked for: only='width'"
        raise InputError(
            f"nothing to prune: {len(graph.prunable)} of {len(graph.groups)} groups are prunable, {len(groups)} of "
            f"them selected (only={request.only!r}, protect={list(request.protect)}), none with scores in ranks"
            f"{asked if widths and not groups else ''}; {reasons_of(graph)}"
        )
    notes = {
        "allocation": request.allocation,
        "round_to": request.round_to,
        "normalisation": request.normalisation,
        "protected": {group.name: group.protected for group in graph.groups if group.protected},
        "without_scores": [name for name, values in raw.items() if values is None],
    }
    return scores, notes


def _quantiles_by_kind(graph: ChannelGraph, scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Quantile of each unit among all units of groups of its kind, float64 [size], in (0, 1)."""
    kinds: dict[str, list[str]] = {}
    for name in scores:
        kinds.setdefault(graph.by_name[name].kind, []).append(name)
    found: dict[str, np.ndarray] = {}
    for names in kinds.values():
        pooled = np.concatenate([scores[name] for name in names])
        ends = np.cumsum([len(scores[name]) for name in names])[:-1]
        found |= dict(zip(names, np.split(NORMALISATIONS["rank"](pooled, pooled), ends), strict=True))
    return {name: found[name] for name in scores}


def normalise(scores: np.ndarray, how: str) -> np.ndarray:
    """Scores of one group on the scale that `Budget.normalisation` names, float64 [size].

    Infinite marks stay first or last, as numbers that can be averaged.
    """
    live = scores[np.isfinite(scores)]
    return np.clip(NORMALISATIONS[how](scores, live) if len(live) else scores, -1e300, 1e300)


def _names(argument: str, value: str | Iterable[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        raise InputError(f"{argument}={value!r} is one string; give a list of group names")
    return tuple(value)


def selected_groups(graph: ChannelGraph, request: Budget) -> list[Group]:
    """The prunable groups that the request names."""
    only = tuple(name for name in request.only if name not in ROLES) if isinstance(request.only, tuple) else ()
    for argument, names in (("only", only), ("protect", request.protect)):
        for name in names:
            if name not in graph.by_name:
                some = ", ".join(list(graph.by_name)[:6])
                raise InputError(f"{argument}: no group is called {name!r}; some groups: {some}")
    for name in only:
        if graph.by_name[name].protected:
            raise InputError(f"only: group {name!r} is protected ({graph.by_name[name].protected}); leave it out")
    wanted = [group for group in graph.prunable if group.name not in request.protect]
    if request.only is None:
        named = request.keep if isinstance(request.keep, Mapping) else ()
        chosen = [group for group in wanted if group.role not in ASKED or group.name in named]
    else:
        roles = (request.only,) if isinstance(request.only, str) else request.only
        chosen = [group for group in wanted if group.role in roles or group.name in only]
    if chosen and request.round_to is not None and 1 < request.round_to >= max(group.size for group in chosen):
        widest = max(chosen, key=lambda group: group.size)
        units = "heads" if widest.role == "heads" else "units"
        raise InputError(
            f"round_to={request.round_to}: none of the {len(chosen)} selected groups has more units, {widest.name!r} "
            f"has {widest.size} {units}; give a smaller round_to"
        )
    _check_apart([group for group in chosen if not request.shares or group.name in request.shares])
    return chosen


def _check_apart(groups: list[Group]) -> None:
    """Refuses groups of which one takes heads of an attention that another narrows."""
    heads = {group.name for group in groups if group.role == "heads"}
    for group in groups:
        attention = group.name.rpartition(".")[0]
        if group.role == "head_width" and attention in heads:
            raise InputError(
                f"only: one plan takes whole heads of {attention!r} or narrows them ({group.name!r}), not both; make "
                "a plan of either and apply it before the other is made"
            )


def unit_scores(graph: ChannelGraph, group: Group, ranks: Ranks) -> np.ndarray | None:
    """Score of each unit, the mean over the members that have ranks, float64 [size]; None if none has.

    Heads and their widths may have scores of their own under the name of their group; then these alone count.
    """
    if group.of_heads and group.name in ranks:
        return _checked(group.name, ranks[group.name], group.size)
    rows = []
    for member in group.members:
        if member.axis == "out" and member.module in ranks:
            values = _checked(member.module, ranks[member.module], graph.widths[member.module, "out"])
            rows.append(values[np.array(member.positions)].mean(1))
    return np.mean(rows, axis=0) if rows else None


def equal_ranks(graph: ChannelGraph, groups: Iterable[Group]) -> dict[str, Tensor]:
    """A score of 0 for every unit of the groups: what an allocation does whatever the scores."""
    found: dict[str, Tensor] = {}
    for group in groups:
        found |= {name: torch.zeros(graph.widths[name, "out"]) for name in group.producers}
        found |= {group.name: torch.zeros(group.size)} if group.of_heads else {}
    return found


def reasons_of(graph: ChannelGraph) -> str:
    """Why groups are protected, on one line."""
    reasons = sorted({group.protected for group in graph.groups if group.protected})
    return f"protected: {'; '.join(reasons) or 'none'}"


def _checked(name: str, scores: Tensor, width: int) -> np.ndarray:
    """The scores of one layer, float64 [width]."""
    values = scores.detach().double().cpu().numpy()
    if values.shape != (width,):
        raise InputError(f"ranks[{name!r}] has shape {list(values.shape)}, the layer has {width} channels")
    if np.isnan(values).any():
        channel = int(np.flatnonzero(np.isnan(values))[0])
        raise InputError(f"ranks[{name!r}] is NaN at channel {channel}; give every channel a score")
    return values
