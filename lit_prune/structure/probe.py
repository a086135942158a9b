"""A check of coupled channels that trusts no bookkeeping: mark channels with NaN and see where the marks arrive.

NaN passes every operation that works channel by channel (norm in evaluation mode, activation, pooling, addition,
multiplication, concatenation, reshape) and nothing else keeps it in place. So the units under test are set to NaN
where they are produced, every reader (convolution, linear layer) notes which of its input channels are NaN and
cleans them, and a group is right exactly if the marks are at the positions that the group claims and nowhere else.
A shifted padding, a channel shuffle, a norm over channels, attention or an unknown operation all fail the check.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_prune.running import removing, unwatched
from lit_prune.structure import axes
from lit_prune.structure.cutting import cut_layer
from lit_prune.structure.example import Example
from lit_prune.structure.hollow import Hollow, NeedsValues, for_shapes, ones
from lit_prune.structure.layers import layer_type
from lit_prune.structure.tracing import select, sketch_network


@dataclass
class Sites:
    """Modules where marks are put or looked for, by qualified name.

    Attributes:
        writers: modules whose output channels can be marked (convolution, linear layer, padded shortcut).
        readers: modules that end a group: the marks on their input are noted and cleaned.
        passers: channel-wise layers (norm, depthwise convolution, PReLU): the marks on their input are noted.
        norms: those of them whose statistics mix channels (LayerNorm): the marks are put behind them again.
        widths: (module, axis) -> number of channels.
        asides: layers that run in training alone, where nothing is marked or looked for in evaluation mode.
    """

    writers: dict[str, nn.Module] = field(default_factory=dict)
    readers: dict[str, nn.Module] = field(default_factory=dict)
    passers: dict[str, nn.Module] = field(default_factory=dict)
    norms: dict[str, nn.Module] = field(default_factory=dict)
    widths: dict[tuple[str, str], int] = field(default_factory=dict)
    asides: Set[str] = frozenset()

    def of(self, model: nn.Module) -> "Sites":
        """The same of a copy."""
        return find_sites(model, self.asides)


def find_sites(model: nn.Module, asides: Set[str] = frozenset()) -> Sites:
    """Where the probe marks and looks: every layer where channels end, begin or pass one by one.

    Args:
        model: the network.
        asides: layers that do not run in the mode that it is in.
    """
    sites = Sites(asides=asides)
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
    for name in asides:
        for table in (sites.writers, sites.readers, sites.passers, sites.norms):
            table.pop(name, None)
    return sites


def marked(
    model: nn.Module,
    sample: Example,
    lost: Mapping[axes.AxisKey, Sequence[int]],
    sites: Sites,
    call: Callable,
    exact: bool = True,
) -> Any:
    """The network's output while the positions `lost` are marked; None where marks arrive elsewhere than claimed.

    Where they arrive as claimed it is the output of the network with these channels silenced: every reader sees zeros
    in their place, and norms take their statistics over the others.

    Args:
        model: network in evaluation mode.
        sample: one sample.
        lost: positions that each axis of a group loses.
        sites: where to mark and look.
        call: the output for a network and a sample.
        exact: whether the output is asked for, and not only whether there is one.
    """
    marks = {key: _row(sites.widths[key], places) for key, places in lost.items() if key in sites.widths}
    with _watching(sites, marks, exact) as seen, _tensors_marked(model, lost):
        output = call(model, sample)
    if any(isinstance(leaf, Tensor) and bool(leaf.isnan().any()) for leaf in tree_leaves(output)):
        return None
    expected = {name: row for (name, axis), row in marks.items() if _entrance(sites, name, axis)}
    calls = ((row, expected.get(name, np.zeros_like(row))) for name, rows in seen.items() for row in rows)
    right = all(name in seen for name in expected) and all(np.array_equal(row, claim) for row, claim in calls)
    return output if right else None


def arrive(
    model: nn.Module, sample: Example, lost: Mapping[axes.AxisKey, Sequence[int]], sites: Sites, call: Callable
) -> bool:
    """Whether the marks of `marked` arrive as claimed.

    Readers are given no marks and depthwise layers pass each channel's, so neither need compute what they do.
    """

    def arrived(hollow: bool) -> bool:
        shapes = Hollow(sample.tensors, skips=False, fill=ones)

        def call_hollow(model: nn.Module, sample: Example) -> Any:
            def enter(*_: object) -> None:
                shapes.skips = hollow

            def leave(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
                shapes.skips = False
                if not (hollow and axes.is_depthwise(module)):
                    return None
                places = tuple(range(axes.channel_dim(module, args[0]) + 1, args[0].dim()))
                return output + 0 * args[0].sum(places, keepdim=True)  # the marks

            spared = [*sites.readers.values(), *filter(axes.is_depthwise, sites.passers.values())]
            handles = [module.register_forward_pre_hook(enter) for module in spared]
            handles += [module.register_forward_hook(leave, prepend=True) for module in spared]
            with removing(handles), shapes:
                return call(model, sample)

        if marked(model, sample, lost, sites, call_hollow, exact=not hollow) is not None:
            return True
        if hollow:
            raise NeedsValues
        return False

    return for_shapes(arrived)


@contextmanager
def _tensors_marked(model: nn.Module, lost: Mapping[axes.AxisKey, Sequence[int]]) -> Iterator[None]:
    """Marks in what no layer writes: class tokens, embeddings of positions, layer scales."""
    held = []
    try:
        for (name, axis), places in lost.items():
            owner, _, key = name.rpartition(".")
            holder = model.get_submodule(owner)
            tables: tuple[Any, ...] = (holder._parameters, holder._buffers)
            for table in tables if layer_type(holder) is None else ():
                if (tensor := table.get(key)) is not None and tensor.is_floating_point():
                    held.append((table, key, tensor))
                    index = torch.tensor(places, device=tensor.device)
                    values = tensor.detach().index_fill(axes.dim_of(tensor, axis), index, torch.nan)
                    table[key] = nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values
        yield
    finally:
        for table, key, tensor in reversed(held):
            table[key] = tensor


def _row(width: int, places: Sequence[int]) -> np.ndarray:
    """Bool [width], True at the places."""
    row = np.zeros(width, dtype=bool)
    row[list(places)] = True
    return row


def _entrance(sites: Sites, name: str, axis: str) -> bool:
    """Whether the marks of this axis arrive at the input of the module."""
    return (axis in ("in", "dim:1") and name in sites.readers) or name in sites.passers


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
def _watching(
    sites: Sites, marks: Mapping[axes.AxisKey, np.ndarray], exact: bool
) -> Iterator[dict[str, list[np.ndarray]]]:
    """Hooks that mark (before any of the network's own), note and clean.

    Yields name -> marks found on each call, bool [channels].
    """
    seen: dict[str, list[np.ndarray]] = {}
    held: dict[str, Tensor] = {}

    def note(name: str, cleans: bool):
        def hook(module: nn.Module, args: tuple) -> tuple | None:
            with unwatched():
                for values in args[: inputs(module)]:
                    dim = axes.channel_dim(module, values)
                    rows = values.sum([d for d in range(values.dim()) if d != dim]).isnan()  # [C]
                    seen.setdefault(name, []).append(rows.cpu().numpy())
                    held.update({name: values} if name in sites.norms else {})
            return with_inputs(module, args, _cleaned) if cleans else None

        return hook

    def mark(row: np.ndarray):
        spots = torch.from_numpy(np.where(row, np.nan, 0.0))

        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            first, *others = output if isinstance(output, tuple) else (output,)  # an attention gives its weights too
            shape = [1] * first.dim()
            shape[axes.channel_dim(module, first)] = -1
            nans = spots.to(first).view(shape)
            return (first + nans, *others) if isinstance(output, tuple) else first + nans

        return hook

    def over_the_rest(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            lost = np.flatnonzero(seen[name][-1])
            parted = exact and 0 < len(lost) < len(seen[name][-1])
            values = _of_the_rest(module, args[0], lost) if parted else output
            return torch.add(values, held.pop(name), alpha=0)  # the marks

        return hook

    handles = [module.register_forward_pre_hook(note(name, True)) for name, module in sites.readers.items()]
    handles += [
        module.register_forward_pre_hook(note(name, name in sites.norms)) for name, module in sites.passers.items()
    ]
    handles += [module.register_forward_hook(over_the_rest(name), prepend=True) for name, module in sites.norms.items()]
    handles += [
        module.register_forward_hook(mark(marks[name, "out"]), prepend=True)
        for name, module in sites.writers.items()
        if (name, "out") in marks
    ]
    with removing(handles):
        yield seen


def _cleaned(values: Tensor) -> Tensor:
    """Zeros for the marks."""
    return values.nan_to_num(0.0, torch.inf, -torch.inf)


def _of_the_rest(norm: nn.Module, values: Tensor, lost: np.ndarray) -> Tensor:
    """A norm of the channels that stay, with its statistics over them alone; zeros in the place of the others."""
    dim = axes.channel_dim(norm, values)
    small = nn.Module()
    small.norm = sketch_network(norm)
    cut_layer(small, "norm", "out", lost.tolist())
    kept = torch.from_numpy(np.delete(np.arange(values.shape[dim]), lost)).to(values.device)
    return torch.zeros_like(values).index_copy(dim, kept, small.norm(select(values, dim, kept)))
