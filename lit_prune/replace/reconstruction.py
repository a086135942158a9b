"""The `reconstruction` score: what a unit is worth to readers that may solve their weights again without it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.layers import Batches
from lit_prune.replace.kernels import is_solvable, kernel_of
from lit_prune.replace.patches import PositionSample, WaitingRows, gradient_samples, input_rows, output_rows
from lit_prune.replace.regression import Covariance, ridged, square
from lit_prune.structure import ChannelGraph, CostModel, Group, axes, trace_groups
from lit_prune.task import Task, settle

RANK = 1e-12  # share of the largest eigenvalue below which one counts as 0
WAITING = 32  # removals carried out in one product
RIDGE = 1e-4
WIDEST = 10_000  # most values an output reads of which all products are formed: 800 MB, a minute's factorisation
POSITIONS = 64  # most positions of one image in a covariance
PIECE = 32  # images unfolded at once


@dataclass
class Elimination:
    """The state of one reader of a group during the elimination; units are told by their place among those held.

    The inverse is `inverse - Σ rowsᵀ solved` over the removals that wait: a layer of 512 channels and 3 x 3 kernels has
    one of 4,608 x 4,608, and to write all of it once a removal would take most of an elimination's time.

    Attributes:
        inverse: inverse of the ridged covariance of its input patches at the units' places, float64 [units·taps, same].
        weight: its flattened kernels there, transposed, outputs weighted by sensitivity, float64 [units·taps, O].
        blocks: present diagonal blocks of the inverse, float64 [units, taps, taps].
        waiting: (rows, solved) of each removal that `inverse` does not have yet, [taps, units·taps] both.
    """

    inverse: Tensor
    weight: Tensor
    blocks: Tensor
    waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def build(cls, covariance: Tensor, weight: Tensor, metric: Tensor, columns: Tensor, ridge: float) -> "Elimination":
        """From population moments.

        Args:
            covariance: of the input patches, [D, D].
            weight: [O, D].
            metric: positive semidefinite [O, O]; an error δ of the output counts δᵀ·metric·δ.
            columns: places of each unit in the patch, int64 [units, taps].
            ridge: relative to each input's own variance.
        """
        values, vectors = torch.linalg.eigh(metric)
        seen = values > RANK * values[-1]  # few images give a classifier of 1,000 outputs a metric of low rank
        root = (vectors[:, seen] * values[seen].sqrt()).T  # rootᵀ root = metric
        read = root @ weight
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged(covariance, ridge, read.square().sum(0))))
        blocks = inverse[columns[:, :, None], columns[:, None, :]]
        places = columns.flatten()
        return cls(square(inverse, places), read[:, places].T.contiguous(), blocks)

    def costs(self, units: Tensor) -> Tensor:
        """Rise of the error if one of `units` goes and all other weights are solved again, float64 [len(units)].

        `tr(W_j (P_jj)⁻¹ W_jᵀ)`, P the inverse and W the present solution (optimal brain surgeon, on blocks).
        """
        weight = self.weight.unflatten(0, self.blocks.shape[:2])[units]  # [n, taps, O]
        return torch.linalg.solve(self.blocks[units], weight @ weight.mT).diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, unit: int) -> None:
        """Takes the unit out and solves the other weights again."""
        units, taps = self.blocks.shape[:2]
        here = slice(unit * taps, (unit + 1) * taps)
        rows = self.inverse[here].clone()
        for before, solved in self.waiting:
            rows -= before[:, here].T @ solved
        solved = torch.linalg.solve(rows[:, here], rows)  # P_jj⁻¹ P_j:
        self.weight -= solved.T @ self.weight[here]
        self.blocks -= torch.einsum(
            "aub,auc->ubc", rows.unflatten(1, (units, taps)), solved.unflatten(1, (units, taps))
        )
        self.waiting.append((rows, solved))

    def keep(self, units: Tensor) -> None:
        """Carries the waiting removals out and forgets all units but these."""
        if self.waiting:
            rows, solved = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
            self.inverse.addmm_(rows.T, solved, alpha=-1)
        taps = self.blocks.shape[1]
        places = (units[:, None] * taps + torch.arange(taps)).flatten()
        self.inverse, self.weight = square(self.inverse, places), self.weight[places]
        self.blocks, self.waiting = self.blocks[units], []


def elimination_costs(readers: Sequence[Elimination], units: int) -> Tensor:
    """Error that each unit adds when it goes in greedy order (the cheapest of those left goes next), float64 [units].

    The error is Σ over readers of `E (W u - Ŵ u_K)ᵀ metric (W u - Ŵ u_K)`, Ŵ the least-squares solution on the units
    still there. Values never fall along the order, so that their ranking is the order; the last unit has the largest.

    Args:
        readers: layers that read the units; used up.
        units: how many there are.
    """
    held, left = torch.arange(units), torch.arange(units)  # units that the readers hold; places in it not yet removed
    costs = torch.zeros(units, dtype=torch.float64)
    highest = 0.0
    while len(left):
        rises = torch.stack([reader.costs(left) for reader in readers]).sum(0)
        cheapest = int(rises.argmin())
        place, left = int(left[cheapest]), torch.cat([left[:cheapest], left[cheapest + 1 :]])
        highest = max(highest * (1 + 1e-12), float(rises[cheapest]))
        costs[held[place]] = highest
        for reader in readers:
            reader.remove(place)
        if len(held) - len(left) == WAITING:
            for reader in readers:
                reader.keep(left)
            held, left = held[left], torch.arange(len(left))
    return costs


@dataclass(frozen=True)
class ReaderMoments:
    """What is known of a layer that reads a group.

    Attributes:
        covariance: means and population covariance of its input patches, zero padding included, float64.
        metric: E[Σ_p g gᵀ], float64 [O, O], g = ∂(v·prediction)/∂output, v standard normal, the mean over images, p
            over positions: the Gauss-Newton matrix of the prediction's squared change, positions taken as independent.
        rows: number of positions in the covariance.
    """

    covariance: Covariance
    metric: Tensor
    rows: int

    @property
    def ridge(self) -> float:
        """Relative to each input's variance: `RIDGE`, or (D / rows)² where few positions determine D weights badly.

        Else every unit of a classifier that reads 1,280 features of 250 images looks as if the others could replace it.
        """
        return max(RIDGE, (len(self.covariance.inputs) / self.rows) ** 2)


def reconstruction_costs(
    model: nn.Module,
    batches: Batches,
    example_input: Any,
    per_mac: float = 1.0,
    seed: int = 0,
    task: Task | str | None = None,
) -> dict[str, Tensor]:
    """Expected squared distortion of the prediction that each unit of each prunable group adds, per multiply-add.

    Within a group: greedy backward elimination, see `elimination_costs`. The error δ of a reader's output counts
    `δᵀ E[Σ_p g gᵀ] δ`, g the gradient of a random unit-variance projection of the prediction: its expected squared
    change to first order, positions taken as independent. So groups can be compared, and a global threshold
    divides a budget of multiply-adds among them.

    Args:
        model: any network; left as found.
        batches: what the task reads; targets are not used.
        example_input: what the network is called with, for tracing.
        per_mac: power of the unit's multiply-adds that the error is divided by; 0: not divided.
        seed: of positions and projections.
        task: what a batch and an output mean; None recognises it.

    Returns:
        Group name -> float64 [size], higher = keep.
    """
    task, batches = settle(task, model, batches)
    graph = trace_groups(model, example_input)
    moments = reader_moments(model, readers_of(model, graph), batches, task, seed)
    return costs_by_group(model, graph, moments, CostModel.build(model, graph, example_input), per_mac)


def costs_by_group(
    model: nn.Module,
    graph: ChannelGraph,
    moments: Mapping[str, ReaderMoments],
    cost_model: CostModel,
    per_mac: float = 1.0,
) -> dict[str, Tensor]:
    """As `reconstruction_costs`, from what has been measured already."""
    groups = [group for group in _silent(graph) if any(name in moments for name in group.consumers)]
    return {
        group.name: _group_costs(model, group, moments) / _unit_macs(cost_model, group) ** per_mac for group in groups
    }


def readers_of(model: nn.Module, graph: ChannelGraph) -> list[str]:
    """All layers that read a prunable group and that the score can solve again."""
    return sorted({name for group in _silent(graph) for name in solvable_readers(model, group)})


def _silent(graph: ChannelGraph) -> list[Group]:
    """The groups whose removed units are zeros to their readers; behind a norm the others change too."""
    return [group for group in graph.prunable if group.role != "width"]


def solvable_readers(model: nn.Module, group: Group) -> list[str]:
    """Layers that read the group, can be solved again, and are not too wide for their second moments (`WIDEST`)."""
    readers = {name: model.get_submodule(name) for name in group.consumers}
    return [name for name, m in readers.items() if is_solvable(m) and kernel_of(m)[0].numel() <= WIDEST]


def _unit_macs(cost_model: CostModel, group: Group) -> float:
    """Multiply-adds that the network saves without one unit of the group."""
    fewer = cost_model.sizes.copy()
    fewer[cost_model.names.index(group.name)] -= 1
    return float(max(1, cost_model.macs(cost_model.sizes) - cost_model.macs(fewer)))


def _group_costs(model: nn.Module, group: Group, moments: Mapping[str, ReaderMoments]) -> Tensor:
    readers = []
    for name, columns in reader_columns(model, group, moments).items():
        weight = kernel_of(model.get_submodule(name)).cpu().double()
        found = moments[name]
        readers.append(
            Elimination.build(found.covariance.inputs, weight.flatten(1), found.metric, columns, found.ridge)
        )
    return elimination_costs(readers, group.size)


def reader_columns(model: nn.Module, group: Group, readers: Iterable[str]) -> dict[str, Tensor]:
    """For those of `readers` that read the group: places of each unit in their patch, int64 [units, taps]."""
    found = {}
    for member in group.members:
        if member.axis == "in" and member.module in readers and member.module in group.consumers:
            taps = model.get_submodule(member.module).weight[0, 0].numel()
            found[member.module] = (torch.tensor(member.positions)[:, :, None] * taps + torch.arange(taps)).flatten(1)
    return found


def reader_moments(
    model: nn.Module, layers: Sequence[str], batches: Batches, task: Task | str | None = None, seed: int = 0
) -> dict[str, ReaderMoments]:
    """What each layer reads and how much its output matters, in one pass with gradients; on the CPU.

    Args:
        model: the network.
        layers: see `is_solvable`.
        batches: what the task reads; targets are not used.
        task: what a batch and an output mean; None recognises it.
        seed: of the positions, of which `POSITIONS` an image are used for the covariance, and of the projections.
    """
    if not layers:
        raise InputError(
            "model: every layer that reads channels which can be pruned is grouped, or its forward is another map than "
            "that of its weights, so nothing can be solved again; use another score, such as cmr_logit"
        )
    task, batches = settle(task, model, batches)
    rows = WaitingRows()
    metrics: dict[str, Tensor] = {}
    samples = {name: PositionSample(POSITIONS, seed) for name in layers}
    count = 0
    for sample in gradient_samples(model, batches, layers, task, seed):
        count += sample.size
        for name, calls in sample.at.items():
            module = model.get_submodule(name)
            for inputs, gradient in calls:
                _add_inputs(rows, name, module, inputs, gradient, samples[name])
                slopes = output_rows(module, gradient, None)
                product = (slopes.T @ slopes).double().cpu()
                metrics[name] = metrics[name].add_(product) if name in metrics else product
    moments, sums = {}, rows.finish()
    while sums:  # what has been turned goes: a ResNet-50 has 1 GB of either
        name, found = sums.popitem()
        moments[name] = ReaderMoments(found.covariance().cpu(), metrics.pop(name) / count, int(found.rows))
    return moments


def _add_inputs(
    found: WaitingRows, name: str, module: nn.Module, inputs: Tensor, output: Tensor, sample: PositionSample
) -> None:
    """Adds the patches that a layer reads at sampled positions of its output."""
    chosen = sample.draw(len(output), output[0].numel() // axes.width(module, "out"))
    for start in range(0, len(output), PIECE):
        part = slice(start, start + PIECE)
        found.add(name, input_rows(module, inputs[part], None if chosen is None else chosen[part]))
