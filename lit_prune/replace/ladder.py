"""How far the prediction moves when one group alone is cut and its readers are solved again, for a row of widths."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_prune.replace.kernels import kernel_of
from lit_prune.replace.patches import gradient_samples, input_rows, output_rows
from lit_prune.replace.reconstruction import ReaderMoments, reader_columns
from lit_prune.replace.regression import Covariance, ridged, square
from lit_prune.structure import ChannelGraph, Group
from lit_prune.task import Task, settle

LEVELS = 16
IMAGES = 512  # most images whose predictions are projected
_PIECE = 1 << 24  # most values of one product


@dataclass(frozen=True)
class Cut:
    """What a reader loses at each width, and what its other weights become: the change of its map, for L widths.

    Attributes:
        weight: float32 [L, O, D].
        bias: float32 [L, O].
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def build(
        cls,
        weight: Tensor,
        covariance: Covariance,
        columns: Tensor,
        order: Sequence[int],
        widths: Sequence[int],
        ridge: float,
    ) -> "Cut":
        """Least squares on the kept columns, for nested sets of units from one factorisation.

        The ridge pulls the kept weights towards what they are.

        With the columns in the order in which they are kept, the normal matrix N of every kept set is a leading block,
        and so is its Cholesky factor L. The right sides are the leading rows of N·W, and L⁻¹·N·W = Lᵀ·W, so that a
        width costs one triangular solve.

        Args:
            weight: of the reader, float64 [O, D].
            covariance: of its input patches.
            columns: places of each unit in the patch, int64 [units, taps].
            order: units, the last to go first.
            widths: ascending.
            ridge: relative to each input's own variance.
        """
        first = torch.ones(weight.shape[1], dtype=torch.bool, device=columns.device)
        first[columns.flatten()] = False
        rest = first.nonzero().flatten()  # columns of other groups
        placed = torch.cat([rest, columns[torch.tensor(order)].flatten()])
        outgoing = weight[:, placed].T  # [D, O]
        factor = torch.linalg.cholesky(ridged(square(covariance.inputs, placed), ridge, outgoing.square().sum(1)))
        halfway = factor.T @ outgoing  # [D, O]
        changes, biases = [], []
        for width in widths:
            kept = len(rest) + width * columns.shape[1]
            change = -weight.clone()
            solved = torch.linalg.solve_triangular(factor[:kept, :kept].T, halfway[:kept], upper=True)
            change[:, placed[:kept]] = (solved - outgoing[:kept]).T
            changes.append(change.float())
            biases.append(-(change @ covariance.input_mean).float())
        return cls(torch.stack(changes), torch.stack(biases))


def measured_distortion(
    model: nn.Module,
    batches: Iterable[Any],
    cuts: Mapping[str, Mapping[str, Cut]],
    task: Task | str | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Expected squared change of the prediction to first order, `E (Σ_p g_pᵀ δ_p)²`, for each group and width.

    δ is the error that a cut leaves in its readers' outputs, g the gradient of a random unit-variance projection of the
    prediction, p runs over all positions of all readers of the group: errors that add up over positions count as such.
    Since `Σ_p g_pᵀ (ΔW u_p + Δb) = ⟨ΔW, Σ_p g_p u_pᵀ⟩ + ⟨Δb, Σ_p g_p⟩`, one gradient of the weights for each image
    serves all widths.

    Args:
        model: any network; left as found.
        batches: of any kind the task knows; the first `IMAGES` samples are used.
        cuts: group -> reader -> change of its map.
        task: see `settle`.
        seed: of the projections.

    Returns:
        Group -> float64 [L].
    """
    task, batches = settle(task, model, batches)
    readers = sorted({reader for found in cuts.values() for reader in found})
    sums: dict[str, Tensor] = {}
    count = 0
    for sample in gradient_samples(model, batches, readers, task, seed):
        for group, found in cuts.items():
            moves = [
                _moved(model.get_submodule(reader), *call, cut)
                for reader, cut in found.items()
                for call in sample.at[reader]
            ]
            moved = torch.stack(moves).sum(0).double().square().sum(0).cpu()
            sums[group] = sums[group] + moved if group in sums else moved
        count += sample.size
        if count >= IMAGES:
            break
    return {group: total / count for group, total in sums.items()}


def _moved(module: nn.Module, inputs: Tensor, gradient: Tensor, cut: Cut) -> Tensor:
    """Change of the projected prediction of each image at each width, [B, L]."""
    _, outputs, wide = cut.weight.shape
    weight, bias = cut.weight.flatten(1).T.to(gradient), cut.bias.T.to(gradient)
    positions = gradient[0].numel() // outputs
    piece = max(1, _PIECE // (wide * max(positions, outputs)))
    parts = []
    for u, g in zip(inputs.split(piece), gradient.split(piece), strict=True):
        rows = input_rows(module, u, None).unflatten(0, (len(u), positions))
        slopes = output_rows(module, g, None).unflatten(0, (len(u), positions))
        products = slopes.transpose(1, 2) @ rows  # [b, O, D], each image's gradient of the weights
        parts.append(products.flatten(1) @ weight + slopes.sum(1) @ bias)
    return torch.cat(parts)


def ladder_widths(size: int) -> list[int]:
    """About `LEVELS` widths of a group, ascending, the dense one among them."""
    return sorted({max(1, round(size * level / LEVELS)) for level in range(1, LEVELS + 1)})


def group_cuts(
    model: nn.Module, group: Group, scores: Any, moments: Mapping[str, ReaderMoments], widths: Sequence[int]
) -> dict[str, Cut]:
    """The cuts of a group's readers, in the order of its units' scores.

    Args:
        model: the network.
        group: the group.
        scores: [size], higher = goes later.
        moments: of readers; others are left out.
        widths: ascending.
    """
    order = torch.as_tensor(scores).argsort(descending=True, stable=True).tolist()
    found = {}
    for name, columns in reader_columns(model, group, moments).items():
        weight = kernel_of(model.get_submodule(name)).cpu().double().flatten(1)
        found[name] = Cut.build(weight, moments[name].covariance, columns, order, widths, moments[name].ridge)
    return found


def distortion_ladders(
    model: nn.Module,
    graph: ChannelGraph,
    scores: Mapping[str, Sequence[float] | np.ndarray],
    batches: Iterable[Any],
    moments: dict[str, ReaderMoments],
    task: Task | str | None = None,
    seed: int = 0,
    droppable: Collection[str] = (),
) -> dict[str, tuple[list[int], list[float]]]:
    """Group -> widths (ascending) and how far the prediction moves at each, see `measured_distortion`.

    Args:
        model: the network; left as found.
        graph: its groups.
        scores: group -> score of each unit; groups that no layer of `moments` reads are left out.
        batches: see `measured_distortion`.
        moments: of readers; used up.
        task: see `settle`.
        seed: of the projections.
        droppable: groups that may go as a whole; their readers are left with a bias.
    """
    groups = [graph.by_name[name] for name in scores]
    widths = {group.name: [0] * (group.name in droppable) + ladder_widths(group.size) for group in groups}
    groups = [group for group in groups if len(widths[group.name]) > 1]  # one unit alone has no smaller width
    cuts, reads = {}, Counter(reader for group in groups for reader in group.consumers)
    for group in groups:
        cuts[group.name] = group_cuts(model, group, scores[group.name], moments, widths[group.name][:-1])
        reads.subtract(group.consumers)
        for reader in group.consumers:  # a ResNet-50 has 1 GB of moments, and more of cuts
            if not reads[reader]:
                moments.pop(reader, None)
    cuts = {name: found for name, found in cuts.items() if found}
    moved = measured_distortion(model, batches, cuts, task, seed) if cuts else {}
    return {name: (widths[name], [*values.tolist(), 0.0]) for name, values in moved.items()}
