"""Replaceability hulls: how few peers explain a channel. Correlations in, numbers out.

Source: the two-axis paper, appendices A and K.2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_prune.errors import InputError

RIDGE = 1e-6
ENOUGH = 0.95
LARGEST = 10
CHUNK_VALUES = 2**23  # float64 values of the factors held at once (64 MB)


@dataclass(frozen=True)
class Hulls:
    """Hulls of a layer's channels; NaN (sizes -1, members -1) for dead channels.

    Attributes:
        full: E_full(i), explanation by all live peers, in [0, 1], [N].
        explained: E_i(H_i), [N].
        sizes: |H_i|, int64 [N].
        members: the peers of H_i in the order chosen, then -1, int64 [N, largest].
        largest: the cap on |H_i|.
    """

    full: Tensor
    explained: Tensor
    sizes: Tensor
    members: Tensor
    largest: int

    @property
    def compact_support(self) -> Tensor:
        """C_i = E_full(i) / max(1, |H_i|), [N]."""
        return self.full / self.sizes.clamp_min(1)

    @property
    def singleton_ratio(self) -> float:
        """Share of the live channels whose hull is one peer."""
        return self._share(self.sizes == 1)

    @property
    def saturated_ratio(self) -> float:
        """Share of the live channels whose hull has reached the cap."""
        return self._share(self.sizes >= self.largest)

    @property
    def mean_size(self) -> float:
        """Mean |H_i| over the live channels."""
        return float(self.sizes[self.sizes >= 0].double().mean())

    def _share(self, chosen: Tensor) -> float:
        live = self.sizes >= 0
        return float(chosen[live].double().mean())


def full_explanation(correlations: Tensor) -> Tensor:
    """Explanation of each channel by all others, E_full(i) [N] in [0, 1].

    With A = Σ + 1e-6·I the block inverse gives ρ_iᵀ (A without i)⁻¹ ρ_i = A_ii - 1/(A⁻¹)_ii: one inverse for all i.

    Args:
        correlations: [N, N] of live channels.
    """
    ridged = correlations.double() + RIDGE * torch.eye(len(correlations), device=correlations.device)
    factor, failed = torch.linalg.cholesky_ex(ridged)
    if bool(failed):  # fewer samples than channels, and float32 rounding above the ridge
        values, vectors = torch.linalg.eigh(ridged)
        inverse = (vectors.square() / values.clamp_min(RIDGE)).sum(1)
    else:
        inverse = torch.cholesky_inverse(factor).diagonal()
    return (ridged.diagonal() - 1 / inverse).clamp(0, 1)


def greedy_hulls(
    correlations: Tensor, dead: Tensor | None = None, enough: float = ENOUGH, largest: int = LARGEST
) -> Hulls:
    """Greedy hull of every channel of a layer.

    E_i(S) = ρ_iSᵀ (Σ_SS + 1e-6·I)⁻¹ ρ_iS on correlations, clipped to [0, 1]. H_i starts empty and takes the peer that
    raises E most until E ≥ enough·E_full(i) or |H_i| = largest. All targets step together: of each, the covariance
    with every candidate and the candidate's variance, both given the peers already taken, follow one Cholesky column
    a step.

    Args:
        correlations: ρ [N, N] over images and positions.
        dead: boolean [N], channels to leave out; None leaves out those with a NaN on the diagonal.
        enough: share of E_full to reach.
        largest: cap on the hull, ≥ 1.

    Raises:
        InputError: not a square matrix, a cap below 1, or NaN among live channels.
    """
    live = _live(correlations, dead)
    if largest < 1:
        raise InputError(f"largest: {largest} peers at most; give at least 1")
    between = correlations[live][:, live].double()
    channels = len(correlations)
    full = torch.full((channels,), torch.nan, dtype=torch.float64, device=correlations.device)
    explained, sizes = full.clone(), live.new_full((channels,), -1)
    members = sizes.new_full((channels, largest), -1)
    if len(live):
        full[live] = full_explanation(between)
        rows = max(1, CHUNK_VALUES // (largest * len(live)))
        for part in torch.arange(len(live), device=live.device).split(rows):
            reached, chosen = _grow(between, part, enough * full[live[part]], largest)
            explained[live[part]] = reached
            sizes[live[part]] = (chosen >= 0).sum(1)
            members[live[part]] = torch.where(chosen >= 0, live[chosen], -1)
    return Hulls(full, explained, sizes, members, largest)


def _live(correlations: Tensor, dead: Tensor | None) -> Tensor:
    """Indices of live channels, int64."""
    if correlations.ndim != 2 or correlations.shape[0] != correlations.shape[1]:
        raise InputError(f"correlations: shape {tuple(correlations.shape)}; give a square matrix [N, N]")
    alive = correlations.diagonal().isfinite() if dead is None else ~dead
    live = alive.nonzero().flatten()
    if not bool(correlations[live][:, live].isfinite().all()):
        raise InputError("correlations: NaN between live channels; mark the dead ones in `dead`")
    return live


def _grow(between: Tensor, targets: Tensor, wanted: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Explanation reached [B] and peers chosen, int64 [B, largest] padded with -1, for the channels `targets` [B]."""
    count, channels = len(targets), len(between)
    chosen = targets.new_full((count, largest), -1)
    reached = between.new_zeros(count)
    factors = between.new_zeros(count, largest, channels)  # Cholesky rows of the chosen peers against all channels
    covariance = between[targets].clone()  # with the target, given the chosen peers, [B, N]
    variance = between.new_full((count, channels), 1 + RIDGE)  # of the candidates, given the chosen peers
    barred = torch.zeros_like(variance, dtype=torch.bool)
    barred[torch.arange(count), targets] = True
    for step in range(min(largest, channels - 1)):
        active = (reached < wanted).nonzero().flatten()
        if not len(active):
            break
        gains = (covariance[active].square() / variance[active]).masked_fill_(barred[active], -1)
        gain, peer = gains.max(1)
        chosen[active, step], reached[active] = peer, (reached[active] + gain).clamp_max(1)
        barred[active, peer] = True
        known = factors[active, :step]  # [b, step, N]
        row = between[peer] - (known.gather(2, peer.view(-1, 1, 1).expand(-1, step, 1)) * known).sum(1)
        row[torch.arange(len(active)), peer] += RIDGE
        row /= variance[active, peer].sqrt()[:, None]
        factors[active, step] = row
        covariance[active] -= row * (covariance[active, peer] / variance[active, peer].sqrt())[:, None]
        variance[active] = (variance[active] - row.square()).clamp_min(RIDGE)
    return reached, chosen
