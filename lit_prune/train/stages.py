"""One structural stage: what is asked of it, checked as it is written."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.replace import Replacement, find_stand_in
from lit_prune.scores import find_score
from lit_prune.structure import Budget
from lit_prune.structure.budgets import find_budget
from lit_prune.structure.ranking import LEAST_KEEP

BLOCK_AMOUNTS = ("remove_ratio", "remove_count", "keep_blocks", "keep")

STAND_IN_SETTINGS = Replacement(unsupported="delete", towards="weights", noise=0.1)
"""Determined by however few samples; bears the training that follows."""


class Stage:
    """What happens at the start of an epoch of `fit`: a `BlockStage` or a `ChannelStage`.

    Itself no dataclass, since configurations name the subclass.
    """

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
        return {"name": self.name, **asdict(cast("Any", self))}

    def moved(self, epoch: int) -> "Stage":
        """The same at another epoch."""
        return replace(cast("Any", self), epoch=epoch)


@checked
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
        """Checks the values. InputError: one is out of range, or has no effect; the line names it."""
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


ROLES = ("planes", "mid", "heads", "width", "head_width")
PARTS = {"channels": None, **{role: role for role in ROLES}}


@checked
@dataclass(frozen=True)
class ChannelStage(Stage):
    """Slices channels; the defaults are those of `lit_prune.compress`.

    But the layers of a block are not solved together afterwards: the training that follows does that.

    Args:
        keep: share of the *dense* network's `budget` left after this stage, in (0, 1].
        epoch: epoch (from 0) at whose start it happens; `compress` fills it in.
        part: `planes` slices the residual trunk, `mid` the channels inside the blocks, `heads` whole heads, `width`
            what norms read, `head_width` the width of heads (see `Group`), `channels` all but the last two.
        budget: what `keep` counts: `macs`, `params`, `latency`, `channels` (the share of this stage's channels), or
            `package.module:Class`.
        score: name of the method that ranks the channels (`lit_prune.scores.SCORES`), such as `proxy` (the paper's).
        allocation: `measured` (by what the width of each group does to the prediction), `global` (one threshold), or
            `uniform` (the same share everywhere).
        normalisation: of the scores before a global threshold: none, layer_mean, layer_max, rank or z. None is none.
        round_to: widths are multiples of it; None: of 8 where a group has 32 units and more, see `Budget`.
        cap: largest share of one group that may go.
        protect: names of groups that stay whole.
        replace: what stands in for removed channels (`lit_prune.replace_mechanisms`): `refit` (every layer from the
            first cut on is solved again), combinations of kept channels (`affine`), their means (`constant`), or
            nothing (`delete`); or `package.module:Class`.
    """

    keep: float
    epoch: int = 0
    part: Literal["channels", "planes", "mid", "heads", "width", "head_width"] = "channels"
    budget: str = "macs"
    score: str = "reconstruction"
    allocation: Literal["global", "uniform", "measured"] = "measured"
    normalisation: Literal["none", "layer_mean", "layer_max", "rank", "z", "isomorphic"] | None = None
    round_to: int | None = None
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
        """Checks the values. InputError: one is out of range, or has no effect; the line names it."""
        self.check_epoch()
        if not LEAST_KEEP <= self.keep <= 1:
            raise InputError(f"stage {self.name}: keep must lie in (0, 1], at least {LEAST_KEEP}, got keep={self.keep}")
        if self.normalisation is not None and self.allocation != "global":
            raise InputError(
                f"stage {self.name}: normalisation={self.normalisation} has no effect with "
                f"allocation={self.allocation}; leave it out, or set allocation=global"
            )
        if self.cap == 0:
            raise InputError(f"stage {self.name}: cap=0 keeps every channel; give the largest share that may go")
        argument = ""
        try:
            self.request(self.keep)
            find_score(self.score)
            argument = "replace: "
            find_stand_in(self.replace).check(STAND_IN_SETTINGS)
        except InputError as error:
            raise InputError(f"stage {self.name}: {argument}{error}") from error

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
