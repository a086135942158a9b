"""Attention heads: which slices of which tensors serve one head alone, read off gradients with exact codes.

One pass is watched function by function: where attention happens (scaled dot products, or a softmax and the product
that follows it), and what the layers that mix channels read. Their inputs are cut out of the graph, so that a gradient
runs from what an output projection reads back to the tensors of its own attention and no further. The columns of head h
are given the gradient `r · 2^h` beside `r`. Both backward passes do the same arithmetic, a power of two changes no
digit, and so the quotient of the two gradients is `2^h` exactly where a value serves head h alone and no power of two
where it serves several. The weight of a layer that mixes channels serves, row by row, what the channels serve that it
writes, so the gradients of these are taken and not those of the whole weight. No list of classes, layouts or names is
needed for that: fused or separate projections, tables of relative positions, temperatures, gates and norms within a
head come out the same way.

The pass is hollow, with noise for products: it tells where attention happens, and which columns read it. Then the
module around each attention is run alone, in full; around one that is built like an earlier one it need not be.

Codes of the positions within a head instead of the heads tell the width of the values apart in the same gradients, and
gradients from the queries and keys that are multiplied the width of these.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_prune.running import removing
from lit_prune.structure.attention_einsum import Einsum
from lit_prune.structure.attention_parts import Attention, Inner, moved
from lit_prune.structure.attention_readers import Read, columns_of
from lit_prune.structure.attention_slices import Part, Slices, likewise, owners_of, slices_of
from lit_prune.structure.example import Example, cloned
from lit_prune.structure.hollow import Hollow, Noise, for_shapes

_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
_SEVERAL = "its module attends several times"
_UNMET = "its weights meet no values in a product of matrices that could be seen"
MIXERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


@dataclass
class _Call:
    """Output of one attention [..., heads, L, d], and the queries [..., L, e] and keys [..., S, e] behind it."""

    owner: str
    output: Tensor
    factors: tuple[Tensor, Tensor] | None


@dataclass
class _Weights:
    """Weights of the values, [..., heads, L, S], and the queries and keys behind them."""

    shape: torch.Size
    factors: tuple[Tensor, Tensor] | None


def find_attention(model: nn.Module, sample: Example) -> tuple[list[Attention], dict[str, tuple[tuple, dict]]]:
    """The attentions of `model` in order of use; it is run once, in the state it is in.

    Beside them what each module was called with first: name -> (args, kwargs).

    Args:
        model: network in evaluation mode whose parameters require gradients, its attention layers open (`opened`).
        sample: one sample.
    """
    watch = for_shapes(partial(_watched, model, sample), model)
    columns = columns_of([call.output for call in watch.calls], watch.reads)
    attentions: list[Attention] = []
    for call, found in zip(watch.calls, columns, strict=True):
        known = next((like for other in attentions if (like := _like(model, other, call, watch.reads, found))), None)
        attentions.append(known or _attention(model, watch, call, found))
    attentions += [Attention(name, found.shape[-3], reason=_UNMET) for name, found in watch.weights.items()]
    return attentions, watch.calls_of


def _watched(model: nn.Module, sample: Example, hollow: bool) -> "_Watch":
    """What happened in one pass."""
    with _watching(model) as watch, Hollow(sample.tensors, skips=hollow, fill=Noise()):
        model(*sample.args, **sample.kwargs)
    watch.reads = [read for read in watch.reads if read.inputs.requires_grad]
    return watch


def _again(model: nn.Module, watch: "_Watch", owner: str, reader: str) -> tuple["_Call", Read, list[Read]] | None:
    """An attention, what reads it and all reads, with all values: of a module that holds both, run again.

    None where none does.
    """
    scopes = [name for name in watch.calls_of if _holds(name, owner) and _holds(name, reader)]
    for scope in dict.fromkeys((max(scopes, key=len), "")):
        args, kwargs = cloned(watch.calls_of[scope])
        with _watching(model) as again:
            model.get_submodule(scope)(*args, **kwargs)
        calls = [call for call in again.calls if call.owner == owner]
        reads = [read for read in again.reads if read.weight == reader and read.inputs.requires_grad]
        if len(calls) == len(reads) == 1:
            return calls[0], reads[0], again.reads
    return None


def _holds(scope: str, name: str) -> bool:
    return not scope or name == scope or name.startswith(f"{scope}.")


def _like(
    model: nn.Module, known: Attention, call: _Call, reads: Sequence[Read], found: tuple[int, Tensor] | str
) -> Attention | None:
    """A known attention under the names of this one; None unless both are built, called and read alike."""
    if isinstance(found, str):
        return None
    places = tuple(tuple(sorted(row)) for row in found[1].tolist())
    width = 0 if call.factors is None else call.factors[0].shape[-1]
    if (known.heads, known.columns, known.pairs.size) != (call.output.shape[-3], places, width):
        return None
    other = moved(model, known, call.owner)
    return other if other is not None and other.reader == reads[found[0]].weight else None


class _Watch(TorchFunctionMode):
    """Notes attentions and reads, and takes what mixing layers read out of the graph.

    It knows which modules run, and what each was called with first: name -> (args, kwargs).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.running: list[str] = []
        self.calls_of: dict[str, tuple[tuple, dict]] = {}
        self.leaves = {name for name, module in model.named_modules() if next(module.parameters(), None) is None}
        self.calls: list[_Call] = []
        self.reads: list[Read] = []
        self.weights: dict[str, _Weights] = {}  # by the module in which they still wait for values
        self.product: tuple[int, tuple[Tensor, Tensor]] | None = None  # its size, and its factors

    def enter(self, name: str, args: tuple, kwargs: dict) -> None:
        """A module begins."""
        self.running.append(name)
        self.calls_of.setdefault(name, (args, kwargs))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Runs the function."""
        kwargs = kwargs or {}
        if function in MIXERS and isinstance(args[0], Tensor):
            return self._mix(function, args, kwargs)
        if function is torch.einsum and (product := Einsum.read(args)) is not None:
            return self._einsum(product)
        output = function(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            self._call(output, (args[0], args[1]) if len(args) > 1 else None)
        elif (
            function in _SOFTMAX
            and output.dim() > 3
            and (args[1:2] or (kwargs.get("dim"),))[0] in (-1, output.dim() - 1)
        ):
            known = self.product is not None and self.product[0] == output.numel()
            self.weights[self._owner()] = _Weights(output.shape, self.product[1] if known and self.product else None)
        elif function in _PRODUCTS and len(args) == 2 and isinstance(args[0], Tensor):
            weights = self.weights.get(self._owner())
            if weights is not None and weights.shape[-2:] == args[0].shape[-2:] and args[0].dim() > 3:
                del self.weights[self._owner()]  # which a layer may have changed on the way, other heads included
                self._call(output, weights.factors)
            else:
                self.product = (output.numel(), (args[0], args[1].transpose(-2, -1)))
        return output

    def _einsum(self, product: Einsum) -> Tensor:
        weights = self.weights.get(self._owner())
        found = None if weights is None else product.of_weights(weights.shape)
        if weights is not None and found is not None:
            del self.weights[self._owner()]
            self._call(found[0], weights.factors)
            return found[1]
        output = torch.einsum(f"{product.letters[0]},{product.letters[1]}->{product.letters[2]}", *product.tensors)
        if product.factors is not None:
            self.product = (output.numel(), product.factors)
        return output

    def _owner(self) -> str:
        """The module that runs, one without parameters left out."""
        return next((name for name in reversed(self.running) if name not in self.leaves), "")

    def _mix(self, function, args: tuple, kwargs: dict) -> Tensor:
        inputs, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
        dim = inputs.dim() - 1 if function is F.linear else 1
        if function is not F.linear and weight.shape[1] < inputs.shape[1]:
            return function(*args, **kwargs)  # depthwise or grouped: the heads pass
        output = function(inputs.detach(), *args[1:], **kwargs)
        self.reads.append(Read(self.names.get(id(weight), ""), inputs, output, dim))
        return output

    def _call(self, output: Tensor, factors: tuple[Tensor, Tensor] | None) -> None:
        if output.dim() > 3 and output.requires_grad:
            self.calls.append(_Call(self._owner(), output, factors))


@contextmanager
def _watching(model: nn.Module) -> Iterator[_Watch]:
    """A watch, switched on, with hooks that tell it which modules run."""
    watch, handles = _Watch(model), []
    for name, module in model.named_modules():
        enter = lambda _, args, kwargs, name=name: watch.enter(name, args, kwargs)  # noqa: E731
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda *_: (watch.running.pop(), None)[1]))
    with removing(handles), watch:
        yield watch


def _attention(model: nn.Module, watch: _Watch, call: _Call, found: tuple[int, Tensor] | str) -> Attention:
    heads = call.output.shape[-3]
    if isinstance(found, str):
        return Attention(call.owner, heads, reason=found)
    read, columns = watch.reads[found[0]], found[1]
    places = tuple(tuple(sorted(row)) for row in columns.tolist())
    width = read.inputs.shape[read.dim]
    if not read.weight or sorted(p for row in places for p in row) != list(range(width)):
        return Attention(call.owner, heads, reason="no layer alone reads all its heads and nothing else")
    several = sum(other.owner == call.owner for other in watch.calls) > 1
    again = None if several else _again(model, watch, call.owner, read.weight)
    inner, pairs = columns.shape[1], 0 if call.factors is None else call.factors[0].shape[-1]
    if again is None:
        reason = _SEVERAL if several else "no module runs that holds all of it"
        return Attention(call.owner, heads, reason=reason, values=Inner(inner), pairs=Inner(pairs))
    call, read, reads = again
    named = _near(model, reads, read.weight)
    of = lambda unit: torch.empty(width, dtype=torch.int64).index_copy(0, columns.flatten().cpu(), unit)  # noqa: E731
    head_of = of(torch.arange(heads).repeat_interleave(inner))
    owners = dict(owners_of(named, [(read.inputs, read.dim, head_of)], heads))
    parts = ((name, slices_of(name, owner, heads, partly=owner.dim() > 1)) for name, owner in owners.items())
    slices = {name: part for name, part in parts if part}
    slices |= likewise(model, slices, owners)
    values = _inner_slices(model, named, [(read.inputs, read.dim, of(torch.arange(inner).repeat(heads)))], inner)
    across = tuple(tuple(sorted(row)) for row in columns.T.tolist())
    return Attention(
        call.owner,
        heads,
        read.weight,
        places,
        tuple(slices.values()),
        values=Inner(inner, values, across),
        pairs=_pairs(model, call, named),
    )


def _near(model: nn.Module, reads: Sequence[Read], reader: str) -> list[Part]:
    """All parameters but the weight `reader`; a row of a weight serves what the channel serves that it writes."""
    times = Counter(read.weight for read in reads)
    written = {r.weight: (r.output, r.dim) for r in reads if times[r.weight] == 1 and r.output.requires_grad}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name != reader]
    return [Part(name, *written.get(name, (p, None))) for name, p in named]


def _pairs(model: nn.Module, call: _Call, named: Sequence[Part]) -> Inner:
    """What serves one position of queries and keys alone."""
    if call.factors is None:
        return Inner(0)
    size = call.factors[0].shape[-1]
    roots = [(f, f.dim() - 1, torch.arange(size)) for f in call.factors if f.requires_grad and f.shape[-1] == size]
    if len(roots) < 2:
        return Inner(size)
    slices = _inner_slices(model, named, roots, size)
    for name, buffer in model.named_buffers():  # a bias of the keys that is no parameter
        beside = [s for s in slices if s.name.rpartition(".")[0] == name.rpartition(".")[0] and buffer.dim() == 1]
        same = [s for s in beside if sum(map(len, s.positions)) == len(buffer) and not s.dim]
        slices += (Slices(name, 0, same[0].positions),) if same and buffer.is_floating_point() else ()
    return Inner(size, slices)


def _inner_slices(
    model: nn.Module, named: Sequence[Part], roots: Sequence[tuple[Tensor, int, Tensor]], units: int
) -> tuple[Slices, ...]:
    """What serves one position within the heads alone, see `owners_of`; the rest may serve something else."""
    owners = dict(owners_of(named, roots, units))
    slices = {name: part for name, owner in owners.items() if (part := slices_of(name, owner, units, partly=True))}
    return tuple((slices | likewise(model, slices, owners, partly=True)).values())
