"""A lower bound on interchange agreement from margins and logit distortion."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Certificate:
    """Lower bounds on IIA, for the best ε each; 0 where no ε says anything.

    Attributes:
        bound: max over ε of `1 - M(2ε) - D₂/ε²`.
        epsilon: the ε of `bound` (a supremum: all smaller ε come arbitrarily close), NaN if the bound is 0.
        empirical: max over ε of `1 - M(2ε) - P(‖Δz‖∞ > ε)`, never below `bound`.
        empirical_epsilon: its ε, NaN if it is 0.
        distortion: D₂, mean of ‖Δz‖₂² (not divided by the number of logits).
    """

    bound: float
    epsilon: float
    empirical: float
    empirical_epsilon: float
    distortion: float


def certify(low: Tensor, high: Tensor) -> Certificate:
    """Certificate of the agreement of two networks' top classes, M the CDF of the low-level network's margins.

    M steps at the observed margins and everything else in the bound falls with ε, so the best ε lies just below half a
    margin; the empirical bound also steps at the observed distortions. All of them are tried.

    Args:
        low: logits of the low-level network under interventions, [R, K].
        high: logits of the reduced network under the same interventions, [R, K].

    Source: causal mechanism reduction, theorem 2.
    """
    low, high = low.double(), high.double()
    top = low.topk(2, dim=1).values
    margins = (top[:, 0] - top[:, 1]).sort().values  # [R]
    change = high - low
    largest = change.abs().amax(1).sort().values  # [R]
    distortion = float(change.square().sum(1).mean())
    halves = margins[margins > 0] / 2
    kept = 1 - _share(margins, 2 * halves, below=True)  # of margins that exceed 2ε for every ε < half
    bounds = kept - distortion / halves.square()
    at_margin = kept - (1 - _share(largest, halves, below=True))
    at_change = 1 - _share(margins, 2 * largest, below=False) - (1 - _share(largest, largest, below=False))
    bound, epsilon = _best(bounds, halves)
    empirical, empirical_epsilon = _best(torch.cat([at_margin, at_change]), torch.cat([halves, largest]))
    return Certificate(bound, epsilon, empirical, empirical_epsilon, distortion)


def _share(ascending: Tensor, limits: Tensor, below: bool) -> Tensor:
    """Share of values below (or at most) each limit."""
    return torch.searchsorted(ascending, limits.contiguous(), right=not below).double() / len(ascending)


def _best(bounds: Tensor, epsilons: Tensor) -> tuple[float, float]:
    if not len(bounds) or bounds.max() <= 0:
        return 0.0, float("nan")
    place = int(bounds.argmax())
    return float(bounds[place]), float(epsilons[place])
