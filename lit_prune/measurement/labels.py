"""What channels and blocks say about the class label, from outputs averaged over positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.layers import Batches, position_view, removing
from lit_prune.measurement.local_axis import dead_channels
from lit_prune.running import undisturbed
from lit_prune.task import Task, settle

if TYPE_CHECKING:
    from lit_prune.models.anatomy import Block


RIDGE = 1e-6


def quantile_bins(values: Tensor, bins: int = 10) -> Tensor:
    """Equal-frequency bin of each value in its column, int64 [n, C], from 0.

    Bin k begins at the order statistic of rank ⌊k·n/bins⌋. Equal values share a bin, so ties are decided by the values
    alone, bins may be unequal, and a constant column has one bin.

    Args:
        values: [n, C].
        bins: number of bins, ≥ 2.
    """
    count = len(values)
    ranks = torch.arange(1, bins, device=values.device) * count // bins
    edges = values.sort(0).values[ranks]  # [bins - 1, C]
    return torch.searchsorted(edges.T.contiguous(), values.T.contiguous(), right=True).T


def as_classes(kinds: Tensor, bins: int = 10) -> Tensor:
    """Classes as they are; values of a task variable as the numbers of their quantile bins, int64 [n]."""
    return quantile_bins(kinds[:, None], bins)[:, 0] if kinds.is_floating_point() else kinds


def binned_information(values: Tensor, labels: Tensor, bins: int = 10) -> Tensor:
    """Mutual information between each channel's quantile bin and the label, nats, float64 [C].

    Labels of floats are values of a task variable and cut into as many quantile bins.

    I = Σ_{b,y} p(b,y)·log(p(b,y)/(p(b)·p(y))), the plug-in estimate: biased upwards by about
    (bins-1)·(K-1)/(2n) nats, the same for every channel with all bins filled.

    Args:
        values: [n, C], for instance pooled outputs.
        labels: [n].
        bins: number of bins.

    Raises:
        InputError: shapes that do not fit, fewer samples than bins, non-finite values.

    Source: M2M-DC section 3.1.
    """
    if values.ndim != 2 or labels.shape != values.shape[:1]:
        raise InputError(f"values: shape {tuple(values.shape)} with labels {tuple(labels.shape)}; give [n, C] and [n]")
    if len(values) < bins:
        raise InputError(f"values: {len(values)} samples for {bins} bins; give at least {bins}")
    if not torch.isfinite(values).all():
        raise InputError("values: NaN or infinite; mend the network or the data")
    classes, labels = torch.unique(as_classes(labels, bins), return_inverse=True)
    channels = values.shape[1]
    cells = quantile_bins(values, bins) + bins * torch.arange(channels, device=values.device)  # [n, C]
    cells = cells * len(classes) + labels[:, None]
    counts = torch.bincount(cells.flatten(), minlength=channels * bins * len(classes))
    joint = counts.view(channels, bins, len(classes)).double() / len(values)
    independent = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
    return (torch.xlogy(joint, joint) - torch.xlogy(joint, independent)).sum((1, 2)).clamp_min(0)


def block_information(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Batches,
    limit: int = 5000,
    bins: int = 10,
    token: int | None = None,
    task: Task | str | None = None,
) -> dict[str, float]:
    """Block scores s_b = mean over channels of I(bin(Z_b,c); label), nats, by block name in the order given.

    Z_b is the output of the block's last member: feature maps averaged over height and width, tokens [B, T, C] averaged
    over T unless `token` picks one. One forward pass; the model is left as found.

    Args:
        model: any network.
        blocks: objects with `name` and `members` (module names in forward order).
        batches: the fixed probe.
        limit: images at most.
        bins: quantile bins.
        token: index of the token to read, or None for the mean.
        task: what a batch and an output mean; None recognises it. Without classes the label is the task variable's bin.

    Raises:
        InputError: no data, a block that never ran, labels that do not fit.

    Source: M2M-DC section 3.1.
    """
    last = {block.name: block.members[-1] for block in blocks}
    outputs, labels = pooled_outputs(model, tuple(dict.fromkeys(last.values())), batches, limit, token, task)
    silent = [name for name, member in last.items() if member not in outputs]
    if silent:
        raise InputError(f"blocks: {silent[0]!r} does not run in a forward pass; leave it out")
    return {name: float(binned_information(outputs[member], labels, bins).mean()) for name, member in last.items()}


@dataclass(frozen=True)
class ClassSums:
    """Class-wise sums of pooled outputs; they add across batches and ranks.

    Attributes:
        counts: [K], images a class.
        first: [K, N], Σ y over the images of a class.
        second: [N, N], Σ y yᵀ over all images.
    """

    counts: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, values: Tensor, labels: Tensor, classes: int) -> ClassSums:
        """Sums of one batch: values [n, N] (converted to float64), labels int64 [n] below `classes`."""
        values = values.double()
        counts = torch.bincount(labels, minlength=classes).double()
        first = values.new_zeros(classes, values.shape[1]).index_add_(0, labels, values)
        return cls(counts, first, values.T @ values)

    def __add__(self, other: ClassSums) -> ClassSums:
        return ClassSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Total covariance S and pooled within-class covariance W, both [N, N]; W ≤ S."""
        present = self.counts > 0
        count = self.counts.sum()
        mean = self.first.sum(0) / count
        means = self.first[present] / self.counts[present, None]  # [K, N]
        between = means.T @ (means * self.counts[present, None]) / count
        uncentred = self.second / count
        return uncentred - torch.outer(mean, mean), uncentred - between


def conditional_order(sums: ClassSums, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Greedy order of channels by what they add about the label, given those already taken.

    gain(c | taken) = ½·log(σ²/ω²): σ² the variance of c left unexplained by the taken channels under the total
    covariance S, ω² the same under the within-class covariance W. Gains of a prefix sum to ½·log(det S/det W), the
    Gaussian information of that set about the label. Both variances follow one Cholesky column a step, O(N²).

    Both covariances get `ridge`·S_cc added to their diagonals, that is independent noise of this share of each
    channel's variance: gains stay finite and non-negative, and a duplicate's gain is of the order of `ridge`.
    With fewer images than about 10·N the gains are biased upwards, most for the last channels.

    Args:
        sums: class-wise sums.
        ridge: share of the variance added as noise, > 0.

    Returns:
        The order int64 [N], the first taken first, and the gains in nats [N] in that order. Constant channels come
        last, in index order, with gain 0.

    Source: M2M-DC section 3.2 ("conditional MI"); the Gaussian form is this project's reading of it.
    """
    total, within = sums.covariances()
    variance = total.diagonal()
    dead = dead_channels(variance)
    places = (~dead).nonzero().flatten()
    noise = torch.diag(ridge * variance[places])
    order, gains = _greedy(total[places][:, places] + noise, within[places][:, places] + noise)
    rest = dead.nonzero().flatten()
    return torch.cat([places[order], rest]), torch.cat([gains, gains.new_zeros(len(rest))])


def _greedy(total: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """Order and gains by pivoted Cholesky steps on two positive definite matrices [N, N] with one pivot order."""
    channels = len(total)
    matrices = torch.stack([total, within])  # [2, N, N]
    residual = matrices.diagonal(dim1=1, dim2=2).clone()  # [2, N]
    factor = torch.zeros_like(matrices)  # column t is step t
    taken = torch.zeros(channels, dtype=torch.bool, device=total.device)
    order = torch.zeros(channels, dtype=torch.long, device=total.device)
    gains = total.new_zeros(channels)
    smallest = torch.finfo(total.dtype).eps * residual
    for step in range(channels):
        residual = torch.maximum(residual, smallest)
        gain = 0.5 * (residual[0].log() - residual[1].log())
        pivot = int(gain.masked_fill(taken, -torch.inf).argmax())
        order[step], gains[step], taken[pivot] = pivot, gain[pivot].clamp_min(0), True
        known = (factor[:, :, :step] @ factor[:, pivot, :step, None]).squeeze(2)  # [2, N]
        column = (matrices[:, :, pivot] - known) / residual[:, pivot, None].sqrt()
        factor[:, :, step] = column
        residual = residual - column.square()
    return order, gains


def pooled_outputs(
    model: nn.Module,
    modules: Sequence[str],
    batches: Batches,
    limit: int = 5000,
    token: int | None = None,
    task: Task | str | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs of the named modules averaged over positions, image by image, with what says which kind an image is.

    Feature maps [B, C, H, W] are averaged over H and W, tokens [B, T, C] over T unless `token` picks one.

    Args:
        model: any network; left as found.
        modules: qualified names, of any module type that returns one tensor.
        batches: read until `limit` images are there.
        limit: most images to keep.
        token: index of the token, or None for the mean.
        task: what a batch and an output mean; None recognises it.

    Returns:
        Name to float32 [n, C] on the CPU (modules that never ran are absent), and the task's `kinds` [n].
    """
    kept: dict[str, list[Tensor]] = {}
    kinds: list[Tensor] = []
    task, batches = settle(task, model, batches)

    def keep(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        values = position_view(module, output, token).mean(1, dtype=torch.float32)
        kept.setdefault(name, []).append(values.cpu())

    handles = [model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in modules]
    seen = 0
    with removing(handles), undisturbed(model):
        for batch in batches:
            for piece in task.pieces(batch):
                piece = task.to(piece, model)
                kinds.append(task.kinds(task.run(model, piece), piece).cpu())
                seen += len(kinds[-1])
            if seen >= limit:
                break
    if not seen:
        raise InputError("batches: there is no batch in it; give at least one")
    return {name: torch.cat(parts)[:limit] for name, parts in kept.items()}, torch.cat(kinds)[:limit]
