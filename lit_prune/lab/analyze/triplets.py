"""Target excess of channel triplets over their best pair.

Source: the two-axis paper, appendices A and K.3.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.measurement.local_axis import CORRELATION_LIMIT, gaussian_information
from lit_prune.measurement.target_axis import pair_excess, task_information

POOL = 24
LIMIT = 1500
PAIRS = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 2, 0]])  # two positions of a triple, then the third


@dataclass(frozen=True)
class TripletExcess:
    """Excess of triples in nats.

    Attributes:
        triples: channels, int64 [M, 3].
        triple_excess: S3 = I(T;[a,b,c]) - best pair, ≥ 0, [M].
        pair_excess: S2 = best pair - best single, ≥ 0, [M].
    """

    triples: Tensor
    triple_excess: Tensor
    pair_excess: Tensor

    @property
    def ratio(self) -> float:
        """mean(max(S3, 0)) / mean(S2); NaN without triples or where no pair exceeds its better channel."""
        below = float(self.pair_excess.mean()) if len(self.pair_excess) else 0.0
        return float(self.triple_excess.clamp_min(0).mean()) / below if below > 0 else float("nan")


def triplet_excess(
    task: Tensor, between: Tensor, *, pool: int = POOL, limit: int = LIMIT, seed: int = 0
) -> TripletExcess:
    """Triplet and pair excess of seeded triples among the channels of largest I_T.

    Gaussian: I(T;[a,b,c]) = -½·log(1-R²) of the regression of T on the three. By the chain rule S3 is g of the third
    channel's partial correlation with T given the best pair, so nothing cancels; every correlation is clipped to
    1-1e-6 on the way, which keeps a duplicate's excess near zero.

    Args:
        task: correlations with T, [N]; NaN leaves a channel out (a dead one).
        between: correlations of the pooled outputs, [N, N].
        pool: number of channels of largest I_T to draw from.
        limit: number of triples at most; all of them if there are fewer.
        seed: of the draw, without replacement.

    Raises:
        InputError: shapes that do not fit.
    """
    if task.ndim != 1 or between.shape != (len(task), len(task)):
        raise InputError(f"task, between: shapes {tuple(task.shape)}, {tuple(between.shape)}; give [N] and [N, N]")
    task, between = task.double(), between.double()
    triples = _draw(task, pool, limit, seed)
    if not len(triples):
        return TripletExcess(triples, task.new_zeros(0), task.new_zeros(0))
    single = task_information(task[triples])  # [M, 3]
    first, second, third = triples[:, PAIRS].unbind(2)  # each [M, 3], one column a pair
    joint = pair_excess(task[first], task[second], between[first, second])
    joint = joint + torch.maximum(task_information(task[first]), task_information(task[second]))
    pair, which = joint.max(1)
    first, second, third = (part.gather(1, which[:, None]).squeeze(1) for part in (first, second, third))
    excess = _third_excess(task, between, (first, second, third))
    return TripletExcess(triples, excess, pair - single.amax(1))


def _draw(task: Tensor, pool: int, limit: int, seed: int) -> Tensor:
    """Seeded triples, int64 [M, 3], of the `pool` channels of largest I_T."""
    live = task.isfinite().nonzero().flatten()
    top = live[task[live].abs().argsort(descending=True, stable=True)[:pool]]
    every = torch.tensor(list(itertools.combinations(range(len(top)), 3)), dtype=torch.long).view(-1, 3)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:limit]
    return top[every[order]]


def _third_excess(task: Tensor, between: Tensor, places: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """I(T;[a,b,c]) - I(T;[a,b]) [M], by conditioning on the more informative of a and b, then on the other."""
    first, second, third = places
    swap = task[second].abs() > task[first].abs()
    first, second = torch.where(swap, second, first), torch.where(swap, first, second)
    task_second = _partial(task[second], task[first], between[first, second])
    task_third = _partial(task[third], task[first], between[first, third])
    second_third = _partial(between[second, third], between[first, second], between[first, third])
    return gaussian_information(_partial(task_third, task_second, second_third))


def _partial(between: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Correlation of two variables given a third, from theirs (`between`) and theirs with the third."""
    clip = (-CORRELATION_LIMIT, CORRELATION_LIMIT)
    between, first, second = between.clamp(*clip), first.clamp(*clip), second.clamp(*clip)
    return (between - first * second) / ((1 - first.square()) * (1 - second.square())).sqrt()
