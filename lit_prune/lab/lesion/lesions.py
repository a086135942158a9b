"""Lesions of one layer and replacements of its channels by their peers, joined with its channel metrics."""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.lab.lesion.request import LesionRequest
from lit_prune.lab.lesion.variants import Variants, variant_losses
from lit_prune.measurement import local_axis
from lit_prune.measurement.layers import Batches
from lit_prune.measurement.sums import LayerSums
from lit_prune.scores.hulls import greedy_hulls

MEASURED = ("damage", "damage_error", "damage_replaced", "recovery", "peer_r2")
SMALLEST_DAMAGE = 0.0  # a recovery is a share of the damage: there has to be one


@dataclass(frozen=True)
class LayerLesions:
    """What the lesions of one layer start from.

    Attributes:
        model: the network.
        metrics: the layer's rows of the channel table.
        sums: the layer's moments over the calibration images, on the CPU.
        batches: evaluation images and labels.
    """

    model: nn.Module
    metrics: pd.DataFrame
    sums: LayerSums
    batches: Batches


def draw_channels(metrics: pd.DataFrame, wanted: int | None, seed: int) -> np.ndarray:
    """Channels of a layer to lesion, ascending: `wanted` live ones at random (all live ones where there are no more).

    The draw depends on the seed and the layer's name alone. None takes every channel, dead ones too.
    """
    if wanted is None:
        return metrics["channel"].to_numpy(copy=True)
    live = metrics.loc[~metrics["dead"], "channel"].to_numpy()
    random = np.random.default_rng([seed, zlib.crc32(metrics["layer"].iloc[0].encode())])
    return np.sort(random.choice(live, min(wanted, len(live)), replace=False))


def lesion_layer(
    start: LayerLesions, request: LesionRequest, watch: Callable[[Iterable, str], Iterable] = lambda items, _: items
) -> pd.DataFrame:
    """Damage of lesions and of peer replacements of one layer's channels, with what might predict them.

    Columns: those of the channel table; damage and damage_replaced, the rises ΔL of the mean loss in nats when the
    channel's raw output is set to zero, or to its reconstruction from its peers; damage_error, the standard error of
    damage: the deviation of ΔL over the images, divided by the root of their number; recovery
    (ΔL_lesion - ΔL_replace)/ΔL_lesion, NaN where the lesion does no damage; peer_r2 of the reconstruction;
    full_explanation E_full, hull_size |H| and compact_support E_full/max(1, |H|).
    """
    layer = start.metrics["layer"].iloc[0]
    channels = draw_channels(start.metrics, request.channels, request.seed)
    rows = start.metrics.set_index("channel", drop=False).loc[channels].reset_index(drop=True)
    fit = fit_peers(start.sums, request.peers, request.ridge)
    chosen = torch.as_tensor(channels)
    width = len(start.sums.cross)
    variants = Variants.whole(width) + Variants.lesions(chosen, width) + fit.replacements(chosen)
    losses = variant_losses(start.model, layer, variants, start.batches, request.values, watch)
    rise = losses[1:] - losses[0]  # image by image: the deviation of the difference is far below that of the losses
    damage, replaced = rise.mean(1).numpy().reshape(2, -1)
    error = (rise[: len(chosen)].std(1) / rise.shape[1] ** 0.5).numpy()
    recovery = np.full(len(rows), np.nan)
    np.divide(damage - replaced, damage, out=recovery, where=damage > SMALLEST_DAMAGE)
    values = (damage, error, replaced, recovery, fit.r2[chosen].numpy())
    measured = dict(zip(MEASURED, values, strict=True))
    return rows.assign(**measured, **_support(start, channels))


def _support(start: LayerLesions, channels: np.ndarray) -> dict[str, np.ndarray]:
    """Hull columns of the channels."""
    covariance = start.sums.outputs.covariance()
    dead = torch.as_tensor(start.metrics["dead"].to_numpy(copy=True))
    hulls = greedy_hulls(local_axis.correlation_matrix(covariance), dead)
    sizes = torch.where(hulls.sizes < 0, torch.nan, hulls.sizes.double())
    columns = {"full_explanation": hulls.full, "hull_size": sizes, "compact_support": hulls.full / sizes.clamp_min(1)}
    return {name: value[torch.as_tensor(channels)].numpy() for name, value in columns.items()}


@dataclass(frozen=True)
class PeerFit:
    """Reconstruction y_i ≈ Σ_p weights[i, p]·y_p + bias[i] of every channel of a layer, float64.

    A dead channel, or one without live peers, is given its mean: no weights, `r2` NaN.

    Attributes:
        weights: [N, N], zero outside the peers.
        bias: [N].
        r2: share of the channel's variance that is explained on the calibration images, at most 1, [N].
    """

    weights: Tensor
    bias: Tensor
    r2: Tensor

    def replacements(self, channels: Tensor) -> Variants:
        """The variants in which each of `channels` has its reconstruction."""
        return Variants(channels, self.weights[channels], self.bias[channels])


def fit_peers(sums: LayerSums, peers: int = 8, ridge: float = 1e-6) -> PeerFit:
    """Ridge regression of every channel on its peers, all channels at once, from the second moments alone.

    P(i) are the `peers` live channels of largest |ρ_ij|. On standardised outputs β = (Σ_PP + ridge·I)⁻¹ ρ_Pi, so
    weights = β·σ_i/σ_p, bias = μ_i - weights·μ_P, and R² = 2 βᵀρ_Pi - βᵀ Σ_PP β.

    Args:
        sums: of the layer, over images and positions.
        peers: number of peers, ≥ 1; fewer where the layer has fewer.
        ridge: penalty relative to the peers' variances, above 0.

    Raises:
        InputError: no more images than coefficients.
    """
    if sums.pooled.count < peers + 2:
        raise InputError(
            f"limit: {sums.pooled.count} calibration images are too few for {peers} peers; give at least {peers + 2},"
            " better 1000"
        )
    covariance, mean = sums.outputs.covariance(), sums.outputs.mean()
    dead = local_axis.dead_channels(covariance.diagonal().clamp_min(0))
    live = (~dead).nonzero().flatten()
    weights = torch.zeros_like(covariance)
    r2 = torch.full_like(mean, torch.nan)
    count = min(peers, len(live) - 1)
    if count > 0:
        correlations = local_axis.correlation_matrix(covariance)[live][:, live]
        beta, chosen, explained = _standardised_fit(correlations, count, ridge)
        scale = covariance.diagonal()[live].sqrt()
        weights[live[:, None], live[chosen]] = beta * scale[:, None] / scale[chosen]
        r2[live] = explained
    return PeerFit(weights, mean - weights @ mean, r2)


def _standardised_fit(correlations: Tensor, count: int, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [n, count], the peers they belong to, and R² [n]."""
    strength = correlations.abs().fill_diagonal_(-1)
    chosen = strength.topk(count, dim=1).indices
    between = correlations[chosen[:, :, None], chosen[:, None, :]]  # [n, count, count]
    target = correlations.gather(1, chosen)
    beta = torch.linalg.solve(between + ridge * torch.eye(count).to(between), target)
    fitted = (between @ beta[:, :, None])[:, :, 0]
    return beta, chosen, (beta * (2 * target - fitted)).sum(1)
