"""Target axis: what a channel's pooled output says about a task variable T, alone and with partners.

Source: the two-axis paper, Eqs. 3 to 5 and 9; conventions in `Protocol`.
"""

import torch
from torch import Tensor

from lit_prune.measurement.local_axis import CORRELATION_LIMIT, gaussian_information
from lit_prune.measurement.protocol import DEFAULT_PROTOCOL, Protocol

RANDOM_POOL = 4  # `random` partners come from the top 4·m by task information
REDUNDANT_POOL = 50


def task_information(correlations: Tensor) -> Tensor:
    """Task information I_T(i) = g(corr(T, Ȳ_i)), nats [N], from the correlations a [N]."""
    return gaussian_information(correlations)


def pair_excess(first: Tensor, second: Tensor, between: Tensor) -> Tensor:
    """Pair excess I(T;[Y_i,Y_j]) - max(I_T(i), I_T(j)) of Gaussian variables, nats, ≥ 0; shapes broadcast.

    With I(T;[Y_i,Y_j]) = -½·log(1-R²) and R² = (a²+b²-2abr)/(1-r²) the difference is g of the weaker channel's partial
    correlation with T given the stronger: (b-a·r)/√((1-a²)(1-r²)) for |a| ≥ |b|. In this form nothing cancels.
    """
    clip = (-CORRELATION_LIMIT, CORRELATION_LIMIT)
    first, second, between = first.clamp(*clip), second.clamp(*clip), between.clamp(*clip)
    swap = second.abs() > first.abs()
    strong, weak = torch.where(swap, second, first), torch.where(swap, first, second)
    partial = (weak - strong * between) / ((1 - strong.square()) * (1 - between.square())).sqrt()
    return gaussian_information(partial)


def find_partners(task: Tensor, between: Tensor, protocol: Protocol = DEFAULT_PROTOCOL) -> Tensor:
    """Partners of each channel, int64 [N, m], m = min(protocol.partners, N-1); all channels must be live.

    Rules: `task`: largest I_T. `joint`: largest I(T;[Y_i,Y_j]). `excess`: largest pair excess. `random`: drawn from the
    4·m largest I_T, seeded. `excess_of_redundant`: largest pair excess among the 50 of largest min(I_T(i), I_T(j)),
    ties broken by I_T(j), which makes them the 50 of largest I_T.

    Args:
        task: a [N], correlations with T.
        between: r [N, N], correlations of the channels.
        protocol: rule, m and seed.
    """
    channels = len(task)
    count = min(protocol.partners, channels - 1)
    information = task_information(task)
    if protocol.partner_rule == "task":
        return _most_informative(information, count)
    if protocol.partner_rule in ("random", "excess_of_redundant"):
        wide = RANDOM_POOL * count if protocol.partner_rule == "random" else REDUNDANT_POOL
        pool = _most_informative(information, min(max(wide, count), channels - 1))  # [N, pool]
        if protocol.partner_rule == "random":
            generator = torch.Generator().manual_seed(protocol.seed)
            keys = torch.rand(pool.shape, generator=generator).to(pool.device)
        else:
            keys = pair_excess(task[:, None], task[pool], between.gather(1, pool))
        return pool.gather(1, keys.topk(count, dim=1).indices)
    keys = pair_excess(task[:, None], task[None], between)
    if protocol.partner_rule == "joint":
        keys = keys + torch.maximum(information[:, None], information[None])
    return keys.fill_diagonal_(-torch.inf).topk(count, dim=1).indices


def _most_informative(information: Tensor, count: int) -> Tensor:
    """The `count` channels j≠i of largest information for each i, [N, count]; equal ones in index order."""
    order = information.argsort(descending=True, stable=True)[: count + 1]
    candidates = order.expand(len(information), -1)  # [N, count + 1]
    itself = candidates == torch.arange(len(information), device=information.device)[:, None]
    itself[~itself.any(1), -1] = True  # a channel outside the top drops the last candidate instead
    return candidates[~itself].view(len(information), count)


def target_redundancy(task: Tensor, partners: Tensor) -> Tensor:
    """Red_T(i) = mean over partners of min(I_T(i), I_T(j)), nats [N]; a [N], partners [N, m]."""
    information = task_information(task)
    return torch.minimum(information[:, None], information[partners]).mean(1)


def target_excess(task: Tensor, between: Tensor, partners: Tensor) -> Tensor:
    """Syn(i) = mean over partners of the pair excess, nats [N], ≥ 0; a [N], r [N, N], partners [N, m]."""
    return pair_excess(task[:, None], task[partners], between.gather(1, partners)).mean(1)
