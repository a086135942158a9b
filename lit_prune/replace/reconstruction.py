"""The `reconstruction` score: what a unit is worth to readers that may solve their weights again without it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.measurement.layers import Batches, removing
from lit_prune.measurement.passes import differentiable
from lit_prune.replace.elimination import ReaderMoments, elimination_costs
from lit_prune.replace.patches import PositionSample, input_rows, output_rows
from lit_prune.replace.regression import PairSums
from lit_prune.structure import CostModel, Group, trace_groups
from lit_prune.task import Task, settle
from lit_prune.task.running import undisturbed

RIDGE = 1e-4
POSITIONS = 64  # most positions of one image in a covariance
PIECE = 32  # images unfolded at once


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
        batches: what the task reads, read twice; targets are not used.
        example_input: what the network is called with, for tracing.
        per_mac: power of the unit's multiply-adds that the error is divided by; 0: not divided.
        seed: of positions and projections.
        task: what a batch and an output mean; None recognises it.

    Returns:
        Group name -> float64 [size], higher = keep.
    """
    task, batches = settle(task, model, batches)
    graph = trace_groups(model, example_input)
    groups = [group for group in graph.prunable if group.consumers and _readers(group, model)]
    names = sorted({name for group in groups for name in _readers(group, model)})
    covariances = patch_covariances(model, names, batches, seed, task)
    metrics = output_metrics(model, names, batches, seed, task)
    cost_model = CostModel.build(model, graph, example_input)
    return {
        group.name: _group_costs(model, group, covariances, metrics) / _unit_macs(cost_model, group) ** per_mac
        for group in groups
    }


def _readers(group: Group, model: nn.Module) -> list[str]:
    supported = (name for name in group.consumers if getattr(model.get_submodule(name), "groups", 1) == 1)
    return [name for name in supported if isinstance(model.get_submodule(name), nn.Conv2d | nn.Linear)]


def _unit_macs(cost_model: CostModel, group: Group) -> float:
    """Multiply-adds that the network saves without one unit of the group."""
    fewer = cost_model.sizes.copy()
    fewer[cost_model.names.index(group.name)] -= 1
    return float(max(1, cost_model.macs(cost_model.sizes) - cost_model.macs(fewer)))


def _group_costs(
    model: nn.Module, group: Group, covariances: Mapping[str, Tensor], metrics: Mapping[str, Tensor]
) -> Tensor:
    readers = []
    for member in group.members:
        if member.axis == "in" and member.module in covariances and member.module in group.consumers:
            weight = model.get_submodule(member.module).weight.detach().cpu().double()
            taps = weight[0, 0].numel()
            places = torch.tensor(member.positions)[:, :, None] * taps + torch.arange(taps)  # [units, positions, taps]
            covariance, metric = covariances[member.module], metrics[member.module]
            readers.append(ReaderMoments.build(covariance, weight.flatten(1), metric, places.flatten(1), RIDGE))
    return elimination_costs(readers, group.size)


def patch_covariances(
    model: nn.Module, layers: Sequence[str], batches: Batches, seed: int, task: Task
) -> dict[str, Tensor]:
    """Population covariance of the input patches of each layer, zero padding included, float64 [D, D] on the CPU.

    Args:
        model: the network.
        layers: Conv2d without groups, or Linear.
        batches: what the task reads.
        seed: of the positions, of which `POSITIONS` an image are used.
        task: what a batch means.
    """
    sums: dict[str, PairSums] = {}
    samples = {name: PositionSample(POSITIONS, seed) for name in layers}

    def observer(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            positions = output[0].numel() // len(module.weight)
            chosen = samples[name].draw(len(output), positions)
            for start in range(0, len(output), PIECE):
                part = slice(start, start + PIECE)
                rows = input_rows(module, inputs[0][part], None if chosen is None else chosen[part])
                sums.setdefault(name, PairSums.zeros(rows, rows[:, :0])).add(rows, rows[:, :0])

        return hook

    handles = [model.get_submodule(name).register_forward_hook(observer(name)) for name in layers]
    with removing(handles), undisturbed(model):
        for batch in batches:
            task.run(model, task.to(batch, model))
    return {name: found.covariance().inputs.cpu() for name, found in sums.items()}


def output_metrics(
    model: nn.Module, layers: Sequence[str], batches: Batches, seed: int, task: Task
) -> dict[str, Tensor]:
    """E[Σ_p g gᵀ] of each layer's output, float64 [O, O] on the CPU; g = ∂(v·prediction)/∂output, v standard normal.

    The mean is over images, p over positions. It is the Gauss-Newton matrix of the squared distortion, positions
    taken as independent.

    Args:
        model: the network.
        layers: names of convolutions and linear layers.
        batches: what the task reads.
        seed: of v.
        task: what the prediction is.
    """
    generator = torch.Generator().manual_seed(seed)
    totals: dict[str, Tensor] = {}
    outputs: list[tuple[str, Tensor]] = []

    def keeper(name: str):
        return lambda module, inputs, output: outputs.append((name, output))

    handles = [model.get_submodule(name).register_forward_hook(keeper(name)) for name in layers]
    count = 0
    handles.append(model.register_forward_pre_hook(differentiable, with_kwargs=True))
    with removing(handles), undisturbed(model, gradients=True):
        for batch in batches:
            outputs.clear()
            values = task.prediction(task.run(model, task.to(batch, model)))
            probe = torch.randn(values.shape, generator=generator).to(values)
            gradients = torch.autograd.grad((probe * values).sum(), [output for _, output in outputs])
            for (name, _), gradient in zip(outputs, gradients, strict=True):
                rows = output_rows(model.get_submodule(name), gradient, None)
                totals[name] = totals.get(name, 0) + (rows.T @ rows).double().cpu()
            count += task.size(batch)
    outputs.clear()
    return {name: total / count for name, total in totals.items()}
