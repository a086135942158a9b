"""The layers of a segment solved together: gradient steps towards what the segment of the original network gives."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_prune.measurement.layers import removing
from lit_prune.replace.regression import alive
from lit_prune.structure import axes

STEP = 0.025  # of a weight, in what would change its layer's output by that share of its spread
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the way that may be gone; what serves held-out samples best
BATCH = 64
LEAST_BATCH = 8
VALUES = 1 << 20  # of a segment's input in one step, where that leaves LEAST_BATCH samples
TINY = torch.finfo(torch.float32).tiny
CHECKED = 32  # samples that held-out errors are computed of at once


@dataclass
class Samples:
    """What a segment reads in the reduced network and what it is to give: tensors [B, ...], batch by batch."""

    inputs: list[Tensor] = field(default_factory=list)
    wanted: list[Tensor] = field(default_factory=list)

    def add(self, inputs: Tensor, wanted: Tensor) -> None:
        """Adds a batch."""
        self.inputs.append(inputs)
        self.wanted.append(wanted)

    def __len__(self) -> int:
        return sum(map(len, self.inputs))

    def take(self, ahead: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
        """The first so many of the places (batch, place in it) `ahead` that are of one size, and leaves the others."""
        size = self.inputs[ahead[0][0]].shape[1:]
        taken = [place for place in ahead if self.inputs[place[0]].shape[1:] == size][:count]
        ahead[:] = ahead[count:] if taken == ahead[:count] else [place for place in ahead if place not in set(taken)]
        return taken

    def draw(self, places: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Samples of one size at (batch, place in it), copied."""
        both = ([values[batch][place] for batch, place in places] for values in (self.inputs, self.wanted))
        inputs, wanted = (torch.stack(values) for values in both)
        return inputs, wanted

    def spread(self) -> float:
        """Summed variance of the wanted values, every position of samples of one size an output of its own channel."""
        of_size: dict[torch.Size, list[Tensor]] = {}
        for values in self.wanted:
            of_size.setdefault(values.shape[1:], []).append(values.double())
        total = 0.0
        for alike in of_size.values():
            mean = sum(values.sum(0) for values in alike) / sum(map(len, alike))
            total += sum(float((values - mean).square().sum()) for values in alike)
        return max(TINY, total)


def solve_together(module: nn.Module, fitted: Samples, held_out: Samples, passes: int, seed: int) -> dict[str, float]:
    """`argmin Σ‖f(u) - z*‖²` over all parameters of a segment f by Adam, from where they are; changed in place.

    u is what the segment reads in the reduced network, z* what it gives in the original one. A weight moves in steps
    relative to the spread of what its layer gives over the size of what it multiplies, so that rescaling a unit and
    undoing it behind changes nothing. Of the way that was found the share is gone that serves held-out samples best.

    Args:
        module: in evaluation mode; norms keep their statistics.
        fitted: samples to solve for.
        held_out: samples that judge; without any the result is taken as it is.
        passes: over the samples; the step falls to 0 over them (cosine).
        seed: of the order.

    Returns:
        `before` and `after`: error over the variance of z*, of the held-out samples (of the fitted ones without any),
        `share` of the way, and `steps`.
    """
    judge = held_out if len(held_out) else fitted
    start = {name: p.detach().clone() for name, p in module.named_parameters() if p.is_floating_point()}
    way, steps = _descended(module, start, fitted, passes, seed)
    spread = judge.spread()
    errors = {share: _error(module, _moved(start, way, share), judge) / spread for share in SHARES}
    share = min((share for share in SHARES if math.isfinite(errors[share])), key=errors.__getitem__, default=0.0)
    with torch.no_grad():
        for name, value in _moved(start, way, share).items():
            module.get_parameter(name).copy_(value)
    return {"before": errors[0.0], "after": errors[share], "share": share, "steps": steps}


def _descended(
    module: nn.Module, start: Mapping[str, Tensor], samples: Samples, passes: int, seed: int
) -> tuple[dict[str, Tensor], int]:
    """How far Adam takes each parameter, and in how many steps."""
    batch = max(LEAST_BATCH, min(BATCH, VALUES // max(1, samples.inputs[0][0].numel())))
    places = [(index, place) for index, values in enumerate(samples.inputs) for place in range(len(values))]
    steps = math.ceil(passes * len(places) / batch)
    generator, scale = torch.Generator().manual_seed(seed), len(samples) / samples.spread()
    first = samples.draw(samples.take(places[:], batch))[0]
    rates = step_units(module, lambda: module(first.clone()))
    moves = {name: torch.zeros_like(value, requires_grad=True) for name, value in start.items()}
    optimizer = torch.optim.Adam(moves.values(), STEP, eps=1e-12)
    ahead: list[tuple[int, int]] = []
    with torch.enable_grad():
        for step in range(steps):
            if len(ahead) < batch:
                ahead += [places[index] for index in torch.randperm(len(places), generator=generator).tolist()]
            inputs, wanted = samples.draw(samples.take(ahead, batch))
            optimizer.param_groups[0]["lr"] = STEP * (1 + math.cos(math.pi * step / steps)) / 2
            moved = {name: start[name] + rates[name] * move for name, move in moves.items()}
            loss = scale * (functional_call(module, moved, (inputs,)) - wanted).square().sum() / len(inputs)
            gradients = torch.autograd.grad(loss, list(moves.values()), materialize_grads=True)
            for move, gradient in zip(moves.values(), gradients, strict=True):
                move.grad = gradient
            optimizer.step()
    return {name: rates[name] * move.detach() for name, move in moves.items()}, steps


def _moved(start: Mapping[str, Tensor], way: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Parameters after a share of the way; after none of it those of the start, however the way has ended."""
    return {name: value + share * way[name] if share else value for name, value in start.items()}


def _error(module: nn.Module, parameters: Mapping[str, Tensor], samples: Samples) -> float:
    """Summed squared error of what the segment gives."""
    total = 0.0
    with torch.no_grad():
        for inputs, wanted in zip(samples.inputs, samples.wanted, strict=True):
            for u, z in zip(inputs.split(CHECKED), wanted.split(CHECKED), strict=True):
                total += float((functional_call(module, dict(parameters), (u.clone(),)) - z).double().square().sum())
    return total


def step_units(module: nn.Module, run: Callable[[], Any]) -> dict[str, Tensor]:
    """Unit of a step for each floating-point parameter, of its shape or one that spreads to it.

    A weight's is what changes its layer's output by about its spread: the spread of the output over the size of what
    the weight multiplies (its mean included, by which a step moves the output as much). So rescaling a unit and undoing
    it behind changes nothing. Of what multiplies nothing that is known (a class token, a slope) it is the parameter's
    own size.

    Args:
        module: any network or part of one.
        run: runs it on some samples.
    """
    spreads: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, part: nn.Module, args: tuple, output: Tensor) -> None:
        scales = axes.is_cuttable(part) and not isinstance(part, nn.PReLU)  # a slope is its own measure
        if scales and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            given, left = args[0].detach(), output.detach()
            powers = _powers(given, axes.channel_dim(part, given))
            spreads[name] = (powers, _variances(left, axes.channel_dim(part, left)))

    holders = {name: m for name, m in module.named_modules() if next(m.parameters(recurse=False), None) is not None}
    with removing([part.register_forward_hook(partial(note, name)) for name, part in holders.items()]), torch.no_grad():
        run()
    found = {}
    for name, part in holders.items():
        for key, parameter in part.named_parameters(recurse=False):
            if not parameter.is_floating_point():
                continue
            full = f"{name}.{key}" if name else key
            unit = _rate(part, key, parameter.detach(), *spreads.get(name, (None, None)))
            found[full] = unit.nan_to_num(0.0, 0.0, 0.0)  # of a layer that got no samples: it stays
    return found


def _rate(part: nn.Module, key: str, parameter: Tensor, given: Tensor | None, output: Tensor | None) -> Tensor:
    """The spread of the output over the size of what the parameter multiplies; else the parameter's own size."""
    if output is not None and given is not None:
        spread = output.sqrt()  # next to 0 of a channel that is shut off, which a norm behind it makes large again
        if key == "weight" and axes.is_weighted(part):
            groups, transposed = getattr(part, "groups", 1), getattr(part, "transposed", False)
            kernel = parameter.reshape(groups, len(parameter) // groups, parameter.shape[1], -1)
            kernel = kernel.transpose(1, 2) if transposed else kernel  # [groups, out, in, taps]
            inputs = alive(given, kernel.square().sum((1, 3)).flatten()).sqrt()
            ratio = spread.view(groups, -1, 1) / inputs.view(groups, 1, -1)
            fan_in = kernel.shape[2] * kernel.shape[3]
            ratio = (ratio.transpose(1, 2) if transposed else ratio).flatten(0, 1)
            return ratio.view(*ratio.shape, *[1] * (parameter.ndim - 2)).to(parameter) / math.sqrt(fan_in)
        if parameter.shape == output.shape:
            return spread.to(parameter)
    return parameter.square().mean().sqrt().clamp_min(TINY)


def _powers(values: Tensor, dim: int) -> Tensor:
    """Mean square of each channel, float64."""
    return values.movedim(dim, 0).flatten(1).double().square().mean(1)


def _variances(values: Tensor, dim: int) -> Tensor:
    """Of each channel, float64."""
    return values.movedim(dim, 0).flatten(1).double().var(1, correction=0)
