"""One structural stage: what it removes, decided by information, under a budget."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import nn

from lit_prune.errors import InputError
from lit_prune.measurement.labels import block_information
from lit_prune.models import Block, dropped_by_keep_configuration, find_blocks
from lit_prune.replace import Replacement, find_stand_in, replace_mechanisms
from lit_prune.scores import Evidence, find_score, plan_method
from lit_prune.structure import Budget, CostModel, Plan, apply_plan
from lit_prune.structure.budgets import find_budget
from lit_prune.task import Task

Batches = Iterable[Any]
Costs = Mapping[str, float]  # budget -> cost of the dense network, which stages keep a share of
BLOCK_AMOUNTS = ("remove_ratio", "remove_count", "keep_blocks", "keep")

STAND_IN_SETTINGS = Replacement(unsupported="delete", towards="weights")  # determined by however few samples
LEAST_KEEP = 1e-3
"""A smaller share of a network is a slip of the keyboard: no group can lose its last unit."""


@dataclass(frozen=True)
class Stage:
    """What happens at the start of an epoch of `fit`: a `BlockStage` or a `ChannelStage`."""

    @property
    def epoch(self) -> int:
        """Epoch (from 0) at whose start it happens; `compress` fills it in."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """In records, checkpoints and tables."""
        raise NotImplementedError

    @property
    def stands_in(self) -> str:
        """What stands in for what goes (`lit_prune.replace_mechanisms`)."""
        return "delete"

    def check_epoch(self) -> None:
        """Raises InputError where the epoch is below 0."""
        if self.epoch < 0:
            raise InputError(f"stage {self.name}: epoch must be >= 0, got epoch={self.epoch}")

    def to_dict(self) -> dict[str, Any]:
        """Fields as plain values, for the run's record."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class BlockStage(Stage):
    """Drops whole blocks, those with the least information about the label first. Give one of the four amounts.

    Args:
        epoch: epoch (from 0) at whose start it happens; `compress` fills it in.
        remove_ratio: share r of the free blocks to drop, `floor(r * free)`.
        remove_count: how many blocks to drop.
        keep_blocks: hand-written keep configuration `{stage: [indices of the blocks kept]}`.
        keep: share of the *dense* network's `budget` left after this stage, in (0, 1].
        budget: what `keep` counts: `macs` (the default), `params`, or another cost of a network.
    """

    epoch: int = 0
    remove_ratio: float | None = None
    remove_count: int | None = None
    keep_blocks: dict[str, list[int]] | None = None
    keep: float | None = None
    budget: str | None = None

    @property
    def name(self) -> str:
        """Blocks."""
        return "blocks"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: one is out of range, or has no effect; the line names it.
        """
        self.check_epoch()
        given = [amount for amount in BLOCK_AMOUNTS if getattr(self, amount) is not None]
        if len(given) != 1:
            raise InputError(f"stage blocks: give exactly one of {', '.join(BLOCK_AMOUNTS)}, got {given or 'none'}")
        if self.keep is not None and not LEAST_KEEP <= self.keep <= 1:
            raise InputError(f"stage blocks: keep must lie in (0, 1], at least {LEAST_KEEP}, got keep={self.keep}")
        if self.remove_ratio is not None and not 0 < self.remove_ratio < 1:
            raise InputError(f"stage blocks: remove_ratio must lie in (0, 1), got {self.remove_ratio}")
        if self.remove_count is not None and self.remove_count < 1:
            raise InputError(f"stage blocks: remove_count must be at least 1, got {self.remove_count}")
        if self.budget is not None and self.keep is None:
            raise InputError(f"stage blocks: budget={self.budget} has no effect without keep; leave it out")
        if self.budget is not None and not find_budget(self.budget).of_network:
            raise InputError(f"stage blocks: budget={self.budget} counts no blocks; use macs or params")


PARTS = {"channels": None, "planes": "planes", "mid": "mid", "heads": "heads", "width": "width"}


@dataclass(frozen=True)
class ChannelStage(Stage):
    """Slices channels; the defaults are the strongest recipe that was measured, that of `lit_prune.compress`.

    Args:
        keep: share of the *dense* network's `budget` left after this stage, in (0, 1].
        epoch: epoch (from 0) at whose start it happens; `compress` fills it in.
        part: `planes` slices the residual trunk, `mid` the channels inside the blocks, `heads` whole heads, `width`
            what norms read (see `group_role`), `channels` all but the last.
        budget: what `keep` counts: `macs`, `params`, `latency`, `channels` (the share of this stage's channels), or
            `package.module:Class`.
        score: name of the method that ranks the channels (`lit_prune.scores.SCORES`), such as `proxy` (the paper's).
        allocation: `measured` (by what the width of each group does to the prediction), `global` (one threshold), or
            `uniform` (the same share everywhere).
        normalisation: of the scores before a global threshold: none, layer_mean, layer_max, rank or z. None is none.
        round_to: widths are multiples of it.
        cap: largest share of one group that may go.
        protect: names of groups that stay whole.
        replace: what stands in for removed channels (`lit_prune.replace_mechanisms`): `refit` (every layer from the
            first cut on is solved again), combinations of kept channels (`affine`), their means (`constant`), or
            nothing (`delete`); or `package.module:Class`.
    """

    keep: float
    epoch: int = 0
    part: Literal["channels", "planes", "mid", "heads", "width"] = "channels"
    budget: str = "macs"
    score: str = "reconstruction"
    allocation: Literal["global", "uniform", "measured"] = "measured"
    normalisation: Literal["none", "layer_mean", "layer_max", "rank", "z", "isomorphic"] | None = None
    round_to: int = 1
    cap: float = 0.95
    protect: tuple[str, ...] = ()
    replace: str = "refit"

    @property
    def name(self) -> str:
        """The part that is sliced."""
        return self.part

    @property
    def stands_in(self) -> str:
        """As asked for."""
        return self.replace

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: one is out of range, or has no effect; the line names it.
        """
        self.check_epoch()
        if self.part not in PARTS:
            raise InputError(f"stage: part={self.part!r} is unknown; use one of {', '.join(PARTS)}")
        if isinstance(self.keep, bool) or not isinstance(self.keep, float | int) or not LEAST_KEEP <= self.keep <= 1:
            raise InputError(f"stage {self.name}: keep must lie in (0, 1], at least {LEAST_KEEP}, got keep={self.keep}")
        if self.normalisation is not None and self.allocation != "global":
            raise InputError(
                f"stage {self.name}: normalisation={self.normalisation} has no effect with "
                f"allocation={self.allocation}; leave it out, or set allocation=global"
            )
        try:
            find_stand_in(self.replace).check(STAND_IN_SETTINGS)
        except InputError as error:
            raise InputError(f"stage {self.name}: replace: {error}") from error
        if self.cap == 0:
            raise InputError(f"stage {self.name}: cap=0 keeps every channel; give the largest share that may go")
        self.request(self.keep)
        find_score(self.score)

    def request(self, keep: float) -> Budget:
        """The budget, as a share of the present network."""
        return Budget(
            self.budget,
            keep,
            self.allocation,
            self.round_to,
            self.normalisation or "none",
            self.cap,
            PARTS[self.part],
            self.protect,
        )


def budgets_of(stages: Iterable[Stage]) -> list[str]:
    """Budgets of which the stages keep a share of the dense network's cost; multiply-adds and parameters first."""
    named = ("macs", "params", *(budget for stage in stages if (budget := getattr(stage, "budget", None))))
    return [name for name in dict.fromkeys(named) if find_budget(name).of_network]


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


def plan_blocks(model: nn.Module, stage: BlockStage, batches: Batches, dense: Costs, probe: Probe) -> Plan:
    """Plan that drops the blocks with the least information about the label.

    Args:
        model: network as it is now.
        stage: how many go.
        batches: fixed samples, with labels.
        dense: what a budget refers to.
        probe: how it is measured.

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
    """Names of the blocks that a stage drops.

    Raises:
        InputError: none, or too few for the budget.
    """
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
        return min(len(order), int(stage.remove_ratio * sum(not block.protected for block in blocks)))
    if stage.remove_count is not None:
        return min(len(order), stage.remove_count)
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


def plan_channels(model: nn.Module, stage: ChannelStage, batches: Batches, dense: Costs, probe: Probe) -> Plan:
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
    return plan_method(evidence, stage.score, evidence.graph, cost_model, replace(stage, protect=there).request(keep))


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
    """Plan of any stage; see `plan_blocks` and `plan_channels`."""
    if isinstance(stage, BlockStage):
        return plan_blocks(model, stage, batches, dense, probe)
    assert isinstance(stage, ChannelStage), "a stage is one of the two"
    return plan_channels(model, stage, batches, dense, probe)
