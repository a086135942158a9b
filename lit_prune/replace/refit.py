"""Refit: the weights of the layers that read removed channels are solved again, in forward order, without labels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.progress import watched
from lit_prune.replace.flow import Reader
from lit_prune.replace.kernels import add_to_output, kernel_of, set_kernel
from lit_prune.replace.methods import ROWS_A_WEIGHT, Replacement
from lit_prune.replace.patches import PositionSample, channel_dim, input_rows, output_rows, pieces, taken
from lit_prune.replace.regression import RIDGES, STRONG_RIDGES, Fit, Gathered, PairSums, solve_held_out
from lit_prune.replace.rows import Rows
from lit_prune.replace.segments import Segment
from lit_prune.replace.side_by_side import Pair, passed, walked
from lit_prune.replace.together import Samples, solve_together
from lit_prune.replace.walk import AtStop, Stop
from lit_prune.running import undisturbed

PIECE = 32  # images unfolded at once
KEPT = 1 << 26  # most values of patches that are kept for the rounds; others are cut out anew
CLIP_ROUNDS = 4


def refit(
    pair: Pair, stops: Sequence[Stop], readers: dict[str, Reader], batches: Sequence[Any], settings: Replacement
) -> tuple[dict[str, dict], list[str]]:
    """Solves the layers at `stops` again, one after the other: `argmin Σ‖W' u + b' - z*‖² + λ‖W'‖²`.

    u is the layer's input patch in the reduced network, whose earlier layers have been solved already; z* is the
    layer's output in the original network. Where an addition reads the layer (through its BatchNorm), z* is what makes
    the *sum* equal to the original's: the error that the shortcut has gathered is corrected too. Where a ReLU or ReLU6
    reads the result, only what it lets through is fitted. Both networks run once: the passes wait in front of each
    layer (`walk`).

    Args:
        pair: the networks, in evaluation mode.
        stops: layers in forward order.
        readers: by name: the output channels that stay.
        batches: what the task of the pair reads.
        settings: ridge, share held out, positions.

    Returns:
        Report by layer, and the layers that gained a bias.
    """
    once = next((place for place, stop in enumerate(stops) if readers[stop.layer].calls > 1), len(stops))
    parts = list(pieces(batches, pair.task))  # each has its own thread and pool of memory: small ones waste less
    report, gained = {}, []
    with undisturbed(pair.original), undisturbed(pair.reduced):
        visits = chain(walked(pair, stops[:once], parts), passed(pair, stops[once:], parts))
        for stop, count, seen in watched(visits, "layers solved again", len(stops)):
            solver = _Solver(pair, stop, readers[stop.layer], settings, sum(map(pair.task.size, parts[:count])))
            for index, calls in enumerate(seen):
                for original, reduced in calls:
                    solver.add(original, reduced, held_out=settings.holds_out(index, count))
            report[stop.layer], created = solver.finish()
            gained += [stop.layer] if created else []
    return report, gained


def refit_segments(
    pair: Pair, segments: Sequence[Segment], batches: Sequence[Any], settings: Replacement
) -> dict[str, dict]:
    """A second pass in which the layers of each segment are solved together, see `solve_together`.

    Args:
        pair: the networks, in evaluation mode.
        segments: in forward order.
        batches: as in `refit`.
        settings: passes, share held out, seed.

    Returns:
        By layer: name and errors of its segment.
    """
    parts = list(pieces(batches, pair.task))
    named = {segment.name: segment for segment in segments}
    stops = [Stop(name) for name in named]
    report: dict[str, dict] = {}
    with undisturbed(pair.original), undisturbed(pair.reduced):
        for stop, count, seen in watched(walked(pair, stops, parts), "blocks solved together", len(stops)):
            segment, samples = named[stop.layer], {False: Samples(), True: Samples()}
            for index, calls in enumerate(seen):
                for original, reduced in calls:
                    assert original.output is not None, "the original's segment has run"
                    held_out = settings.holds_out(index, count)
                    samples[held_out].add(reduced.inputs, segment.left(original.output))
            module = pair.reduced.get_submodule(segment.name)
            found = solve_together(module, samples[False], samples[True], settings.together, settings.seed)
            report |= {layer: {"segment": {"name": segment.name} | found} for layer in segment.layers}
            del samples
    return report


class _Solver:
    """Gathers the rows of one layer and writes the solution into it."""

    def __init__(self, pair: Pair, stop: Stop, reader: Reader, settings: Replacement, images: int) -> None:
        self.pair, self.stop, self.reader, self.settings, self.images = pair, stop, reader, settings, images
        self.module = pair.reduced.get_submodule(stop.layer)
        rows = max(settings.rows, ROWS_A_WEIGHT * kernel_of(self.module)[0].numel())
        self.positions = PositionSample(-(-rows // images), settings.seed)
        self.sums: dict[bool, Gathered] = {}
        self.seen: list[_Piece] = []
        self.kept = 0

    def add(self, original: AtStop, reduced: AtStop, held_out: bool) -> None:
        """Adds one batch."""
        dim = channel_dim(self.module)
        assert original.output is not None, "the original's layer has run"
        output = taken(original.output, self.reader.outputs, dim)
        chosen = self.positions.draw(len(output), output[0].numel() // output.shape[dim])
        for start in range(0, len(output), PIECE):
            part = slice(start, start + PIECE)
            at = None if chosen is None else chosen[part]
            wanted = self._wanted(
                output_rows(self.module, output[part], at),
                None if reduced.other is None else output_rows(self.module, reduced.other[part], at),
            )
            piece = _Piece(reduced.inputs[part], at, wanted)
            rows = input_rows(self.module, piece.inputs, at)
            if not self.sums:
                few = self.images * len(rows) // len(output[part]) < rows.shape[1] // 2
                first: Gathered = Rows() if few else PairSums.zeros(rows, wanted.target)
                self.sums = {False: first, True: first.empty()}
            self.sums[held_out].add(rows, wanted.target)
            if self.stop.clip is not None and self.settings.clipped:
                self.kept += rows.numel()
                self.seen.append(replace(piece, rows=rows) if self.kept <= KEPT else piece)

    def _wanted(self, output: Tensor, other: Tensor | None) -> "_Wanted":
        """What the layer's own output is to be, from the original's output or sum and the sum's other operand, [S, O].

        With s and t the norm's scale and offset, the sum is s·z + t + other. Where the original's sum lies beyond the
        clip that follows, every z that takes the sum beyond it too is as good as the target.
        """
        norm = self.pair.reduced.get_submodule(self.stop.norm) if self.stop.norm else None
        rest: Tensor | float
        scale: Tensor | float
        if norm is None or (other is None and self.stop.clip is None):
            rest, scale, live = 0.0 if other is None else other, 1.0, None
        else:
            values, offset = _affine(norm)
            live = values.abs() > 1e-3 * values.abs().median()  # others are shut off by the norm: to be 0
            scale, rest = torch.where(live, values, 1), offset if other is None else offset + other
        if other is None:  # the original's own output
            target, total = output, output * scale + rest
        else:
            target, total = (output - rest) / scale, output
        if live is not None:
            target = torch.where(live, target, 0)
        if self.stop.clip is None:
            return _Wanted(target, target, target)
        return _Wanted(target, *_range(target, total, self.stop.clip, rest, scale, live))

    def finish(self) -> tuple[dict, bool]:
        """Solves, writes weights and bias; the layer's report, and whether it gained a bias."""
        everything = self.sums[False] + self.sums[True]
        few, towards_zero = everything.rows <= everything.width, self.settings.towards == "zero"
        if few and towards_zero and not (self.reader.removed and self.settings.unsupported == "delete"):
            return self._left(everything), False
        weight = kernel_of(self.module).double().flatten(1)
        prior, power = weight if few or not towards_zero else None, weight.square().sum(0)
        candidates = RIDGES if prior is None else (*RIDGES, *STRONG_RIDGES)
        borne = [ridge for ridge in candidates if ridge >= self.settings.noise**2 * (1 - 1e-9)]
        ridges = borne if self.settings.ridge == "held_out" else [self.settings.ridge]
        fit, held_out = solve_held_out(self.sums[False], self.sums[True], ridges, prior, power)
        if self.stop.clip is not None and self.settings.clipped:
            fit = self._clipped(fit, everything, prior, power)
        set_kernel(self.module, fit.weight)
        bias = fit.bias
        if self.module.bias is not None:
            bias = bias - self.module.bias.detach().double()
        created = add_to_output(self.pair.reduced, self.stop.layer, self.stop.norm, bias)
        return {
            "rows": int(everything.rows),
            "ridge": fit.ridge,
            "fit_error": everything.covariance().error(fit),
            "held_out_error": held_out,
            **({"undetermined": self._needed(everything)} if few else {}),
        }, created

    def _needed(self, sums: Gathered) -> int:
        """Images that have more positions than the layer has weights an output."""
        return -(-self.images * (sums.width + 1) // int(sums.rows))

    def _left(self, sums: Gathered) -> dict:
        """Report of a layer that stays as it is, because there are fewer rows than weights to solve for.

        Raises:
            InputError: it has lost inputs, so that it cannot stay.
        """
        rows, wide = int(sums.rows), sums.width
        if self.reader.removed:
            raise InputError(
                f"layer {self.stop.layer!r} reads {wide} values and is to be solved again from {rows} positions of "
                f"{self.images} images; give at least {self._needed(sums)} calibration images, or set towards='weights'"
            )
        return {"rows": rows, "left": f"{rows} positions do not determine {wide} weights"}

    def _clipped(self, fit: Fit, sums: Gathered, prior: Tensor | None, power: Tensor) -> Fit:
        """The fit to the output behind the clip: `argmin Σ‖W u + b - clamp(W u + b, low, high)‖²` by majorisation.

        The sum never rises. In each round the target of a row is the value within its range that is nearest to the
        present fit.
        """
        for _ in range(CLIP_ROUNDS):
            targets = sums.retargeted()
            for piece in self.seen:
                rows = input_rows(self.module, piece.inputs, piece.chosen) if piece.rows is None else piece.rows
                present = rows @ fit.weight.T.to(rows) + fit.bias.to(rows)
                targets.add(rows, present.clamp(piece.wanted.low, piece.wanted.high))
            fit = targets.covariance(power).solve(fit.ridge, prior)
        return fit


@dataclass(frozen=True)
class _Wanted:
    """What a layer's output is to be at some positions, and the range in which it may lie; each [S, O]."""

    target: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class _Piece:
    """A few images at a layer: what it reads, at which positions, what is wanted there; its patches, where kept."""

    inputs: Tensor
    chosen: Tensor | None
    wanted: _Wanted
    rows: Tensor | None = None


def _range(
    target: Tensor,
    total: Tensor,
    clip: tuple[float, float],
    rest: Tensor | float,
    scale: Tensor | float,
    live: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Bounds of z: the target itself, but open on the far side where the original's sum lies beyond the clip."""
    low, high = target, target
    for limit, beyond, outward in ((clip[0], total < clip[0], -1), (clip[1], total > clip[1], 1)):
        edge = (limit - rest) / scale  # z that takes the sum just to the limit
        beyond = beyond if live is None else beyond & live
        rising = torch.as_tensor(outward * scale > 0, device=target.device)  # larger z lies beyond
        high = torch.where(beyond, torch.where(rising, torch.inf, edge), high)
        low = torch.where(beyond, torch.where(rising, edge, -torch.inf), low)
    return low, high


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and offset [C] of a BatchNorm in evaluation mode: y = scale · x + offset."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    offset = -norm.running_mean * scale
    return scale, offset if norm.bias is None else offset + norm.bias.detach()
