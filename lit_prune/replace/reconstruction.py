"""The `reconstruction` score: what a unit is worth to readers that may solve their weights again without it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.layers import Batches
from lit_prune.replace.elimination import Elimination, elimination_costs
from lit_prune.replace.kernels import is_solvable, kernel_of
from lit_prune.replace.patches import PositionSample, input_rows, output_rows
from lit_prune.replace.regression import Covariance, PairSums
from lit_prune.replace.slopes import gradient_samples
from lit_prune.structure import ChannelGraph, CostModel, Group, axes, trace_groups
from lit_prune.task import Task, settle

RIDGE = 1e-4
WIDEST = 10_000  # most values an output reads of which all products are formed: 800 MB, a minute's factorisation
POSITIONS = 64  # most positions of one image in a covariance
PIECE = 32  # images unfolded at once


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
    sums: dict[str, PairSums] = {}
    metrics: dict[str, Tensor] = {}
    samples = {name: PositionSample(POSITIONS, seed) for name in layers}
    count = 0
    for sample in gradient_samples(model, batches, layers, task, seed):
        count += sample.size
        for name, calls in sample.at.items():
            module = model.get_submodule(name)
            for inputs, gradient in calls:
                _add_inputs(sums, name, module, inputs, gradient, samples[name])
                slopes = output_rows(module, gradient, None)
                metrics[name] = metrics.get(name, 0) + (slopes.T @ slopes).double().cpu()
    moments = {}
    while sums:  # what has been turned goes: a ResNet-50 has 1 GB of either
        name, found = sums.popitem()
        moments[name] = ReaderMoments(found.covariance().cpu(), metrics[name] / count, int(found.rows))
    return moments


def _add_inputs(
    sums: dict[str, PairSums], name: str, module: nn.Module, inputs: Tensor, output: Tensor, sample: PositionSample
) -> None:
    """Adds the patches that a layer reads at sampled positions of its output."""
    chosen = sample.draw(len(output), output[0].numel() // axes.width(module, "out"))
    for start in range(0, len(output), PIECE):
        part = slice(start, start + PIECE)
        rows = input_rows(module, inputs[part], None if chosen is None else chosen[part])
        sums.setdefault(name, PairSums.zeros(rows, rows[:, :0])).add(rows, rows[:, :0])
