"""Follows channels through one pass: every operation says what happens to the labels of its tensors.

Operations that move values (reshape, permute, slice, concatenate, shuffle, pixel shuffle, roll, ...) are applied to
the labels themselves, so positions are right whatever the shapes. Where an operation is the same function of fewer
channels only if certain ones go together (the parts of a split, the groups of a grouped layer), they are tied. Where it
is not, or where it is not known, the channels are kept, with the reason. Nothing is guessed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lit_prune.running import removing, unwatched
from lit_prune.structure import operations, reasons, rows
from lit_prune.structure.example import Example
from lit_prune.structure.hollow import Hollow
from lit_prune.structure.labelled import LabelledTensors, tensors_in
from lit_prune.structure.labels import NOBODY, compact, condensed, detail, varies
from lit_prune.structure.layers import layer_type


class Follower(LabelledTensors, TorchDispatchMode):
    """Carries labels along while a network runs; see the module.

    Attributes:
        attends: whether anything happened that attention needs.
        decides: whether a value that depends on the input was turned into True or False.
        layers, ran: those that are followed as a whole, and those of them that ran.
    """

    def __init__(self, model: nn.Module, sample: Example, hollow: bool = False, inverts: bool = False) -> None:
        """For one pass of a model; `labels` may be set to those of an earlier one, which this one then adds to.

        Args:
            model: the network.
            sample: what it is called with.
            hollow: whether products need not be computed, see `for_shapes`.
            inverts: whether decisions upon values of the input are turned round.
        """
        super().__init__(model)
        self.attends = self.decides = False
        self.layers, self.ran = set[str](), set[str]()
        self._sample = sample
        self._hollow, self._inverts, self._inside = Hollow(sample.tensors, skips=hollow), inverts, 0

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Layers that are cut as a whole are followed as a whole, inside."""

        def enter(*_: object) -> None:
            self._inside += 1

        def leave(name: str, rule: Callable) -> Callable:
            def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
                self._inside -= 1
                self.ran.add(name)
                if not self._inside:
                    with unwatched():
                        rule(self, name, module, tuple(tensors_in((args, kwargs))), output)

            return hook

        rules = [(n, m, kind.follow) for n, m in self._model.named_modules() if (kind := layer_type(m)) is not None]
        self.layers = {name for name, _, _ in rules}
        handles = [module.register_forward_pre_hook(enter) for _, module, _ in rules]
        for name, module, rule in rules:  # before the network's own hooks, which are followed operation by operation
            handles.append(module.register_forward_hook(leave(name, rule), prepend=True, with_kwargs=True))
        with removing(handles):
            yield

    def run(self) -> Any:
        """Output of the model, run once with its channels followed from the input on."""
        for tensor in self._sample.tensors:
            if tensor.is_floating_point():
                self.put(tensor, self.fixed[0].expand(tensor.shape))
        with torch.no_grad(), self._watching(), self._hollow.guarding(), self:
            return self._model(*self._sample.args, **self._sample.kwargs)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs an operation, then says what happens to the labels."""
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        self.attends |= "softmax" in name or "attention" in name
        if not self._inside and name not in operations.KNOWN and not operations.is_pointwise(function):
            with self:
                output = function.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        inputs = tensors_in((args, kwargs))
        depends = any(map(self._hollow.depends, inputs))
        before = None if self._inside else [self.of(tensor) for tensor in inputs]
        strides = args[0].stride() if name in operations.RESTRIDES else ()
        output = self._hollow.answer(function, args, kwargs)
        if depends and isinstance(output, bool):
            self.decides = True
            return output != self._inverts
        if before is not None and any(labels is not None for labels in before):
            first = before[0]
            if strides and first is not None and operations.same_places(first.shape, strides, output):
                self.put(output, first)
            elif name in operations.MOVES_IN_PLACE and first is not None:  # the tensor is where it was, seen anew
                self.put(output, getattr(first, name.removesuffix("_"))(*args[1:]))
            else:
                self._follow(name, function, args, kwargs, output)
        return output

    def _follow(self, name: str, function: Any, args: tuple, kwargs: dict, output: Any) -> None:
        if name in operations.NOTHING:
            return
        if operations.is_pointwise(function):
            self._pointwise(name, args, kwargs, output)
        elif name in operations.MOVES:
            self._move(name, function, args, kwargs, output)
        elif name in operations.REDUCTIONS | operations.ALONG:
            self._along(name, args, kwargs, output)
        elif (rule := self._rule(name)) is not None:
            rule(args, output)
        else:
            several = sum(map(self._hollow.depends, tensors_in(args))) > 1
            self._keep(args, kwargs, self.reason_of(name, tensors_in(args), several))
            for tensor in tensors_in(output):
                self.put(tensor, self.fixed[2].expand(tensor.shape))

    def _rule(self, name: str) -> Callable | None:
        """What an operation with a rule of its own does, given its arguments and output."""
        if name in operations.SAME:
            return lambda args, output: self.put(output, self.shadow(args[0]))
        if name in operations.SPATIAL:
            return lambda args, output: self._merge(operations.spatial_dims(name), args, tensors_in(output)[0])
        if name in operations.BATCH_NORM:
            return self._batch_norm
        if name in operations.REGIONS:
            return partial(rows.follow_regions, self)
        if name in ("index_put", "index_put_"):
            return partial(rows.follow_written, self)
        shuffles = dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), self._shuffle)
        return {"constant_pad_nd": self._pad, "glu": self._glu, **shuffles}.get(name)

    def _keep(self, args: tuple, kwargs: dict, reason: str) -> None:
        self.labels.keep([labels for t in tensors_in((args, kwargs)) if (labels := self.of(t)) is not None], reason)

    def _pointwise(self, name: str, args: tuple, kwargs: dict, output: Any) -> None:
        """Values at the same place go together; one value that is spread over several channels must stay."""
        result = tensors_in(output)[0]
        found = [(t, labels) for t in tensors_in((args, kwargs)) if (labels := self.of(t)) is not None]
        found = [(t, labels.expand(result.shape)) for t, labels in found if operations.fits(labels, result.shape)]
        changing = [{dim for dim in range(result.dim()) if varies(labels, dim)} for _, labels in found]
        together = []
        for place, (tensor, labels) in enumerate(found):
            others = set().union(*(dims for other, dims in enumerate(changing) if other != place))
            if any(operations.is_spread(tensor, dim, result.dim()) for dim in others):
                self.labels.keep([labels], reasons.SPREAD)
            else:
                together.append((tensor, labels))
        whole = torch.zeros((), dtype=torch.float64).expand(result.shape)
        for _, labels in sorted(together, key=lambda pair: detail(pair[1])):
            self.labels.tie(whole, labels)
            nobody = compact(whole) == NOBODY
            if bool(nobody.any()):
                whole = labels if bool(nobody.all()) else torch.where(whole == NOBODY, labels, whole)
        if name in operations.ADDITIONS and sum(not self.is_bare(t) for t, _ in together) > 1:
            self.labels.join([labels for _, labels in together])
        self.put(result, whole)

    def _move(self, name: str, function: Any, args: tuple, kwargs: dict, output: Any) -> None:
        """The operation itself moves the labels; first what must go together so that fewer channels move alike."""
        source = args[0] if isinstance(args[0], Tensor) else args[0][0]
        labels = self.of(source)
        if labels is not None and isinstance(args[0], Tensor):
            self._hold_together(name, labels, args, output)
        if name in operations.VIEWS:
            self.put(output, condensed(self.shadow(source).reshape(output.shape)))
            return
        sources = {id(tensor) for tensor in tensors_in(args[:1]) if self.of(tensor) is not None}

        def shadow(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            moves = leaf.is_floating_point() or id(leaf) in sources
            return self.shadow(leaf) if moves else leaf.cpu()  # other integers say where values go: labels are there

        moved = function(*tree_map(shadow, args), **kwargs)
        for tensor, moved_labels in zip(tensors_in(output), tensors_in(moved), strict=True):
            self.put(tensor, condensed(moved_labels))

    def _hold_together(self, name: str, labels: Tensor, args: tuple, output: Any) -> None:
        if name in operations.VIEWS:
            self._split_dims(labels, tuple(output.shape))
        dim = operations.dim_along(name, args, labels.dim())
        if dim is None or not varies(labels, dim):
            return
        size = labels.shape[dim]
        if name in operations.SPLITS:
            lengths = {part.shape[dim] for part in output}
            self._tie_parts(labels, dim, lengths.pop() if len(lengths) == 1 else 0)
        elif name == "slice":
            start, length = operations.start_of(args, size), output.shape[dim]
            plain = len(args) < 5 or args[4] == 1
            fits = plain and length and not size % length and not start % length
            if length != size:
                self._tie_parts(labels, dim, length if fits else 0)
        elif name != "unbind":
            self.labels.keep([labels], reasons.operation(name))

    def _tie_parts(self, labels: Tensor, dim: int, length: int) -> None:
        """Parts of equal length lose the same positions; with a length of 0 they are not, and stay."""
        if not length:
            return self.labels.keep([labels], reasons.FIXED_PARTS)
        first = labels.narrow(dim, 0, length)
        for start in range(length, labels.shape[dim], length):
            self.labels.tie(first, labels.narrow(dim, start, length))

    def _split_dims(self, labels: Tensor, shape: tuple[int, ...]) -> None:
        """A dimension of channels that is seen as rows and columns loses the same columns of every row."""
        was = sum(varies(labels, dim) for dim in range(labels.dim()))
        values = labels.reshape(shape)
        changing = [dim for dim in range(len(shape)) if varies(values, dim)]
        if was and len(changing) > was:
            self.labels.tie(values.narrow(changing[0], 0, 1).expand(shape), values)

    def _glu(self, args: tuple, output: Tensor) -> None:
        """The two halves go together."""
        labels = self.shadow(args[0])
        dim = (args[1] if len(args) > 1 else -1) % labels.dim()
        self._tie_parts(labels, dim, output.shape[dim])
        self.put(output, labels.narrow(dim, 0, output.shape[dim]))

    def _shuffle(self, args: tuple, output: Tensor) -> None:
        """Rows of channels become columns; the same places of every row go together."""
        labels, rows = self.shadow(args[0]), args[1]
        seen = (len(labels), rows, -1, *labels.shape[2:])
        table = labels.reshape(seen)
        self._split_dims(labels, tuple(table.shape))
        self.put(output, table.transpose(1, 2).reshape(labels.shape))

    def _pad(self, args: tuple, output: Tensor) -> None:
        """Around a map the border belongs to its channel; zeros beside channels stay where they are."""
        labels, pads = self.shadow(args[0]), list(args[1])
        for place in range(len(pads) // 2):
            dim, (before, after) = labels.dim() - 1 - place, pads[2 * place : 2 * place + 2]
            if not varies(labels, dim):
                shape = list(labels.shape)
                shape[dim] += before + after
                labels = labels.narrow(dim, 0, 1).expand(shape)
            elif before or after:
                labels = torch.constant_pad_nd(labels, [0, 0] * place + [before, after], float(self.fixed[1]))
        self.put(output, labels)

    def _merge(self, spatial: int, args: tuple, output: Tensor) -> None:
        """Pooling and interpolation mix the places of each map, the last `spatial` dimensions."""
        labels = self.of(args[0])
        if labels is None:
            return
        first: tuple[Any, ...] = (..., *[slice(0, 1)] * spatial)
        one = labels[first]
        self.labels.tie(one.expand(labels.shape), labels)
        self.put(output, one.expand(output.shape))

    def _along(self, name: str, args: tuple, kwargs: dict, output: Any) -> None:
        """Statistics of one channel's values are the channel's; those over several tie them, or keep them all."""
        labels = self.shadow(args[0])
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        if name in ("linalg_vector_norm", "norm"):
            dims = args[2] if len(args) > 2 else kwargs.get("dim")
        dims = range(labels.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        dims = [dim % max(labels.dim(), 1) for dim in dims]
        mixed = [dim for dim in dims if varies(labels, dim)]
        if mixed and not any(varies(labels, dim) for dim in range(labels.dim()) if dim not in mixed):
            self.labels.keep([labels], reasons.operation(name))
            return
        for dim in mixed:
            self.labels.tie(labels.narrow(dim, 0, 1).expand(labels.shape), labels)
        for tensor in tensors_in(output):
            left = labels
            if tensor.dim() == labels.dim():
                for dim in dims:
                    left = left.narrow(dim, 0, 1)
            else:
                left = labels[tuple(0 if dim in dims else slice(None) for dim in range(labels.dim()))]
            self.put(tensor, left.expand(tensor.shape))

    def _batch_norm(self, args: tuple, output: Any) -> None:
        labels = self.of(args[0])
        shape = [1, -1] + [1] * (labels.dim() - 2) if labels is not None else []
        for tensor in args[1:5]:
            other = self.of(tensor) if isinstance(tensor, Tensor) else None
            if labels is not None and other is not None:
                self.labels.tie(labels, other.view(shape).expand(labels.shape))
        if labels is not None:
            self.put(tensors_in(output)[0], labels)
