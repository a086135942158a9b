"""Every group cut once on a copy: a plan that is offered can be carried out, and computes what it promises.

The positions of a group may be right (`probe`) and the cut still fail or compute something else: a forward that reads a
width from an attribute, reshapes to a number, slices by position, multiplies two halves, standardises weights over
channels, or has a head that runs in training alone. So half of the units of all groups are removed from a copy, which
must run in both modes and give what the dense network gives with those units silenced: every reader of the group sees
zeros in their place, and a LayerNorm takes its statistics over the others. That is held product by product first, on
noise (`agreement`), and where this does not say so on the values of both. If it does not, the groups are halved until
the wrong ones are found.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn

from lit_prune.running import removing
from lit_prune.structure import axes, probe, reasons
from lit_prune.structure.agreement import Agreement, agree
from lit_prune.structure.coupling import Group, common_scope, positions_of
from lit_prune.structure.cutting import cut_layer
from lit_prune.structure.example import Example, pair_of
from lit_prune.structure.hollow import Hollow
from lit_prune.structure.known import built, called_with
from lit_prune.structure.tracing import answered, copy_network, sketch_network

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
    if not groups or not trial.fault(groups):
        return {}
    found = _stuck(model, sample, groups)
    groups = [group for group in groups if group.name not in found]
    while groups and (blamed := trial.faults(groups)):
        found |= blamed
        groups = [group for group in groups if group.name not in blamed]
    return found


def _stuck(model: nn.Module, sample: Example, groups: Sequence[Group]) -> dict[str, str]:
    """Name -> reason for groups without which the module around them does not run on what it is called with.

    Then neither does the network. What is found of one module holds for others that are built and called alike.
    """
    calls: dict[str, tuple[tuple, dict]] = {}

    def note(name: str) -> Callable:
        return lambda module, args, kwargs: (calls.setdefault(name, (args, kwargs)), None)[1]

    with removing([m.register_forward_pre_hook(note(name), with_kwargs=True) for name, m in model.named_modules()]):
        _call(model, sample)
    found: dict[Hashable, str] = {}
    forms: dict[str, Hashable] = {}
    for group in groups:
        scope = next((name for name in _around(group) if name in calls), "")
        if scope:
            inner, call = model.get_submodule(scope), calls[scope]
            own = replace(group, members=tuple(replace(m, module=m.module[len(scope) + 1 :]) for m in group.members))
            forms[group.name] = form = (built(inner), called_with(call), own.size, own.members)
            if form not in found:
                found[form] = _Trial(inner, Example(*call), probe.Sites()).failure([own])
    return {name: found[form] for name, form in forms.items() if found[form]}


def _around(group: Group) -> Iterator[str]:
    """The modules that hold all members of a group, the innermost first, without the network itself."""
    scope = common_scope([member.module.rpartition(".")[0] for member in group.members])
    while scope:
        yield scope
        scope = scope.rpartition(".")[0]


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
    """A copy without half of the units of groups, and the positions of both halves.

    Attributes:
        model: the copy; None if the units cannot be cut.
        agreement: what to hold the network against; None if the copy does not run on noise.
    """

    groups: Sequence[Group]
    lost: _Lost
    rest: _Lost
    model: nn.Module | None
    sample: Example
    agreement: Agreement | None = None

    @cached_property
    def output(self) -> list[Tensor] | None:
        """What the copy answers, None if it does not run."""
        try:
            return None if self.model is None else _call(self.model, self.sample)
        except _ERRORS:
            return None


class _Trial:
    """The dense network's answers, against which cut copies are held."""

    def __init__(self, model: nn.Module, sample: Example, sites: probe.Sites) -> None:
        self._model, self._sites = model, sites
        self._sample = _noisy(sample)
        self._pair = pair_of(self._sample)
        self._last = _Cut((), {}, {}, None, sample)
        self._checks = (self.failure, self._equals, self._trains)

    def fault(self, groups: Sequence[Group]) -> str:
        """Why the halves of groups cannot go together, or ""."""
        return next(filter(None, (check(groups) for check in self._checks)), "")

    def faults(self, groups: Sequence[Group]) -> dict[str, str]:
        """Name -> reason for groups whose halves cannot go, found by the first check that says so."""
        return next(filter(None, (_blame(groups, check) for check in self._checks)), {})

    def _without(self, groups: Sequence[Group]) -> _Cut:
        """The copy of these groups."""
        if self._last.groups is not groups:
            lost, rest = _halves(groups)
            self._last = cut = _Cut(groups, lost, rest, None, self._sample)
            small = sketch_network(self._model)
            try:
                for (name, axis), positions in lost.items():
                    cut_layer(small, name, axis, positions)
            except _ERRORS:
                return cut
            cut.model, agreement = small, Agreement(self._model, lost)
            with suppress(Exception):  # whatever a network raises that meets strange values
                agreement.note(small, self._sample, _call)
                cut.agreement = agreement
        return self._last

    def failure(self, groups: Sequence[Group]) -> str:
        """Why the copy does not run, or ""."""
        cut = self._without(groups)
        return FAILS if cut.agreement is None and cut.output is None else ""

    def _equals(self, groups: Sequence[Group]) -> str:
        """Boxes chosen by their scores may be others after rounding alone: what differs is computed in double too."""
        reason = self.difference(groups)
        return self._precise.difference(groups) if reason == DIFFERS and self._precise is not None else reason

    def difference(self, groups: Sequence[Group]) -> str:
        """Why the copy is not the network with these halves silenced, in the precision that the network has."""
        cut = self._without(groups)
        marked = partial(probe.marked, self._model, self._sample, cut.lost, self._sites)
        arrive = partial(probe.arrive, self._model, self._sample, cut.rest, self._sites, _call)
        if cut.agreement is not None:
            answered = None
            with suppress(Exception):  # a disagreement, or whatever a network raises that meets strange values
                answered = marked(partial(cut.agreement.check, call=_call))
            if answered is not None:
                return "" if arrive() else reasons.MISLED
        expected = marked(_call)
        if expected is None or not arrive():
            return reasons.MISLED
        return "" if cut.output is not None and agree(cut.output, expected) else DIFFERS

    def _trains(self, groups: Sequence[Group]) -> str:
        cut = self._without(groups)
        if not self._runs_in_training(cut.model):
            return TRAINING if self._dense_trains else ""
        return "" if not self._sites.asides or self._arrive_in_training(cut) else reasons.MISLED

    def _arrive_in_training(self, cut: _Cut) -> bool:
        """Whether the marks of both halves arrive as claimed in layers that run in training alone too."""
        twins = (sketch_network(self._model).train() for _ in range(2))  # statistics change, to NaN
        pairs = zip(twins, (cut.lost, cut.rest), strict=True)
        return all(probe.arrive(t, self._pair, places, probe.find_sites(t), _call) for t, places in pairs)

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
        return _Trial(model, sample, self._sites.of(model))

    @cached_property
    def _dense_trains(self) -> bool:
        return self._runs_in_training(self._model)

    def _runs_in_training(self, model: nn.Module | None) -> bool:
        """Whether samples go through a copy in training mode: one, or, as a norm of one place asks for, two."""
        attempts = ((self._sample, True), (self._pair, True), (self._pair, False))
        return model is not None and any(_trains(model, *attempt) for attempt in attempts)


def _trains(model: nn.Module, sample: Example, hollow: bool) -> bool:
    """Whether a copy runs in training mode (statistics and kept activations change there)."""
    try:
        with Hollow(sample.tensors, skips=hollow):
            _call(sketch_network(model).train(), sample)
    except Exception:  # whatever a network raises, strange values or not
        return False
    return True


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
        return answered(model(*sample.args, **sample.kwargs))
