"""The measurement conventions that papers and code differ in, as named fields recorded with every result."""

from dataclasses import dataclass
from typing import Literal

from lit_prune.arguments import check_seeds, checked
from lit_prune.errors import InputError

HookPoint = Literal["pre_bn", "post_bn"]
TargetPooling = Literal["mean", "match"]
OverlapMean = Literal["peers", "channels"]
PartnerRule = Literal["task", "joint", "excess", "random", "excess_of_redundant"]


@checked
@dataclass(frozen=True)
class Protocol:
    """Conventions of a measurement; the defaults are this project's.

    Attributes:
        hook_point: `pre_bn` reads a layer's raw output, `post_bn` the output of the norm that follows it (of the layer
            itself where none does).
        positions: `all`, or the number of positions drawn at random from each image for the local axis.
        target_pooling: the channel's value for the target axis: `mean` over all positions, or `match`: the same
            positions as the local axis, each a sample, T repeated (it shrinks I_T; for comparison only).
        overlap_mean: peer overlap divided by the number of `peers` (N-1) or of `channels` (N).
        partner_rule: who the partners of a channel are, see `information.target_axis.find_partners`.
        partners: m, the number of partners (at most N-1).
        token: index of the token that is read from [B, T, N] outputs, None for all of them.
        seed: of random positions and random partners.

    Raises:
        InputError: a value that is not one of those above.
    """

    hook_point: HookPoint = "pre_bn"
    positions: int | Literal["all"] = "all"
    target_pooling: TargetPooling = "mean"
    overlap_mean: OverlapMean = "peers"
    partner_rule: PartnerRule = "task"
    partners: int = 10
    token: int | None = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.positions != "all" and self.positions < 1:
            raise InputError(f"positions: {self.positions!r} is neither 'all' nor a positive number")
        check_seeds(self.seed)
        if self.partners < 1:
            raise InputError(f"partners: {self.partners} is below 1")


DEFAULT_PROTOCOL = Protocol()
