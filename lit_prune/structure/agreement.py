"""Whether a cut copy computes what the silenced network computes, product by product, without computing these.

A network is its products with weights (convolutions, linear layers) and what happens between them. Both networks are
run with one noise in place of what these products give, the copy with the channels of it that it has. If all of them
then read the same, each would give the same whatever came before it, since the weights of the copy are rows and columns
of the network's; and so, from the input on, would the networks. What happens in between is computed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_prune.running import unwatched
from lit_prune.structure import axes
from lit_prune.structure.attention import MIXERS
from lit_prune.structure.example import Example
from lit_prune.structure.hollow import Hollow
from lit_prune.structure.tracing import select

TOLERANCE = 1e-3  # of the largest value; rounding of float32 stays a hundred times below
_STRIDE = 1009  # from the noise of one product to that of the next
_PLACES = 64  # at which what products read is compared one by one
_Call = Callable[[nn.Module, Example], list[Tensor]]
_Side = tuple[axes.AxisKey, int]  # and its width
_Reads = list[Tensor]  # values [places, channels] and, where there is one, the bias


class Disagreement(Exception):
    """Something is read or answered that the other network does not read or answer."""


class Agreement:
    """One copy and its network."""

    def __init__(self, model: nn.Module, lost: Mapping[axes.AxisKey, Sequence[int]]) -> None:
        """For a copy of a network without `lost`, the positions that each axis loses."""
        self._widths = {name: len(weight) for name, weight, _ in _weights(model)}
        self._kept = {
            (name, dim): torch.from_numpy(np.delete(np.arange(width), lost[axis]))
            for name, _, both in _weights(model)
            for dim, (axis, width) in enumerate(both)
            if axis in lost
        }
        self._reads: list[tuple[str, _Reads]] = []  # of the copy, in order
        self._answered: list[Tensor] = []
        self._noise = torch.empty(0)
        self._generator = torch.Generator().manual_seed(0)

    def note(self, small: nn.Module, sample: Example, call: _Call) -> None:
        """Runs the copy.

        Raises:
            Exception: whatever a network raises that meets strange values or a width that it does not expect.
        """

        def read(name: str, values: _Reads) -> None:
            self._reads.append((name, [tensor.clone() for tensor in values]))  # which may be written to later on

        def answer(name: str, dim: int, shape: torch.Size, place: int) -> Tensor:
            return self._without((name, 0), dim, self._values(name, dim, shape, place))

        with _Products(small, sample, read, answer) as products, products.hollow:
            self._answered = call(small, sample)

    def check(self, model: nn.Module, sample: Example, call: _Call) -> list[Tensor]:
        """What the silenced network answers.

        Raises:
            Disagreement: the copy reads or answers something else.
            Exception: as in `note`.
        """
        left = iter(self._reads)

        def read(name: str, values: _Reads) -> None:
            other, expected = next(left, ("", []))
            found = [self._without((name, 1), 1, values[0]), *(self._without((name, 0), 0, t) for t in values[1:])]
            if other != name or not _alike(expected, found):
                raise Disagreement

        with _Products(model, sample, read, self._values) as products, products.hollow:
            answered = call(model, sample)
        if next(left, None) is not None or not agree(self._answered, answered):
            raise Disagreement
        return answered

    def _without(self, axis: tuple[str, int], dim: int, values: Tensor) -> Tensor:
        """Values at the positions that stay of one dimension of a weight."""
        return select(values, dim, self._kept[axis].to(values.device)) if axis in self._kept else values

    def _values(self, name: str, dim: int, shape: torch.Size, place: int) -> Tensor:
        """Noise from -1 to 1 for one product of the network."""
        sizes = [*shape]
        sizes[dim] = self._widths[name]
        begin, size = _STRIDE * place, torch.Size(sizes).numel()
        if len(self._noise) < begin + size:
            missing = max(begin + size - len(self._noise), len(self._noise))  # which copies what there is only seldom
            more = torch.empty(missing).uniform_(-1, 1, generator=self._generator)
            self._noise = torch.cat([self._noise, more])
        return self._noise[begin : begin + size].view(sizes)


class _Products(TorchFunctionMode):
    """Runs a network with other values for the products of what depends on its input with its parameters.

    Attributes:
        hollow: does what they are spared, inside.
    """

    def __init__(self, model: nn.Module, sample: Example, read: Callable, answer: Callable) -> None:
        super().__init__()
        self._names = {id(weight): name for name, weight, _ in _weights(model)}
        self.hollow = Hollow(sample.tensors, skips=False)
        self._read, self._answer, self._place = read, answer, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Runs the function."""
        name = self._names.get(id(args[1])) if function in MIXERS and len(args) > 1 else None
        dim = -1 if name is None or function is torch.nn.functional.linear else 1 - args[1].dim()
        if name is None or not self.hollow.depends(args[0]):
            return function(*args, **(kwargs or {}))
        with unwatched():
            self._read(name, [_sampled(args[0], dim), *(tensor for tensor in args[2:3] if tensor is not None)])
        self.hollow.skips = True
        try:
            output = function(*args, **(kwargs or {}))
        finally:
            self.hollow.skips = False
        with unwatched():
            output.copy_(self._answer(name, dim, output.shape, self._place))
            if args[1].shape[1] < args[0].shape[dim]:  # depthwise: marks pass
                output += 0 * args[0].sum(tuple(range(dim + 1, 0)), keepdim=True)
        self._place += 1
        return output


def _sampled(values: Tensor, dim: int) -> Tensor:
    """Values at some places, and the sum over all of them under random signs over their root, [places + 1, channels].

    What a cut changes, it mostly changes everywhere; the sum shows what is changed at a single place.
    """
    rows = values.movedim(dim, -1).reshape(-1, values.shape[dim])
    whole = _signs(len(rows)).to(rows) @ rows / max(1, len(rows)) ** 0.5
    return torch.cat([rows[:: max(1, len(rows) // _PLACES)], whole[None]])


@lru_cache(maxsize=64)
def _signs(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float64).square().cos().sign()


def agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether two lists of outputs agree up to rounding; what is not finite is not compared."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return False
    return all(
        bool((left.double() - right.double()).abs().max() <= TOLERANCE * right.double().abs().max() + 1e-12)
        for left, right in zip(found, expected, strict=True)
        if right.numel() and right.isfinite().all()
    )


def _alike(found: _Reads, expected: _Reads) -> bool:
    """Whether two products read the same up to rounding; nothing that is not finite is the same."""
    return [tensor.shape for tensor in found] == [tensor.shape for tensor in expected] and all(
        bool((left - right).abs().max() <= TOLERANCE * right.abs().max())
        for left, right in zip(found, expected, strict=True)
        if right.numel()
    )


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor, tuple[_Side, _Side]]]:
    """The parameters that products may be with, [out, in, ...]: name, values, what is written and what is read."""
    for name, module in model.named_modules():
        depthwise = axes.is_depthwise(module)
        if getattr(module, "transposed", False) or not (depthwise or getattr(module, "groups", 1) == 1):
            continue
        for key, weight in module.named_parameters(name, recurse=False):
            if weight.dim() > 1:
                out, inner = weight.shape[:2]
                if depthwise:
                    yield key, weight, (((name, "out"), out), ((name, "out"), out))
                elif axes.is_weighted(module):
                    yield key, weight, (((name, "out"), out), ((name, "in"), inner))
                else:
                    yield key, weight, (((key, "dim:0"), out), ((key, "dim:1"), inner))
