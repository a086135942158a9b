"""One structural stage: what it removes, decided by information, under a budget."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.labels import block_information
from lit_prune.models import Block, dropped_by_keep_configuration, find_blocks
from lit_prune.replace import Replacement, replace_mechanisms
from lit_prune.scores import Evidence, plan_method
from lit_prune.structure import Budget, CostModel, Plan, apply_plan, cost, measure_latency

Batches = Iterable[tuple[Tensor, Tensor]]
BLOCK_AMOUNTS = ("remove_ratio", "remove_count", "keep_blocks", "keep")


@dataclass(frozen=True)
class PruningStage:
    """What one stage removes, and when.

    Args:
        kind: `blocks` drops whole blocks; `planes` slices the residual trunk, `mid` the channels inside the blocks,
            `channels` both.
        epoch: epoch (from 0) at whose start it happens; `compress` fills it in.
        remove_ratio: blocks only: share r of the free blocks to drop, `floor(r * free)`.
        remove_count: blocks only: how many blocks to drop.
        keep_blocks: blocks only: hand-written keep configuration `{stage: [indices of the blocks kept]}`.
        keep: share of the *dense* network's budget left after this stage, in (0, 1].
        budget: what `keep` counts: `macs`, `params`, `latency`, or `channels` (the share of this stage's channels).
        score: name of the method that ranks the channels (`lit_prune.scores.SCORES`), such as `hybrid`.
        allocation: `global` (one threshold) or `uniform` (the same share everywhere).
        normalisation: of the scores before a global threshold: none, layer_mean, layer_max, rank or z.
        round_to: widths are multiples of it.
        cap: largest share of one group that may go.
        protect: names of groups that stay whole.
        replace: what stands in for removed channels (`lit_prune.replace_mechanisms`): nothing (`delete`), their means
            (`constant`), combinations of kept channels (`affine`), or the readers solved again (`refit`).
    """

    kind: Literal["blocks", "planes", "mid", "channels"]
    epoch: int = 0
    remove_ratio: float | None = None
    remove_count: int | None = None
    keep_blocks: dict[str, list[int]] | None = None
    keep: float | None = None
    budget: Literal["macs", "params", "latency", "channels"] = "macs"
    score: str = "proxy"
    allocation: Literal["global", "uniform"] = "uniform"
    normalisation: Literal["none", "layer_mean", "layer_max", "rank", "z", "isomorphic"] = "none"
    round_to: int = 1
    cap: float = 0.95
    protect: tuple[str, ...] = ()
    replace: Literal["delete", "constant", "affine", "refit"] = "delete"

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            InputError: a share outside its range, or not exactly one way to say how much goes.
        """
        if self.keep is not None and not 0 < self.keep <= 1:
            raise InputError(f"stage {self.kind}: keep must lie in (0, 1], got keep={self.keep}")
        if self.remove_ratio is not None and not 0 < self.remove_ratio < 1:
            raise InputError(f"stage {self.kind}: remove_ratio must lie in (0, 1), got {self.remove_ratio}")
        if self.epoch < 0:
            raise InputError(f"stage {self.kind}: epoch must be >= 0, got epoch={self.epoch}")
        given = [name for name in (*BLOCK_AMOUNTS,) if getattr(self, name) is not None]
        allowed = BLOCK_AMOUNTS if self.kind == "blocks" else ("keep",)
        if self.kind == "blocks" and self.replace != "delete":
            raise InputError(f"stage blocks: a whole block has no stand-in, got replace={self.replace}; use delete")
        if len(given) != 1 or given[0] not in allowed:
            raise InputError(f"stage {self.kind}: give exactly one of {', '.join(allowed)}, got {given or 'none'}")

    def to_dict(self) -> dict[str, Any]:
        """Fields as plain values, for the run's record."""
        return asdict(self)


@dataclass(frozen=True)
class DenseCost:
    """Cost of the dense network, which budgets refer to; `latency` in seconds at batch 1, NaN where not measured."""

    macs: int
    params: int
    latency: float = float("nan")

    @classmethod
    def of(cls, model: nn.Module, example_input: Tensor, with_latency: bool = False) -> "DenseCost":
        """Counts `model`; the latency is measured only where a budget needs it."""
        counted = cost(model, example_input)
        seconds = measure_latency(model, tuple(example_input.shape[1:])) if with_latency else float("nan")
        return cls(counted.macs, counted.params, seconds)


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


def plan_blocks(
    model: nn.Module, stage: PruningStage, batches: Batches, example_input: Tensor, dense: DenseCost, limit: int = 5000
) -> Plan:
    """Plan that drops the blocks with the least information about the label.

    Args:
        model: network as it is now.
        stage: of kind `blocks`.
        batches: fixed probe of `(images, labels)`.
        example_input: one image, for tracing.
        dense: what a budget refers to.
        limit: probe images at the most.

    Raises:
        InputError: the network has no removable blocks, or the stage would remove none.

    Source: m2m_dc sections 3.1 and 3.3.
    """
    blocks = find_blocks(model, example_input)
    information = block_information(model, blocks, batches, limit=limit)
    notes: dict[str, Any] = {
        "information": information,
        "protected": {b.name: b.protected for b in blocks if b.protected},
    }
    if stage.keep_blocks is not None:
        names: list[str] = list(dropped_by_keep_configuration(blocks, stage.keep_blocks))
    else:
        order = removable_in_order(blocks, information)
        names = order[: _block_count(model, order, blocks, stage, example_input, dense)]
    if not names:
        raise InputError(
            f"stage blocks removes nothing: {len(blocks)} blocks, {sum(not b.protected for b in blocks)} free; "
            "raise remove_ratio, lower keep, or leave the stage out"
        )
    return Plan(drop_blocks=tuple(names), keep_channels={}, sizes={}, notes=notes)


def _block_count(
    model: nn.Module,
    order: list[str],
    blocks: tuple[Block, ...],
    stage: PruningStage,
    example: Tensor,
    dense: DenseCost,
) -> int:
    """How many blocks of `order` go: `floor(r * free)`, or as few as bring the cost under the budget."""
    if stage.remove_ratio is not None:
        return min(len(order), int(stage.remove_ratio * sum(not block.protected for block in blocks)))
    if stage.remove_count is not None:
        return min(len(order), stage.remove_count)
    if stage.budget not in ("macs", "params"):
        raise InputError(f"stage blocks: keep counts macs or params, got budget={stage.budget}")
    target = stage.keep * getattr(dense, stage.budget)
    for count in range(len(order) + 1):
        plan = Plan(drop_blocks=tuple(order[:count]), keep_channels={}, sizes={}, notes={})
        smaller = apply_plan(model, plan, example) if count else model
        if getattr(cost(smaller, example), stage.budget) <= target:
            return count
    raise InputError(
        f"stage blocks cannot reach keep={stage.keep} of {stage.budget}: all {len(order)} removable blocks are too few"
    )


def plan_channels(
    model: nn.Module, stage: PruningStage, batches: Batches, example_input: Tensor, dense: DenseCost, seed: int = 0
) -> Plan:
    """Plan that slices channels by `stage.score` until the budget, a share of the dense network's cost, is met.

    Raises:
        InputError: the network is already within the budget, or a score or budget is invalid.
    """
    keep = stage.keep
    if stage.budget in ("macs", "params"):
        keep = stage.keep * getattr(dense, stage.budget) / getattr(cost(model, example_input), stage.budget)
    elif stage.budget == "latency":
        keep = stage.keep * dense.latency / measure_latency(model, tuple(example_input.shape[1:]))
    if keep >= 1:
        raise InputError(
            f"stage {stage.kind} removes nothing: the network already costs {stage.keep / keep:.1%} of the dense "
            f"{stage.budget}, keep={stage.keep} asks for no less"
        )
    request = Budget(
        stage.budget,
        keep,
        stage.allocation,
        stage.round_to,
        stage.normalisation,
        stage.cap,
        None if stage.kind == "channels" else stage.kind,
        stage.protect,
    )
    evidence = Evidence(model, batches, seed=seed)
    cost_model = CostModel.build(model, evidence.graph, example_input)
    return plan_method(evidence, stage.score, evidence.graph, cost_model, request)


def cut(
    model: nn.Module, plan: Plan, stage: PruningStage, batches: Batches, example_input: Tensor
) -> tuple[nn.Module, Plan]:
    """The network after the plan with the stage's stand-ins in place, and the plan that rebuilds its structure.

    Layers in which nothing can stand in (a reader that is not affine) are left with what is kept.
    """
    if stage.replace == "delete":
        return apply_plan(model, plan, example_input), plan
    settings = Replacement(unsupported="delete")
    reduced = replace_mechanisms(model, plan, batches, example_input, stage.replace, settings=settings)
    return reduced.model, reduced.plan


def plan_stage(
    model: nn.Module, stage: PruningStage, batches: Batches, example_input: Tensor, dense: DenseCost, limit: int = 5000
) -> Plan:
    """Plan of any stage; see `plan_blocks` and `plan_channels`."""
    if stage.kind == "blocks":
        return plan_blocks(model, stage, batches, example_input, dense, limit)
    return plan_channels(model, stage, batches, example_input, dense)
