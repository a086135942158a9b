"""Constants and affine combinations of kept channels that stand in for removed ones, folded into their reader."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.moments import Moments
from lit_prune.replace.flow import Reader
from lit_prune.replace.kernels import SLIDE, is_transposed, kernel_of, spread, steps
from lit_prune.replace.methods import DEFAULT_REPLACEMENT, Replacement
from lit_prune.replace.risk import RiskRows, solve_ridged, weighted_affine

PARENT_RULES = ("pearson", "weighted_pearson", "random")


@dataclass(frozen=True)
class StandIn:
    """a_j ≈ θ0 + Σ θ_p a_p for every removed input channel j of a layer.

    Attributes:
        offsets: θ0, float64 [removed].
        coefficients: θ, float64 [removed, kept].
        unexplained: share of the removed channels' summed variance that is left; NaN where variance is not what was
            fitted.
        singular: removed channels whose system could be solved only with the ridge.
    """

    offsets: Tensor
    coefficients: Tensor
    unexplained: float
    singular: int = 0


def constants(inputs: Moments, reader: Reader) -> StandIn:
    """Each removed channel's mean: the constant that distorts an affine reader's output least.

    Source: causal mechanism reduction, proof of the CMR-Logit score.
    """
    removed = list(reader.removed)
    mean = inputs.mean()
    return StandIn(mean[removed], mean.new_zeros(len(removed), len(reader.kept)), 1.0)


def affine(inputs: Moments, reader: Reader, parents: Tensor, ridge: float) -> StandIn:
    """Ridge regression of each removed channel on kept channels of the same layer.

    Args:
        inputs: moments of the layer's input channels.
        reader: which go and which stay.
        parents: places within `reader.kept`, int64 [removed, r], see `choose_parents`.
        ridge: relative to each parent's own variance, above 0.

    Source: causal mechanism reduction, affine case of theorem 1 with uniform curvature and no gradient.
    """
    removed, kept = list(reader.removed), list(reader.kept)
    mean, covariance = inputs.mean(), inputs.covariance()
    inner, cross = covariance[kept][:, kept], covariance[kept][:, removed]  # [K, K], [K, R]
    if parents.shape[1] == len(kept):  # all of them: one system for all removed channels
        parents = torch.arange(len(kept)).expand(len(removed), -1)
        theta, flags = solve_ridged(inner[None], cross[None], ridge)
        coefficients, singular = theta[0].T, len(removed) * int(flags)
    else:
        blocks = inner[parents[:, :, None], parents[:, None, :]]  # [R, r, r]
        theta, flags = solve_ridged(blocks, cross.T.gather(1, parents)[..., None], ridge)
        coefficients = cross.new_zeros(len(removed), len(kept)).scatter_(1, parents, theta[..., 0])
        singular = int(flags.sum())
    left = covariance.diagonal()[removed] - (coefficients * (2 * cross.T - coefficients @ inner)).sum(1)
    total = covariance.diagonal()[removed].sum()
    unexplained = float(left.clamp_min(0).sum() / total) if total > 0 else 0.0
    return StandIn(mean[removed] - coefficients @ mean[kept], coefficients, unexplained, singular)


def choose_parents(
    inputs: Moments, reader: Reader, weight: Tensor, settings: Replacement = DEFAULT_REPLACEMENT
) -> Tensor:
    """Places within `reader.kept` of the channels that stand in for each removed one, int64 [removed, r], ascending.

    Args:
        inputs: moments of the layer's input channels.
        reader: which go and which stay.
        weight: of the reader, [O, C, *taps].
        settings: how many parents (all of them where there are fewer), by which rule, which seed.

    Raises:
        InputError: fewer images than parents.
    """
    removed, kept = list(reader.removed), list(reader.kept)
    count = len(kept) if settings.parents is None else min(settings.parents, len(kept))
    if settings.parents is not None and count >= inputs.count:
        raise InputError(
            f"parents={settings.parents}: {inputs.count} calibration samples are too few for layer "
            f"{reader.name!r}; use more images or fewer parents"
        )
    strength = parent_strength(inputs.covariance(), weight, settings.parent_rule, settings.seed)
    return strength[removed][:, kept].topk(count, dim=1).indices.sort(1).values


def parent_strength(covariance: Tensor, weight: Tensor, rule: str, seed: int) -> Tensor:
    """How fit channel k is to stand in for channel j, [C, C].

    Args:
        covariance: of a reader's input channels, float64 [C, C].
        weight: of the reader, [O, C, *taps] (ungrouped where the rule looks at it).
        rule: absolute `pearson` correlation; `weighted_pearson`, that times the absolute cosine of the outgoing
            weights; or `random` numbers.
        seed: of the random numbers.
    """
    if rule == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(covariance.shape, generator=generator, dtype=torch.float64)
    strength = correlations(covariance)
    if rule == "weighted_pearson":
        columns = F.normalize(weight.detach().double().cpu().movedim(1, 0).flatten(1), dim=1)  # [C, O·taps]
        strength = strength * (columns @ columns.T).abs()
    return strength


def correlations(covariance: Tensor) -> Tensor:
    """|Pearson correlation| of each pair, [C, C]; 0 where a variance is 0."""
    spread = covariance.diagonal().clamp_min(0).sqrt()
    scale = torch.outer(spread, spread)
    return torch.where(scale > 0, covariance.abs() / scale, 0)


@dataclass(frozen=True)
class Folded:
    """A reader's affine map with the stand-ins folded in.

    Attributes:
        weight: float64 [O, kept, *taps].
        shift: what the output gains, float64 [O].
        border: mean over positions and sum over outputs of the squared error of the shift: at the border the removed
            channels were zero, the shift is not; a transposed convolution adds another part of it at each position.
        carried: kernel for a channel that is 1 everywhere, float64 [O, 1, *taps], exact in place of `shift`.
    """

    weight: Tensor
    shift: Tensor
    border: float
    carried: Tensor


def fold(module: nn.Module, reader: Reader, stand_in: StandIn, size: tuple[int, ...]) -> Folded:
    """Parents' columns gain W[:, j]·θ_p; the output gains Σ_j θ0_j·ΣW[:, j] over taps.

    Args:
        module: the reader in the original network.
        reader: what goes.
        stand_in: for its removed columns.
        size: of the map it reads, such as height and width; () for a linear layer.

    Source: causal mechanism reduction, proposition 1.
    """
    weight = kernel_of(module).to(stand_in.offsets)[list(reader.written)]
    lost, rest = weight[:, list(reader.removed)], weight[:, list(reader.kept)]
    rest = rest + torch.einsum("oj...,jk->ok...", lost, stand_in.coefficients)
    carried = torch.einsum("oj...,j->o...", lost, stand_in.offsets)[:, None]
    shift, border = carried.flatten(1).sum(1), 0.0
    if size:
        ones = spread(module, carried.new_ones(1, 1, *size))
        actual = SLIDE[len(size)](ones, carried, None, steps(module), 0, module.dilation)[0].flatten(1)  # [O, P]
        shift = actual.mean(1) if is_transposed(module) else shift
        border = float((actual - shift[:, None]).square().mean(1).sum())
    return Folded(rest, shift, border, carried)


def affine_risks(
    rows: RiskRows, weight: Tensor, parents: float = 16, ridge: float = 1e-4, rule: str = "pearson", seed: int = 0
) -> Tensor:
    """Second-order rise of the loss when each channel alone becomes an affine function of the others, [C], nats.

    min over θ of the mean over images of Σ_p g_p(Φθ - a)_p + ½ h_p (Φθ - a)_p², Φ a constant and the parents' values.
    The parents are the channels that fit best; which of them stay is not known yet. Invariant to rescaling a channel
    where the reader undoes it.

    Args:
        rows: values a, gradients g and curvature h at the reader's input.
        weight: of the reader, [O, C, *taps].
        parents: r, at most all others.
        ridge: as in `weighted_affine`.
        rule: who the parents are, see `parent_strength`.
        seed: of random parents.

    Raises:
        InputError: an unknown rule, parents that are no whole number of at least 0, a negative ridge, fewer rows than
            parents.

    Source: causal mechanism reduction, affine case of theorem 1.
    """
    if rule not in PARENT_RULES:
        raise InputError(f"score: cmr_affine has no parent rule {rule!r}; use one of {', '.join(PARENT_RULES)}")
    if parents < 0 or parents != int(parents) or ridge < 0:
        raise InputError(f"score: cmr_affine({parents:g}, {ridge:g}): parents is a whole number, neither below 0")
    channels = rows.values.shape[1]
    covariance = torch.cov(rows.values.T, correction=0).reshape(channels, channels)
    strength = parent_strength(covariance, weight, rule, seed).fill_diagonal_(-1)
    chosen = strength.topk(min(int(parents), channels - 1), dim=1).indices
    return weighted_affine(rows, range(channels), chosen, ridge).risk
