"""Every group cut once on a copy: a plan that is offered can be carried out, and computes what it promises.

The positions of a group may be right (`probe`) and the cut still fail or compute something else: a forward that reads a
width from an attribute, reshapes to a number, slices by position, multiplies two halves, standardises weights over
channels, or has a head that runs in training alone. So half of the units of all groups are removed from a copy, which
must run in both modes and give what the dense network gives with those units silenced: every reader of the group sees
zeros in their place, and a LayerNorm takes its statistics over the others. If it does not, the groups are halved until
the wrong ones are found.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_prune.structure import axes, probe
from lit_prune.structure.coupling import Group, lost_positions
from lit_prune.structure.cutting import cut_layer
from lit_prune.structure.example import Example
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
    groups = [group for group in groups if group.size > 1]
    found: dict[str, str] = {}
    while groups and (reason := trial.fault(groups)):
        blamed = _blame(groups, trial.fault) or dict.fromkeys((group.name for group in groups), reason)
        found |= blamed
        groups = [group for group in groups if group.name not in blamed]
    return found


def _blame(groups: Sequence[Group], fault: Callable[[Sequence[Group]], str]) -> dict[str, str]:
    """The groups that are at fault alone; none where only several together are."""
    reason = fault(groups)
    if not reason:
        return {}
    if len(groups) == 1:
        return {groups[0].name: reason}
    half = len(groups) // 2
    return _blame(groups[:half], fault) | _blame(groups[half:], fault)


class _Trial:
    """The dense network's answers, against which cut copies are held."""

    def __init__(self, model: nn.Module, sample: Example, sites: probe.Sites) -> None:
        self._model, self._sites = model, sites
        self._sample = _noisy(sample)
        self._pair = self._sample.map(lambda tensor: torch.cat([tensor, tensor.flip(0)]))

    def fault(self, groups: Sequence[Group]) -> str:
        """Why half of the units of these groups cannot go; "" where they can.

        Boxes that are chosen by their scores may be others after rounding alone, so what differs is computed again in
        double precision.
        """
        reason = self.fault_here(groups)
        return self._precise.fault_here(groups) if reason == DIFFERS and self._precise is not None else reason

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

    def fault_here(self, groups: Sequence[Group]) -> str:
        """The same in the precision that the network has."""
        generator = np.random.default_rng(len(groups))
        removed = {g.name: sorted(generator.permutation(g.size)[: g.size // 2].tolist()) for g in groups}
        lost = lost_positions({group.name: group for group in groups}, removed)
        small = sketch_network(self._model)
        try:
            for (name, axis), positions in lost.items():
                cut_layer(small, name, axis, positions)
            output = _call(small, self._sample)
        except _ERRORS:
            return FAILS
        with _silenced(self._model, lost, self._sites):
            expected = _call(self._model, self._sample)
        if not _equal(output, expected):
            return DIFFERS
        return "" if self._runs_in_training(small) or not self._dense_trains else TRAINING

    @cached_property
    def _dense_trains(self) -> bool:
        return self._runs_in_training(self._model)

    def _runs_in_training(self, model: nn.Module) -> bool:
        """Whether two samples go through a copy in training mode (statistics and kept activations change there)."""
        trained = sketch_network(model).train()
        try:
            _call(trained, self._pair)
        except _ERRORS:
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


@contextmanager
def _silenced(model: nn.Module, lost: Mapping[axes.AxisKey, Sequence[int]], sites: probe.Sites) -> Iterator[None]:
    """Inside, zeros at the input positions that the readers lose, and norms over the channels that they keep."""

    def zeros(positions: Sequence[int]):
        def hook(module: nn.Module, args: tuple) -> tuple:
            keep = torch.ones(args[0].shape[axes.channel_dim(module, args[0])], dtype=torch.bool)
            keep[list(positions)] = False
            shape = [1] * args[0].dim()
            shape[axes.channel_dim(module, args[0])] = -1
            mask = ~keep.view(shape).to(args[0].device)
            return probe.with_inputs(module, args, lambda values: values.masked_fill(mask, 0.0))

        return hook

    def over_the_rest(name: str, positions: list[int]):
        small = nn.Module()
        small.norm = sketch_network(sites.norms[name])
        cut_layer(small, "norm", "out", positions)

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            dim = axes.channel_dim(module, args[0])
            kept = [place for place in range(args[0].shape[dim]) if place not in set(positions)]
            index = torch.tensor(kept, device=output.device)
            return torch.zeros_like(output).index_copy(dim, index, small.norm(args[0].index_select(dim, index)))

        return hook

    norms = {name: list(positions) for (name, _), positions in lost.items() if name in sites.norms}
    readers = {
        name: positions for (name, axis), positions in lost.items() if axis in ("in", "dim:1") and name in sites.readers
    }
    handles = [sites.readers[name].register_forward_pre_hook(zeros(positions)) for name, positions in readers.items()]
    handles += [
        sites.norms[name].register_forward_hook(over_the_rest(name, list(positions)), prepend=True)
        for name, positions in norms.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
