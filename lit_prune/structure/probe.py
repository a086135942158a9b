"""A check of coupled channels that trusts no bookkeeping: mark channels with NaN and see where the marks arrive.

NaN passes every operation that works channel by channel (norm in evaluation mode, activation, pooling, addition,
multiplication, concatenation, reshape) and nothing else keeps it in place. So the units under test are set to NaN
where they are produced, every reader (convolution, linear layer) notes which of its input channels are NaN and
cleans them, and a group is right exactly if the marks are at the positions that the group claims and nowhere else.
A shifted padding, a channel shuffle, a norm over channels, attention or an unknown operation all fail the check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_prune.structure import axes
from lit_prune.structure.example import Example

if TYPE_CHECKING:  # which imports this
    from lit_prune.structure.coupling import Group

_Marks = dict[tuple[str, str], np.ndarray]  # (module, axis) -> bool [width], True where NaN is put or expected


@dataclass
class Sites:
    """Modules where marks are put or looked for, by qualified name.

    Attributes:
        writers: modules whose output channels can be marked (convolution, linear layer, padded shortcut).
        readers: modules that end a group: the marks on their input are noted and cleaned.
        passers: channel-wise layers (norm, depthwise convolution, PReLU): the marks on their input are noted.
        norms: those of them whose statistics mix channels (LayerNorm): the marks are put behind them again.
        widths: (module, axis) -> number of channels.
    """

    writers: dict[str, nn.Module] = field(default_factory=dict)
    readers: dict[str, nn.Module] = field(default_factory=dict)
    passers: dict[str, nn.Module] = field(default_factory=dict)
    norms: dict[str, nn.Module] = field(default_factory=dict)
    widths: dict[tuple[str, str], int] = field(default_factory=dict)


def find_sites(model: nn.Module) -> Sites:
    """Where the probe marks and looks: every layer where channels end, begin or pass one by one."""
    sites = Sites()
    for name, module in model.named_modules():
        if axes.is_boundary(module):
            sites.writers[name] = sites.readers[name] = module
            sites.widths |= {(name, axis): axes.width(module, axis) for axis in ("out", "in")}
        elif axes.is_channelwise(module):
            sites.passers[name] = module
            sites.widths[name, "out"] = axes.width(module, "out")
        elif axes.is_layer_norm(module):
            sites.passers[name] = sites.norms[name] = module
            sites.widths[name, "out"] = axes.width(module, "out")
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            sites.readers[f"{name}.in_proj_weight"] = sites.writers[f"{name}.out_proj"] = module
            sites.widths[f"{name}.in_proj_weight", "dim:1"] = module.embed_dim
    sites.widths |= {
        (name, "out"): tensor.numel() for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    return sites


def find_misled(model: nn.Module, sample: Example, groups: Sequence[Group], sites: Sites) -> set[str]:
    """Names of the groups whose claimed positions the network contradicts.

    All groups are marked at once with random halves of their units, then with the complements; only if some mark is
    out of place are halves of the groups tested until the right ones are blamed.

    Args:
        model: network in evaluation mode.
        sample: one sample.
        groups: groups with disjoint positions.
        sites: where to mark and look.
    """
    return _blame(model, sample, groups, sites)


def _blame(model: nn.Module, sample: Example, groups: Sequence[Group], sites: Sites) -> set[str]:
    """The groups that fail, found by halves: a few wrong ones among many cost a few passes."""
    pair = _halves(groups, np.random.default_rng(len(groups)))
    if all(_holds(model, sample, groups, code, sites) for code in pair):
        return set()
    if len(groups) == 1:
        return {groups[0].name}
    half = len(groups) // 2
    found = _blame(model, sample, groups[:half], sites) | _blame(model, sample, groups[half:], sites)
    return found or {group.name for group in groups}


def _entrance(sites: Sites, name: str, axis: str) -> bool:
    """Whether the marks of this axis arrive at the input of the module."""
    return (axis in ("in", "dim:1") and name in sites.readers) or name in sites.passers


def _halves(groups: Iterable[Group], generator: np.random.Generator) -> tuple[dict[str, np.ndarray], ...]:
    """A random half of the units of each group and its complement, as bool arrays [size]."""
    half = {}
    for group in groups:
        half[group.name] = generator.permutation(group.size) < (group.size + 1) // 2
    return half, {name: ~chosen for name, chosen in half.items()}


def _marks(groups: Iterable[Group], chosen: dict[str, np.ndarray], sites: Sites) -> _Marks:
    """Bool array [width] for each axis that a member claims: True at the positions of the chosen units."""
    marks: _Marks = {}
    for group in groups:
        units = np.flatnonzero(chosen[group.name])
        for member in group.members:
            key = (member.module, member.axis)
            if key in sites.widths:
                row = marks.setdefault(key, np.zeros(sites.widths[key], dtype=bool))
                row[np.asarray(member.positions)[units].ravel()] = True
    return marks


def _holds(model: nn.Module, sample: Example, groups: Sequence[Group], chosen: dict, sites: Sites) -> bool:
    """Whether marks put on the chosen units arrive exactly where the groups say."""
    marks = _marks(groups, chosen, sites)
    with _watching(sites, marks) as seen:
        output = model(*sample.args, **sample.kwargs)
    if any(isinstance(leaf, Tensor) and bool(leaf.isnan().any()) for leaf in tree_leaves(output)):
        return False
    expected = {name: row for (name, axis), row in marks.items() if _entrance(sites, name, axis)}
    if not all(name in seen for name in expected):
        return False
    calls = ((row, expected.get(name, np.zeros_like(row))) for name, rows in seen.items() for row in rows)
    return all(np.array_equal(row, claim) for row, claim in calls)


def inputs(module: nn.Module) -> int:
    """Number of arguments that a reader reads: queries, keys and values of an attention, else one."""
    return 3 if isinstance(module, nn.MultiheadAttention) else 1


def with_inputs(module: nn.Module, args: tuple, change: Callable[[Tensor], Tensor]) -> tuple:
    """The arguments of a reader, each of what it reads changed; one tensor that comes several times stays one."""
    changed: dict[int, Tensor] = {}
    for values in args[: inputs(module)]:
        if id(values) not in changed:
            changed[id(values)] = change(values)
    return tuple(changed[id(v)] for v in args[: inputs(module)]) + args[inputs(module) :]


@contextmanager
def _watching(sites: Sites, marks: _Marks) -> Iterator[dict[str, list[np.ndarray]]]:
    """Hooks that mark (before any of the network's own), note and clean.

    Yields name -> marks found on each call, bool [channels].
    """
    seen: dict[str, list[np.ndarray]] = {}
    held: dict[str, Tensor] = {}

    def note(name: str, cleans: bool):
        def hook(module: nn.Module, args: tuple) -> tuple | None:
            for values in args[: inputs(module)]:
                bad = values.isnan()
                dim = axes.channel_dim(module, values)
                rows = bad.movedim(dim, -1).reshape(-1, bad.shape[dim]).any(0)  # [C]
                seen.setdefault(name, []).append(rows.cpu().numpy())
                held.update({name: bad} if name in sites.norms else {})
            return with_inputs(module, args, lambda v: v.masked_fill(v.isnan(), 0.0)) if cleans else None

        return hook

    def mark(row: np.ndarray):
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            first, *others = output if isinstance(output, tuple) else (output,)  # an attention gives its weights too
            shape = [1] * first.dim()
            shape[axes.channel_dim(module, first)] = -1
            marked = first.masked_fill(torch.from_numpy(row).to(first.device).view(shape), torch.nan)
            return (marked, *others) if isinstance(output, tuple) else marked

        return hook

    def again(name: str):
        return lambda module, args, output: output.masked_fill(held.pop(name), torch.nan)

    handles = [module.register_forward_pre_hook(note(name, True)) for name, module in sites.readers.items()]
    handles += [
        module.register_forward_pre_hook(note(name, name in sites.norms)) for name, module in sites.passers.items()
    ]
    handles += [module.register_forward_hook(again(name), prepend=True) for name, module in sites.norms.items()]
    handles += [
        module.register_forward_hook(mark(marks[name, "out"]), prepend=True)
        for name, module in sites.writers.items()
        if (name, "out") in marks
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
