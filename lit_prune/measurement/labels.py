"""What channels and blocks say about the class label, from outputs averaged over positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.layers import Batches, position_view, removing, select_layers
from lit_prune.measurement.local_axis import dead_channels
from lit_prune.measurement.passes import collect
from lit_prune.measurement.protocol import DEFAULT_PROTOCOL
from lit_prune.task import Task, settle

if TYPE_CHECKING:
    from lit_prune.models.anatomy import Block


RIDGE = 1e-6


def quantile_bins(values: Tensor, bins: int = 10) -> Tensor:
    """Equal-frequency bin of each value in its column, int64 [n, C], from 0.

    Bin k begins at the order statistic of rank ⌊k·n/bins⌋. Equal values share a bin, so ties are decided by the values
    alone, bins may be unequal, and a constant column has one bin.
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
    task: Task | str | None = None,
) -> dict[str, float]:
    """Block scores s_b = mean over channels of I(bin(Z_b,c); label), nats, by block name in the order given.

    Z_b is the output of the block's last member: feature maps averaged over height and width, tokens [B, T, C] averaged
    over T. One forward pass; the model is left as found.

    Args:
        model: any network.
        blocks: objects with `name` and `members` (module names in forward order).
        batches: the fixed probe.
        limit: images at most.
        task: what a batch and an output mean; None recognises it. Without classes the label is the task variable's bin.

    Raises:
        InputError: no data, a block that never ran, labels that do not fit.

    Source: M2M-DC section 3.1.
    """
    last = {block.name: block.members[-1] for block in blocks}
    modules = {name: model.get_submodule(name) for name in last.values()}
    task, batches = settle(task, model, batches)
    outputs, labels = collect(
        model, _first(batches, limit, task), Pooled(model, task, modules, limit, token=None), task
    )
    silent = [name for name, member in last.items() if member not in outputs]
    if silent:
        raise InputError(f"blocks: {silent[0]!r} does not run in a forward pass; leave it out")
    return {name: float(binned_information(outputs[member], labels).mean()) for name, member in last.items()}


def _first(batches: Batches, limit: int, task: Task) -> Iterator[Any]:
    """Batches until `limit` samples are there."""
    seen = 0
    for batch in batches:
        yield batch
        seen += task.size(batch)
        if seen >= limit:
            return


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


def conditional_order(sums: ClassSums) -> tuple[Tensor, Tensor]:
    """Greedy order of channels by what they add about the label, given those already taken.

    gain(c | taken) = ½·log(σ²/ω²): σ² the variance of c left unexplained by the taken channels under the total
    covariance S, ω² the same under the within-class covariance W. Gains of a prefix sum to ½·log(det S/det W), the
    Gaussian information of that set about the label. Both variances follow one Cholesky column a step, O(N²).

    Both covariances get `RIDGE`·S_cc added to their diagonals, that is independent noise of this share of each
    channel's variance: gains stay finite and non-negative, and a duplicate's gain is of the order of `RIDGE`.
    With fewer images than about 10·N the gains are biased upwards, most for the last channels.

    Returns:
        The order int64 [N], the first taken first, and the gains in nats [N] in that order. Constant channels come
        last, in index order, with gain 0.

    Source: M2M-DC section 3.2 ("conditional MI"); the Gaussian form is this project's reading of it.
    """
    total, within = sums.covariances()
    variance = total.diagonal()
    dead = dead_channels(variance)
    places = (~dead).nonzero().flatten()
    noise = torch.diag(RIDGE * variance[places])
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


class Pooled:
    """Outputs of layers averaged over positions, sample by sample, and the task's `kinds`, of the first samples.

    Args:
        model: any network.
        task: what a batch and an output mean.
        layers: modules of any type that return one tensor; None takes the convolutions and linear layers.
        limit: most samples to keep.
        token: index of the token that stands for a token layer, or None for the mean.
    """

    gradients = False
    losses = True

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        layers: Mapping[str, nn.Module] | None = None,
        limit: int = 5000,
        token: int | None = DEFAULT_PROTOCOL.token,
    ) -> None:
        self.task, self.limit, self.token = task, limit, token
        self.layers = select_layers(model) if layers is None else layers
        self.kept: dict[str, list[Tensor]] = {}
        self.running: dict[str, list[Tensor]] = {}  # of the batch that is running, call by call
        self.kinds: list[Tensor] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See `Collector`."""

        def keep(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
            if sum(map(len, self.kinds)) < self.limit:
                values = position_view(module, self.seen(args, kwargs, output).detach(), self.token)
                self.running.setdefault(name, []).append(values.mean(1, dtype=torch.float32).cpu())

        hooks = [module.register_forward_hook(partial(keep, n), with_kwargs=True) for n, module in self.layers.items()]
        with removing(hooks):
            yield

    def seen(self, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """What is kept of a layer's call: its output."""
        return output

    def add(self, output: Any, batch: Any) -> None:
        """See `Collector`. Several calls, windows and boxes of a sample are averaged."""
        if sum(map(len, self.kinds)) < self.limit:
            self.kinds.append(self.task.kinds(output, batch).cpu())
            for name, calls in self.running.items():
                size = len(self.kinds[-1])
                rows = [v.unflatten(0, (size, -1)).mean(1) for v in calls if len(v) % size == 0]
                if rows:
                    self.kept.setdefault(name, []).append(torch.stack(rows).mean(0))
        self.running.clear()

    def result(self) -> tuple[dict[str, Tensor], Tensor]:
        """Layer -> float32 [n, N] in the order in which they run, and kinds [n]; n ≤ `limit`.

        Layers without rows for every sample are left out.
        """
        count = sum(map(len, self.kinds))
        self.kept = {name: parts for name, parts in self.kept.items() if sum(map(len, parts)) == count}
        values = {name: torch.cat(parts)[: self.limit] for name, parts in self.kept.items()}
        return values, torch.cat(self.kinds)[: self.limit]
