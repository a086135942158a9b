"""Attention heads: which slices of which tensors serve one head alone, read off gradients with exact codes.

One pass is watched function by function: where attention happens (scaled dot products, or a softmax and the product
that follows it), and what the layers that mix channels read. Their inputs are cut out of the graph, so that a gradient
runs from what an output projection reads back to the tensors of its own attention and no further. The columns of head h
are given the gradient `r · 2^h` beside `r`. Both backward passes do the same arithmetic, a power of two changes no
digit, and so the quotient of the two gradients is `2^h` exactly where a value serves head h alone and no power of two
where it serves several. No list of classes, layouts or names is needed for that: fused or separate projections, tables
of relative positions, temperatures, gates and norms within a head come out the same way.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_prune.structure.example import Example
from lit_prune.structure.stack import Stack, watching

_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
MIXERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_STEP = 16  # heads told apart by one code: 2^0 to 2^15
_SHARED, _UNSEEN = -2, -1


@dataclass(frozen=True)
class Slices:
    """What belongs to each head in one tensor: `dim` and, head by head, the places along it."""

    name: str
    dim: int
    positions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        name: qualified name of the module in whose forward it happens.
        heads: their number.
        reader: name of the weight of the layer that reads the heads.
        columns: head by head, the input channels of that layer.
        slices: what serves one head alone, without the reader.
        reason: "" or why heads cannot be taken from it.
    """

    name: str
    heads: int
    reader: str = ""
    columns: tuple[tuple[int, ...], ...] = ()
    slices: tuple[Slices, ...] = ()
    reason: str = ""


@dataclass
class _Call:
    """Output of one attention [..., heads, L, d]."""

    owner: str
    output: Tensor
    code: Tensor | None = None  # of the column that reads each value: [..., heads, L, d]


@dataclass
class _Read:
    """What one layer that mixes channels reads: its weight's name, its input, where the channels are."""

    weight: str
    inputs: Tensor
    dim: int


def find_attention(model: nn.Module, sample: Example) -> tuple[list[Attention], dict[str, tuple[tuple, dict]]]:
    """The attentions of `model` in order of use; it is run once, in the state it is in.

    Beside them what each module was called with first: name -> (args, kwargs).

    Args:
        model: network in evaluation mode whose parameters require gradients, its attention layers open (`opened`).
        sample: one sample.
    """
    with watching(model, _Watch(model)) as watch:
        model(*sample.args, **sample.kwargs)
    reads = [read for read in watch.reads if read.inputs.requires_grad]
    columns = _columns(watch.calls, reads)
    attentions = [_attention(model, call, reads, found) for call, found in zip(watch.calls, columns, strict=True)]
    return attentions, watch.calls_of


class _Watch(Stack):
    """Notes attentions and reads, and takes what mixing layers read out of the graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.leaves = {name for name, module in model.named_modules() if next(module.parameters(), None) is None}
        self.calls: list[_Call] = []
        self.reads: list[_Read] = []
        self.weights: dict[int, Tensor] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Runs the function."""
        kwargs = kwargs or {}
        if function in MIXERS and isinstance(args[0], Tensor):
            args = self._read(function, args, kwargs)
        output = function(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            self._call(output)
        elif function in _SOFTMAX and output.dim() > 3:
            self.weights[output.data_ptr()] = output
        elif function in _PRODUCTS and len(args) == 2 and isinstance(args[0], Tensor):
            weights = self.weights.get(args[0].data_ptr())
            if weights is not None and weights.shape == args[0].shape:
                self._call(output)
        return output

    def _read(self, function, args: tuple, kwargs: dict) -> tuple:
        inputs, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
        dim = inputs.dim() - 1 if function is F.linear else 1
        if function is not F.linear and weight.shape[1] < inputs.shape[1]:
            return args  # depthwise or grouped: the heads pass
        self.reads.append(_Read(self.names.get(id(weight), ""), inputs, dim))
        return (inputs.detach(), *args[1:])

    def _call(self, output: Tensor) -> None:
        if output.dim() > 3 and output.requires_grad:
            owner = next((name for name in reversed(self.running) if name not in self.leaves), "")
            self.calls.append(_Call(owner, output))


def _columns(calls: Sequence[_Call], reads: Sequence[_Read]) -> list[tuple[int, Tensor] | str]:
    """For each attention the number of the read that reads it and the column that reads each value, or a reason."""
    outputs = [call.output for call in calls]
    if not outputs or not reads:
        return ["no layer reads it"] * len(calls)
    plain, by_column, by_read = (_gradients(reads, outputs, code) for code in (_ones, _column_code, _read_code))
    found: list[tuple[int, Tensor] | str] = []
    for ones, column, read in zip(plain, by_column, by_read, strict=True):
        if ones is None or column is None or read is None:
            found.append("no layer reads it")
        else:
            found.append(_one_reader(ones, column, read))
    return found


def _gradients(reads: Sequence[_Read], outputs: list[Tensor], code) -> tuple[Tensor | None, ...]:
    total = sum((read.inputs * code(number, read)).sum() for number, read in enumerate(reads))
    return torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)


def _ones(number: int, read: _Read) -> float:
    return 1.0


def _column_code(number: int, read: _Read) -> Tensor:
    shape = [1] * read.inputs.dim()
    shape[read.dim] = -1
    return torch.arange(1, read.inputs.shape[read.dim] + 1, device=read.inputs.device).view(shape).to(read.inputs)


def _read_code(number: int, read: _Read) -> float:
    return number + 1.0


def _one_reader(ones: Tensor, column: Tensor, read: Tensor) -> tuple[int, Tensor] | str:
    """The read, and for each head and dimension its column, int64 [heads, d]."""
    seen = ones != 0
    columns, reads = (torch.where(seen, values / ones, -1.0) for values in (column, read))
    by_place = [values.movedim(-3, 0).movedim(-1, 1).flatten(2) for values in (columns, reads)]  # [heads, d, *]
    columns, reads = (values.max(2).values for values in by_place)
    whole = all(
        bool(((values - highest[..., None]).abs() < 0.01)[values > 0].all()) and bool((highest > 0.5).all())
        for values, highest in zip(by_place, (columns, reads), strict=True)
    )
    rounded, number = columns.round().long() - 1, reads.round().long() - 1
    if not whole or (columns - 1 - rounded).abs().max() > 0.01 or len(number.unique()) != 1:
        return "its heads are mixed (a norm, a gate or a layer across heads) before one layer reads them"
    return int(number.flatten()[0]), rounded


def _attention(model: nn.Module, call: _Call, reads: Sequence[_Read], found: tuple[int, Tensor] | str) -> Attention:
    heads = call.output.shape[-3]
    if isinstance(found, str):
        return Attention(call.owner, heads, reason=found)
    read, columns = reads[found[0]], found[1]
    places = tuple(tuple(sorted(row)) for row in columns.tolist())
    width = read.inputs.shape[read.dim]
    if not read.weight or sorted(p for row in places for p in row) != list(range(width)):
        return Attention(call.owner, heads, reason="no layer alone reads all its heads and nothing else")
    owners = dict(_owners(model, read, columns, heads))
    slices = {name: part for name, owner in owners.items() if (part := _slices(name, owner, heads))}
    slices |= _likewise(model, slices, owners)
    return Attention(call.owner, heads, read.weight, places, tuple(slices.values()))


def _owners(model: nn.Module, read: _Read, columns: Tensor, heads: int) -> Iterator[tuple[str, Tensor]]:
    """Parameter by parameter that the heads depend on, the head that each of its values serves, int64 of its shape."""
    head_of = torch.empty(columns.numel(), dtype=torch.int64)
    head_of[columns.flatten().cpu()] = torch.arange(heads).repeat_interleave(columns.shape[1])
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name != read.weight]
    generator = torch.Generator().manual_seed(0)
    weight = 0.5 + torch.rand(read.inputs.shape, generator=generator).to(read.inputs)
    shape = [1] * read.inputs.dim()
    shape[read.dim] = -1
    codes = [torch.zeros_like(head_of), head_of % _STEP, head_of // _STEP]
    codes = codes if heads > _STEP else codes[:2]
    found = [
        torch.autograd.grad(
            (read.inputs * weight * (1 << code).view(shape).to(read.inputs)).sum(),
            [parameter for _, parameter in named],
            retain_graph=True,
            allow_unused=True,
        )
        for code in codes
    ]
    for (name, _), plain, *coded in zip(named, *found, strict=True):
        if plain is not None:
            yield name, sum(_STEP**place * _exponents(plain, values) for place, values in enumerate(coded))


def _exponents(plain: Tensor, coded: Tensor) -> Tensor:
    """The k for which `coded = 2^k · plain`, a large negative number where that holds for no whole k or both are 0."""
    whole = torch.log2((coded / plain).abs()).round()
    exact = coded == plain * torch.exp2(whole).round()
    return torch.where(exact & (plain != 0), whole, torch.where(plain == 0, _UNSEEN, _SHARED) * 10**4).long()


def _slices(name: str, owner: Tensor, heads: int) -> Slices | None:
    """The slices of one parameter that serve one head each; None if there is no axis that parts it by heads."""
    for dim in range(owner.dim()):
        rows = owner.movedim(dim, 0).flatten(1) if owner.dim() > 1 else owner[:, None]
        highest = rows.max(1).values
        known = torch.where(_unseen(rows), highest[:, None], rows)
        if bool((known == highest[:, None]).all()) and bool((highest >= 0).all()):
            places = tuple(tuple((highest == head).nonzero().flatten().tolist()) for head in range(heads))
            if len({len(row) for row in places}) == 1 and places[0]:
                return Slices(name, dim, places)
    return None


def _unseen(owner: Tensor) -> Tensor:
    """Where no gradient came: the value matters to no output, or to none on this image."""
    return (owner < 0) & (owner > _SHARED * 10**4)


def _likewise(model: nn.Module, slices: dict[str, Slices], owners: dict[str, Tensor]) -> dict[str, Slices]:
    """Vectors that lie beside a tensor with heads along its first axis, of the same length, in the same module.

    The bias of the keys has no gradient, since softmax does not see it, and a buffer never has one.
    """
    found = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        beside = [s for s in slices.values() if s.name.rpartition(".")[0] == name.rpartition(".")[0] and not s.dim]
        if name in slices or tensor.dim() != 1 or not tensor.is_floating_point():
            continue
        for other in beside:
            places = other.positions
            if sum(map(len, places)) == len(tensor) and _agrees(owners.get(name), places):
                found[name] = Slices(name, 0, places)
    return found


def _agrees(owner: Tensor | None, places: tuple[tuple[int, ...], ...]) -> bool:
    """Whether most of what was seen of a vector lies where `places` say (the rest is rounding)."""
    if owner is None:
        return True
    hits = sum(int((owner[list(row)] == head).sum()) for head, row in enumerate(places))
    return 2 * hits >= int((owner >= 0).sum())
