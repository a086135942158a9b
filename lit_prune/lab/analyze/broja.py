"""BROJA decomposition of what two channels say about a task variable: shared, unique, synergistic. Non-parametric.

Source: Bertschinger et al. 2014, "Quantifying unique information", definition 1; the two-axis paper, section 2.4 and
appendix N.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.lab.analyze.broja_solver import Problem, solve_broja
from lit_prune.measurement.labels import quantile_bins

BINS = 4
TOLERANCE = 1e-6  # nats
CHUNK = 128  # pairs solved together; the arrays of one step then stay in a core's cache
NEGLIGIBLE = 1e-8  # a cell of less probability is left out: it carries under 1e-6 nats and ruins the condition


@dataclass(frozen=True)
class Decomposition:
    """Information of pairs (Y1, Y2) about T in nats, each [P] float64.

    The atoms are not negative. To rounding, shared + unique_first = information_first, shared + unique_second =
    information_second, and all four together are information_joint.

    Attributes:
        shared: SI.
        unique_first: what Y1 alone has.
        unique_second: what Y2 alone has.
        synergy: what only both together have.
        information_first: I(T;Y1).
        information_second: I(T;Y2).
        information_joint: I(T;[Y1,Y2]).
        gap: duality gap. Each atom is within this distance of the exact one; a certificate, whatever the solver did.
    """

    shared: Tensor
    unique_first: Tensor
    unique_second: Tensor
    synergy: Tensor
    information_first: Tensor
    information_second: Tensor
    information_joint: Tensor
    gap: Tensor


def decompose(joint: Tensor, tolerance: float = TOLERANCE) -> Decomposition:
    """BROJA decomposition of many pairs at once.

    unique_first = min_q I_q(T;Y1|Y2), unique_second = min_q I_q(T;Y2|Y1), shared = max_q of the co-information and
    synergy = I_p(T;[Y1,Y2]) - min_q I_q(T;[Y1,Y2]), over the q with p's marginals (T,Y1) and (T,Y2); one q is optimal
    for all. Cells below 1e-8 of a pair's total are taken as zero. From n samples the plug-in estimates are biased:
    synergy upwards by about (K-1)³/(2n) nats for K bins each, unique and shared by less.

    Args:
        joint: probabilities or counts [P, T, Y1, Y2], ≥ 0; normalised here.
        tolerance: duality gap in nats to stop at.

    Raises:
        InputError: not four axes, negative or non-finite entries, or a pair without mass.
    """
    joint = _normalised(joint)
    if not len(joint):
        return Decomposition(*(joint.new_zeros(0) for _ in fields(Decomposition)))
    with _one_thread():
        parts = [_decompose(part, tolerance) for part in joint.split(CHUNK)]
    return Decomposition(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Decomposition)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One CPU thread inside: the arrays are small, so more threads mostly wait (10 times slower on busy cores)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _normalised(joint: Tensor) -> Tensor:
    """Probabilities [P, T, Y1, Y2] in float64 without negligible cells."""
    if joint.ndim != 4:
        raise InputError(f"joint: shape {tuple(joint.shape)}; give [pairs, T, Y1, Y2]")
    joint = joint.double()
    total = joint.sum((1, 2, 3), keepdim=True)
    if not bool(total.isfinite().all()) or bool((joint < 0).any()) or bool((total <= 0).any()):
        raise InputError("joint: a pair has negative, non-finite or no mass; give counts or probabilities")
    joint = torch.where(joint > NEGLIGIBLE * total, joint, 0.0)
    return joint / joint.sum((1, 2, 3), keepdim=True)


def _decompose(joint: Tensor, tolerance: float) -> Decomposition:
    """`decompose` of one chunk of normalised pairs."""
    problem = Problem(joint.sum(3), joint.sum(2))
    optimal, alpha, beta = solve_broja(problem, tolerance)
    entropy = -_sum_xlogx(joint.sum((2, 3)))
    first, second, both = (_information(entropy, part) for part in (problem.first, problem.second, joint.flatten(2)))
    least = _information(entropy, optimal.flatten(2))
    bound = entropy - (problem.first * alpha).sum((1, 2)) - (problem.second * beta).sum((1, 2))
    gap = (least - bound).clamp_min(0)
    least = least.clamp(max=both).clamp(torch.maximum(first, second), first + second)  # all hold at the optimum
    return Decomposition(
        shared=(first + second - least).clamp_min(0),
        unique_first=(least - second).clamp_min(0),
        unique_second=(least - first).clamp_min(0),
        synergy=(both - least).clamp_min(0),
        information_first=first,
        information_second=second,
        information_joint=both,
        gap=gap,
    )


def _sum_xlogx(probability: Tensor) -> Tensor:
    """Σ x·log x over all axes but the first, [P]."""
    return torch.special.xlogy(probability, probability).flatten(1).sum(1)


def _information(entropy: Tensor, joint: Tensor) -> Tensor:
    """I(T;Y) = H(T) + H(Y) - H(T,Y) [P] from H(T) [P] and a joint distribution [P, T, Y], ≥ 0."""
    return (entropy - _sum_xlogx(joint.sum(1)) + _sum_xlogx(joint)).clamp_min(0)


def joint_counts(target: Tensor, values: Tensor, pairs: Tensor, bins: int = BINS) -> Tensor:
    """Counts [P, bins, bins, bins] of (T, Y_i, Y_j) in equal-frequency bins, for `decompose`; float64.

    Args:
        target: T [n].
        values: pooled outputs [n, N].
        pairs: channels (i, j), int64 [P, 2].
        bins: bins of each variable; equal values share a bin.

    Raises:
        InputError: shapes that do not fit, fewer samples than bins, or NaN.
    """
    if values.ndim != 2 or target.shape != values.shape[:1] or pairs.ndim != 2 or pairs.shape[1] != 2:
        shapes = f"{tuple(target.shape)}, {tuple(values.shape)}, {tuple(pairs.shape)}"
        raise InputError(f"target, values, pairs: shapes {shapes}; give [n], [n, N] and [P, 2]")
    if len(target) < bins or not bool(target.isfinite().all() & values[:, pairs.unique()].isfinite().all()):
        raise InputError(
            f"target, values: {len(target)} samples for {bins} bins, or NaN; give finite ones, at least {bins}"
        )
    cells = quantile_bins(values, bins).T.contiguous()  # [N, n]
    with_target = quantile_bins(target[:, None], bins).T * bins**2 + cells * bins
    size = bins**3
    parts = []
    for part in pairs.split(CHUNK):
        index = with_target[part[:, 0]] + cells[part[:, 1]]  # [chunk, n]
        index += size * torch.arange(len(part), device=index.device)[:, None]
        parts.append(torch.bincount(index.flatten(), minlength=size * len(part)).view(-1, bins, bins, bins))
    return torch.cat(parts).double() if parts else values.new_zeros(0, bins, bins, bins).double()


def best_peer_pairs(information: Tensor) -> Tensor:
    """Pairs (i, j*) of each channel and the other channel of largest information, int64 [live, 2].

    Args:
        information: I(T;Y) [N], NaN for a channel to leave out (a dead one); ties go to the lower index.
    """
    live = information.isfinite().nonzero().flatten()
    if len(live) < 2:
        return live.new_zeros(0, 2)
    order = live[information[live].argsort(descending=True, stable=True)]
    return torch.stack([live, torch.where(live == order[0], order[1], order[0])], 1)


def irrecoverable_loss(decomposition: Decomposition) -> Tensor:
    """Irrecoverable loss unique_first / I(T;Y1) [P], in [0, 1]; NaN where Y1 says nothing about T.

    Args:
        decomposition: of pairs (channel, its best peer), see `best_peer_pairs`.
    """
    whole = decomposition.information_first
    return torch.where(whole > 0, decomposition.unique_first / whole, torch.nan)
