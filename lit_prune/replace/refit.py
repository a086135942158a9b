"""Refit: the weights of the layers that read removed channels are solved again, in forward order, without labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.replace.consumers import Reader
from lit_prune.replace.folding import add_to_output, set_weight
from lit_prune.replace.patches import PositionSample, channel_dim, input_rows, output_rows, taken
from lit_prune.replace.regression import RIDGES, PairSums, solve_held_out
from lit_prune.replace.settings import ROWS_A_WEIGHT, Replacement
from lit_prune.replace.walk import Seen, Stop, Walk, watching
from lit_prune.task import Task
from lit_prune.task.running import undisturbed

PIECE = 32  # images unfolded at once


@dataclass(frozen=True)
class Pair:
    """The original network and the reduced one, the latter changed in place, and the task that runs them."""

    original: nn.Module
    reduced: nn.Module
    task: Task


def refit(
    pair: Pair, stops: Sequence[Stop], readers: dict[str, Reader], batches: Sequence[Any], settings: Replacement
) -> tuple[dict[str, dict], list[str]]:
    """Solves the layers at `stops` again, one after the other: `argmin Σ‖W' u + b' - z*‖² + λ‖W'‖²`.

    u is the layer's input patch in the reduced network, whose earlier layers have been solved already; z* is the
    layer's output in the original network. Where an addition reads the layer (through its BatchNorm), z* is what makes
    the *sum* equal to the original's: the error that the shortcut has gathered is corrected too. Both networks run
    once: the passes wait in front of each layer (`walk`).

    Args:
        pair: the networks, in evaluation mode.
        stops: layers in forward order.
        readers: by name: the output channels that stay.
        batches: what the task of the pair reads.
        settings: ridge, share held out, positions.

    Returns:
        Report by layer, and the layers that gained a bias.
    """
    table = {stop.layer: stop for stop in stops}
    report, gained = {}, []
    with (
        undisturbed(pair.original),
        undisturbed(pair.reduced),
        watching(pair.original, pair.task, table, before=False) as start_original,
        watching(pair.reduced, pair.task, table, before=True) as start_reduced,
    ):
        walks = [(start_original(batch), start_reduced(batch)) for batch in batches]
        images = sum(map(pair.task.size, batches))
        for stop in stops:
            solver = _Solver(pair, stop, readers[stop.layer], settings, images)
            for index, walk in enumerate(walks):
                solver.add(*(_advanced(w, stop) for w in walk), held_out=settings.holds_out(index, len(walks)))
            report[stop.layer], created = solver.finish()
            gained += [stop.layer] if created else []
    return report, gained


def _advanced(walk: Walk, stop: Stop) -> Seen:
    return walk.advance(stop.layer)


class _Solver:
    """Gathers the rows of one layer and writes the solution into it."""

    def __init__(self, pair: Pair, stop: Stop, reader: Reader, settings: Replacement, images: int) -> None:
        self.pair, self.stop, self.reader, self.settings = pair, stop, reader, settings
        self.module = pair.reduced.get_submodule(stop.layer)
        rows = max(settings.rows, ROWS_A_WEIGHT * self.module.weight[0].numel())
        self.positions = PositionSample(-(-rows // images), settings.seed)
        self.sums: dict[bool, PairSums] = {}

    def add(self, original: Seen, reduced: Seen, held_out: bool) -> None:
        """Adds one batch."""
        dim = channel_dim(self.module)
        target = self._target(taken(original.output, self.reader.outputs, dim), reduced.other)
        count = target[0].numel() // target.shape[dim]
        chosen = self.positions.draw(len(target), count)
        for start in range(0, len(target), PIECE):
            part = slice(start, start + PIECE)
            positions = None if chosen is None else chosen[part]
            rows = input_rows(self.module, reduced.inputs[part], positions)
            targets = output_rows(self.module, target[part], positions)
            if not self.sums:
                first = PairSums.zeros(rows, targets)
                self.sums = {False: first, True: first.empty()}
            self.sums[held_out].add(rows, targets)

    def _target(self, output: Tensor, other: Tensor | None) -> Tensor:
        """What the layer's own output is to be, [B, O, H, W]."""
        if other is None:
            return output
        rest = output - other
        if not self.stop.norm:
            return rest
        norm = self.pair.reduced.get_submodule(self.stop.norm)
        scale, offset = _affine(norm)
        live = scale.abs() > 1e-3 * scale.abs().median()
        view = (1, -1, *(1,) * (output.dim() - 2))
        inverse = torch.where(live, 1 / torch.where(live, scale, 1), 0)
        return (rest - offset.view(view)) * inverse.view(view)  # a channel that the norm shuts off is to be 0

    def finish(self) -> tuple[dict, bool]:
        """Solves, writes weights and bias; the layer's report, and whether it gained a bias."""
        prior = self.module.weight.detach().double().flatten(1) if self.settings.towards == "weights" else None
        ridges = RIDGES if self.settings.ridge == "held_out" else (self.settings.ridge,)
        fit, held_out = solve_held_out(self.sums[False], self.sums[True], ridges, prior)
        everything = (self.sums[False] + self.sums[True]).covariance()
        set_weight(self.module, fit.weight)
        bias = fit.bias
        if self.module.bias is not None:
            bias = bias - self.module.bias.detach().double()
        created = add_to_output(self.pair.reduced, self.stop.layer, self.stop.norm, bias)
        return {
            "rows": int(self.sums[False].rows + self.sums[True].rows),
            "ridge": fit.ridge,
            "fit_error": everything.error(fit),
            "held_out_error": held_out,
        }, created


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and offset [C] of a BatchNorm in evaluation mode: y = scale · x + offset."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    offset = -norm.running_mean * scale
    return scale, offset if norm.bias is None else offset + norm.bias.detach()
