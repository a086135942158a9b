"""Target axis: what a channel's pooled output says about a task variable T, alone and with partners.

Source: the two-axis paper, Eqs. 3 to 5 and 9; conventions in `Protocol`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.measurement.local_axis import CORRELATION_LIMIT, gaussian_information
from lit_prune.measurement.protocol import DEFAULT_PROTOCOL, Protocol

RANDOM_POOL = 4  # `random` partners come from the top 4·m by task information
REDUNDANT_POOL = 50
TASK_RULES = ("task", "random")  # these choose partners by I_T alone


def _true_logit(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None])


def _true_margin(logits: Tensor, labels: Tensor) -> Tensor:
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return _true_logit(logits, labels) - others.amax(1, keepdim=True)


def _negative_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return _true_logit(logits.log_softmax(1), labels)


def _predicted_margin(logits: Tensor, labels: Tensor) -> Tensor:
    best, second = logits.topk(2, dim=1).values.split(1, dim=1)
    return best - second


def _predicted_logit(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.amax(1, keepdim=True)


def _one_vs_rest(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels, logits.shape[1])


TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "true_margin": _true_margin,
    "true_logit": _true_logit,
    "negative_loss": _negative_loss,
    "predicted_margin": _predicted_margin,
    "predicted_logit": _predicted_logit,
    "one_vs_rest": _one_vs_rest,
}


def task_variable(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Task variables T of a batch, float64 [B, V]; V = 1, but K for `one_vs_rest`.

    `true_margin`: logit of the label minus the largest other one. `true_logit`: the former alone. `negative_loss`:
    minus the cross-entropy. `predicted_margin`: largest minus second largest logit. `predicted_logit`: the largest.
    `one_vs_rest`: the 0/1 indicators of the classes.

    Args:
        name: one of `TARGETS`.
        logits: [B, K], K ≥ 2.
        labels: int64 [B], 0 to K-1.

    Raises:
        InputError: an unknown name, logits that are not [B, K], a label out of range.
    """
    if name not in TARGETS:
        raise InputError(f"target: {name!r} is not one of {', '.join(TARGETS)}")
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        raise InputError("model: its output is not logits [B, K] with K ≥ 2; measure a classifier")
    check_labels(labels, len(logits), logits.shape[1])
    return TARGETS[name](logits.double(), labels.to(logits.device)).double()


def check_labels(labels: Tensor, images: int, classes: int) -> None:
    """Raises InputError unless `labels` is an integer tensor [images] with values 0 to classes-1."""
    if labels.shape != (images,) or labels.is_floating_point():
        raise InputError(
            f"batches: labels of shape {tuple(labels.shape)}, {labels.dtype}; give int64 of shape [{images}]"
        )
    low, high = (int(labels.min()), int(labels.max())) if images else (0, 0)
    if not 0 <= low <= high < classes:
        raise InputError(f"batches: labels from {low} to {high}, but 0 to {classes - 1} expected; mend the labels")


def task_information(correlations: Tensor) -> Tensor:
    """Task information I_T(i) = g(corr(T, Ȳ_i)), nats [N], from the correlations a [N]."""
    return gaussian_information(correlations)


def pair_excess(first: Tensor, second: Tensor, between: Tensor) -> Tensor:
    """Pair excess I(T;[Y_i,Y_j]) - max(I_T(i), I_T(j)) of Gaussian variables, nats, ≥ 0; shapes broadcast.

    With I(T;[Y_i,Y_j]) = -½·log(1-R²) and R² = (a²+b²-2abr)/(1-r²) the difference is g of the weaker channel's partial
    correlation with T given the stronger: (b-a·r)/√((1-a²)(1-r²)) for |a| ≥ |b|. In this form nothing cancels.

    Args:
        first: a, correlation of T with channel i, any shape.
        second: b, that with channel j.
        between: r, correlation of the two channels.
    """
    clip = (-CORRELATION_LIMIT, CORRELATION_LIMIT)
    first, second, between = first.clamp(*clip), second.clamp(*clip), between.clamp(*clip)
    swap = second.abs() > first.abs()
    strong, weak = torch.where(swap, second, first), torch.where(swap, first, second)
    partial = (weak - strong * between) / ((1 - strong.square()) * (1 - between.square())).sqrt()
    return gaussian_information(partial)


def find_partners(task: Tensor, between: Tensor | None, protocol: Protocol = DEFAULT_PROTOCOL) -> Tensor:
    """Partners of each channel, int64 [N, m], m = min(protocol.partners, N-1); all channels must be live.

    Rules: `task`: largest I_T. `joint`: largest I(T;[Y_i,Y_j]). `excess`: largest pair excess. `random`: drawn from the
    4·m largest I_T, seeded. `excess_of_redundant`: largest pair excess among the 50 of largest min(I_T(i), I_T(j)),
    ties broken by I_T(j), which makes them the 50 of largest I_T.

    Args:
        task: a [N], correlations with T.
        between: r [N, N], correlations of the channels; None will do for the rules of `TASK_RULES`.
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
            keys = torch.rand(pool.shape, generator=generator)
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
    itself = candidates == torch.arange(len(information))[:, None]
    itself[~itself.any(1), -1] = True  # a channel outside the top drops the last candidate instead
    return candidates[~itself].view(len(information), count)


def target_redundancy(task: Tensor, partners: Tensor) -> Tensor:
    """Red_T(i) = mean over partners of min(I_T(i), I_T(j)), nats [N].

    Args:
        task: a [N].
        partners: [N, m].
    """
    information = task_information(task)
    return torch.minimum(information[:, None], information[partners]).mean(1)


def target_excess(task: Tensor, between: Tensor, partners: Tensor) -> Tensor:
    """Syn(i) = mean over partners of the pair excess, nats [N], ≥ 0.

    Args:
        task: a [N].
        between: r [N, N].
        partners: [N, m].
    """
    return partner_excess(task, between.gather(1, partners), partners)


def partner_excess(task: Tensor, between: Tensor, partners: Tensor) -> Tensor:
    """`target_excess` from the correlations of each channel with its partners alone, `between` [N, m]."""
    return pair_excess(task[:, None], task[partners], between).mean(1)
