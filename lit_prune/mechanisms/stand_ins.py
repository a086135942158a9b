"""Constants and affine combinations of kept channels that stand in for removed ones, folded into their reader."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_prune.activations import position_view
from lit_prune.layers import removing, to_model, undisturbed
from lit_prune.mechanisms.consumers import Reader
from lit_prune.moments import LayerSums


@dataclass(frozen=True)
class InputSums:
    """What a layer reads: `sums` of its input channels over images and positions, `size` of the map it reads."""

    sums: LayerSums
    size: tuple[int, ...]


@dataclass(frozen=True)
class StandIn:
    """a_j ≈ θ0 + Σ θ_p a_p for every removed input channel j of a layer.

    Attributes:
        offsets: θ0, float64 [removed].
        coefficients: θ, float64 [removed, kept].
        unexplained: share of the removed channels' summed variance that is left.
    """

    offsets: Tensor
    coefficients: Tensor
    unexplained: float


def collect_inputs(model: nn.Module, layers: Sequence[str], images: Sequence[Tensor]) -> dict[str, InputSums]:
    """Sums of the input channels of `layers` over all images and positions (without padding), in one pass.

    Args:
        model: the network; left as found.
        layers: names of convolutions and linear layers.
        images: batches [B, C, H, W].
    """
    found: dict[str, InputSums] = {}

    def observer(name: str):
        def hook(module: nn.Module, inputs: tuple) -> None:
            values = position_view(module, inputs[0].detach(), token=None)  # [B, P, C]
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            if name not in found:
                found[name] = InputSums(LayerSums.zeros(values.mean((0, 1))), tuple(inputs[0].shape[2:]))
            shifted = values - found[name].sums.shift.to(values.dtype)
            found[name].sums.add(shifted.flatten(0, 1), shifted.mean(1))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(observer(name)) for name in layers]
    with removing(handles), undisturbed(model):
        for batch in images:
            model(to_model(model, batch))
    return found


def constants(sums: LayerSums, reader: Reader) -> StandIn:
    """Each removed channel's mean: the constant that distorts an affine reader's output least.

    Source: causal mechanism reduction, proof of the CMR-Logit score.
    """
    removed = list(reader.removed)
    mean = sums.shift + sums.first / sums.samples
    return StandIn(mean[removed], mean.new_zeros(len(removed), len(reader.kept)), 1.0)


def affine(sums: LayerSums, reader: Reader, parents: int | None, ridge: float) -> StandIn:
    """Ridge regression of each removed channel on its best correlated kept channels of the same layer.

    Args:
        sums: of the layer's input channels.
        reader: which go and which stay.
        parents: how many kept channels; None or more than there are: all.
        ridge: relative to the parents' mean variance, above 0.

    Source: causal mechanism reduction, affine case of theorem 1 with uniform curvature and no gradient.
    """
    removed, kept = list(reader.removed), list(reader.kept)
    mean = sums.first / sums.samples
    covariance = sums.second / sums.samples - torch.outer(mean, mean)
    mean = mean + sums.shift
    inner, cross = covariance[kept][:, kept], covariance[kept][:, removed]  # [K, K], [K, R]
    count = len(kept) if parents is None else min(parents, len(kept))
    chosen = _best_correlated(covariance, kept, removed, count)  # [R, count]
    blocks = inner[chosen[:, :, None], chosen[:, None, :]]  # [R, count, count]
    scale = blocks.diagonal(dim1=1, dim2=2).mean(1) if count else cross.new_zeros(len(removed))
    loading = (ridge * scale).clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    blocks = blocks + torch.diag_embed(loading.expand(-1, count))
    theta = torch.linalg.solve(blocks, cross.T.gather(1, chosen)[..., None])[..., 0]
    coefficients = cross.new_zeros(len(removed), len(kept)).scatter_(1, chosen, theta)
    left = covariance.diagonal()[removed] - (coefficients * (2 * cross.T - coefficients @ inner)).sum(1)
    total = covariance.diagonal()[removed].sum()
    unexplained = float(left.clamp_min(0).sum() / total) if total > 0 else 0.0
    return StandIn(mean[removed] - coefficients @ mean[kept], coefficients, unexplained)


def _best_correlated(covariance: Tensor, kept: list[int], removed: list[int], count: int) -> Tensor:
    """Places within `kept` of the channels best correlated with each removed one, int64 [R, count], ascending."""
    spread = covariance.diagonal().clamp_min(0).sqrt()
    scale = torch.outer(spread[removed], spread[kept])
    strength = torch.where(scale > 0, covariance[removed][:, kept].abs() / scale, 0)
    return strength.topk(count, dim=1).indices.sort(1).values


@dataclass(frozen=True)
class Folded:
    """A reader's affine map with the stand-ins folded in.

    Attributes:
        weight: float64 [O, kept, *taps].
        shift: what the output gains, float64 [O].
        border: mean over positions and sum over outputs of the squared error that zero padding makes: at the border the
            removed channels were zero, the shift is not.
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
        size: height and width of the map it reads; () for a linear layer.

    Source: causal mechanism reduction, proposition 1.
    """
    weight = module.weight.detach().to(stand_in.offsets)[list(reader.written)]
    lost, rest = weight[:, list(reader.removed)], weight[:, list(reader.kept)]
    rest = rest + torch.einsum("oj...,jk->ok...", lost, stand_in.coefficients)
    carried = torch.einsum("oj...,j->o...", lost, stand_in.offsets)[:, None]
    shift = carried.flatten(1).sum(1)
    border = 0.0
    if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
        ones = carried.new_ones(1, 1, *size)
        actual = F.conv2d(ones, carried, None, module.stride, module.padding, module.dilation)[0]  # [O, H, W]
        border = float((actual - shift[:, None, None]).square().mean((1, 2)).sum())
    return Folded(rest, shift, border, carried)
