"""Every group cut once on a copy: a plan that is offered can be carried out, and computes what it promises.

The positions of a group may be right (`probe`) and the cut still fail or compute something else: a forward that reads a
width from an attribute, reshapes to a number, slices by position, multiplies two halves, standardises weights over
channels, or has a head that runs in training alone. So half of the units of all groups are removed from a copy, which
must run in both modes and give what the dense network gives with those units silenced: every reader of the group sees
zeros in their place, and a LayerNorm takes its statistics over the others. If it does not, the groups are halved until
the wrong ones are found.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_prune.structure import axes, probe, reasons
from lit_prune.structure.coupling import Group, positions_of
from lit_prune.structure.cutting import cut_layer
from lit_prune.structure.example import Example
from lit_prune.structure.hollow import Hollow, for_shapes
from lit_prune.structure.tracing import copy_network, sketch_network

TOLERANCE = 1e-3  # of the largest output; rounding of float32 stays a hundred times below
FAILS = "the network does not run without some of its channels"
DIFFERS = "without some of its channels the network computes something else than with them silenced"
TRAINING = "the network does not run without some of its channels in training mode"
_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError, ZeroDivisionError)


def find_impossible(model: nn.Module, sample: Example, groups: Sequence[Group], sites: probe.Sites) -> dict[str, str]:
    """Name -> reason for the groups that cannot be cut, or that change what is computed when they are.

    Args:
        model: network in evaluation mode, without hooks; left as found.
        sample: one sample.
        groups: groups that are not protected so far, with disjoint positions.
        sites: of the network.
    """
    trial = _Trial(model, sample, sites)
    found: dict[str, str] = {}
    while groups and (blamed := trial.faults(groups)):
        found |= blamed
        groups = [group for group in groups if group.name not in blamed]
    return found


def _blame(groups: Sequence[Group], fault: Callable[[Sequence[Group]], str]) -> dict[str, str]:
    """The groups that are at fault alone, or the fewest halves that are at fault together."""
    reason = fault(groups)
    if not reason or len(groups) == 1:
        return {group.name: reason for group in groups if reason}
    half = len(groups) // 2
    found = _blame(groups[:half], fault) | _blame(groups[half:], fault)
    return found or {group.name: reason for group in groups}


_Lost = dict[axes.AxisKey, list[int]]


def _halves(groups: Sequence[Group]) -> tuple[_Lost, _Lost]:
    """Positions of a random half of the units of each group, and those of all others."""
    generator = np.random.default_rng(len(groups))
    orders = [(group, generator.permutation(group.size).tolist()) for group in groups]
    lost = positions_of((group, order[: group.size // 2]) for group, order in orders)
    return lost, positions_of((group, order[group.size // 2 :]) for group, order in orders)


@dataclass
class _Cut:
    """A copy without half of the units of groups, its answers if it runs, and the positions of both halves."""

    groups: Sequence[Group]
    lost: _Lost
    rest: _Lost
    model: nn.Module
    output: list[Tensor] | None


class _Trial:
    """The dense network's answers, against which cut copies are held."""

    def __init__(self, model: nn.Module, sample: Example, sites: probe.Sites) -> None:
        self._model, self._sites = model, sites
        self._sample = _noisy(sample)
        self._pair = self._sample.map(lambda tensor: torch.cat([tensor, tensor.flip(0)]))
        self._last = _Cut((), {}, {}, model, None)

    def faults(self, groups: Sequence[Group]) -> dict[str, str]:
        """Name -> reason for groups whose halves cannot go, found by the first check that says so."""
        checks = (self._runs, self._equals, self._trains)
        return next(filter(None, (_blame(groups, check) for check in checks)), {})

    def _without(self, groups: Sequence[Group]) -> _Cut:
        """The copy of these groups."""
        if self._last.groups is not groups:
            lost, rest = _halves(groups)
            small = sketch_network(self._model)
            try:
                for (name, axis), positions in lost.items():
                    cut_layer(small, name, axis, positions)
                output = _call(small, self._sample)
            except _ERRORS:
                output = None
            self._last = _Cut(groups, lost, rest, small, output)
        return self._last

    def _runs(self, groups: Sequence[Group]) -> str:
        return FAILS if self._without(groups).output is None else ""

    def _equals(self, groups: Sequence[Group]) -> str:
        """Boxes chosen by their scores may be others after rounding alone: what differs is computed in double too."""
        reason = self.difference(groups)
        return self._precise.difference(groups) if reason == DIFFERS and self._precise is not None else reason

    def difference(self, groups: Sequence[Group]) -> str:
        """Why the copy is not the network with these halves silenced, in the precision that the network has."""
        cut = self._without(groups)
        expected = probe.marked(self._model, self._sample, cut.lost, self._sites, _call)
        if expected is None or not probe.arrive(self._model, self._sample, cut.rest, self._sites, _call):
            return reasons.MISLED
        return "" if cut.output is not None and _equal(cut.output, expected) else DIFFERS

    def _trains(self, groups: Sequence[Group]) -> str:
        return "" if self._runs_in_training(self._without(groups).model) or not self._dense_trains else TRAINING

    @cached_property
    def _precise(self) -> "_Trial | None":
        """The same in double precision; None where this is it, or the network does not run in it."""
        if any(parameter.dtype == torch.float64 for parameter in self._model.parameters()):
            return None
        model = copy_network(self._model).double()
        sample = self._sample.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        try:
            _call(model, sample)
        except _ERRORS:
            return None
        return _Trial(model, sample, probe.find_sites(model))

    @cached_property
    def _dense_trains(self) -> bool:
        return self._runs_in_training(self._model)

    def _runs_in_training(self, model: nn.Module) -> bool:
        """Whether two samples go through a copy in training mode (statistics and kept activations change there)."""

        def passes(hollow: bool) -> bool:
            with Hollow(self._pair.tensors, skips=hollow):
                _call(sketch_network(model).train(), self._pair)
            return True

        try:
            return for_shapes(passes)
        except _ERRORS:
            return False


def _noisy(sample: Example) -> Example:
    """The sample with seeded noise on it, so that blank or constant images tell something too."""
    generator = torch.Generator().manual_seed(0)

    def with_noise(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        return tensor + noise * tensor.abs().max().clamp(min=1.0)

    return sample.map(with_noise)


def _call(model: nn.Module, sample: Example) -> list[Tensor]:
    """The tensors that a network answers, without gradients; the random state is put back."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        output = model(*sample.args, **sample.kwargs)
    return [leaf for leaf in tree_leaves(_values(output)) if isinstance(leaf, Tensor)]


def _values(output: object) -> object:
    """The output, or what its attributes hold where it is an object of the network's own."""
    return list(vars(output).values()) if hasattr(output, "__dict__") and not isinstance(output, Tensor) else output


def _equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether two lists of outputs agree up to rounding."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return False
    return all(
        bool((left.double() - right.double()).abs().max() <= TOLERANCE * right.double().abs().max() + 1e-12)
        for left, right in zip(found, expected, strict=True)
        if right.numel() and right.isfinite().all()
    )
