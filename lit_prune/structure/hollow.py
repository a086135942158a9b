"""Passes that are run for their shapes: products of what depends on the input answer anything, all else is computed.

Which channels go together, what a pass costs and whether a copy runs at all does not hang on the values of the
products, which take most of the time. Where it does (a number read off a tensor, boxes that are chosen by their scores)
the pass is run again with all values. What does not depend on the input is computed in any case: a network may keep it.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_prune.structure import operations

Found = TypeVar("Found")
_NOTE = "_lit_prune_note"


class _Form(NamedTuple):
    """All of a tensor but its values and where they are."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


class NeedsValues(Exception):
    """What happens next hangs on the value of a product that was not computed."""


def for_shapes(run: Callable[[bool], Found]) -> Found:
    """What a pass finds, run hollow (True) and, if that does not come to its end, with all values (False)."""
    try:
        return run(True)
    except Exception:  # whatever a network raises that meets strange values
        return run(False)


class Hollow(TorchDispatchMode):
    """Runs operations, products with other values than they have.

    Which memory depends on the input, and on such values, is noted on the memory itself: views share it, and it ends
    with it.

    Attributes:
        skips: whether products are skipped from here on.
    """

    def __init__(self, inputs: Iterable[Tensor], skips: bool = True, noise: bool = False) -> None:
        """For one pass.

        Args:
            inputs: what the network is called with.
            skips: whether products are skipped.
            noise: their values are noise in -1..1 instead of ones, where gradients are to tell values apart.
        """
        super().__init__()
        self.skips = skips
        self._noise = torch.empty(0) if noise else None
        for tensor in inputs:
            self._note(tensor, hollow=False)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """As `answer`."""
        return self.answer(function, args, kwargs or {})

    def depends(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the input."""
        return self._noted(tensor) is not None

    def answer(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """The output of an operation of torch.

        Raises:
            NeedsValues: it is decided by values that are not computed.
        """
        notes = [note for leaf in _tensors((*args, *kwargs.values())) if (note := self._noted(leaf)) is not None]
        if not notes:
            return function(*args, **kwargs)
        hollow = any(notes)
        if self.skips and operations.is_shaped(function, args):
            output, hollow = self._shaped(function, args), True
        else:
            output = function(*args, **kwargs)
            if hollow and operations.reads_values(function, output):
                raise NeedsValues
        for leaf in _tensors(output if isinstance(output, (list, tuple)) else (output,)):
            self._note(leaf, hollow)
        return output

    def _shaped(self, function: Any, args: tuple) -> Any:
        """Any values in the shape and strides of a product."""
        device = next(_tensors(args)).device
        function, args = operations.without_addition(function, args)
        forms, several = _shapes(function, tuple(map(_form, args)))
        found = [self._values(form, device) for form in forms]
        return tuple(found) if several else found[0]

    def _values(self, form: _Form, device: torch.device) -> Tensor:
        """A tensor of a form."""
        values = torch.empty_strided(form.shape, form.strides, dtype=form.dtype, device=device)
        if self._noise is None:
            return values.fill_(1)
        if len(self._noise) < values.numel():
            generator = torch.Generator().manual_seed(0)
            self._noise = torch.empty(values.numel()).uniform_(-1, 1, generator=generator)
        return values.copy_(self._noise[: values.numel()].view(values.shape))

    def _noted(self, tensor: Tensor) -> bool | None:
        """Whether it depends on skipped products; None where it does not depend on the input."""
        note = getattr(_memory(tensor), _NOTE, None)
        return note[1] if note is not None and note[0] is self else None

    def _note(self, tensor: Tensor, hollow: bool) -> None:
        memory = _memory(tensor)
        if memory is None and hollow:
            raise NeedsValues
        if memory is not None:
            setattr(memory, _NOTE, (self, hollow or bool(self._noted(tensor))))


def _form(value: Any) -> Any:
    """The form of a tensor; anything else itself, lists as tuples."""
    if isinstance(value, Tensor):
        return _Form(value.shape, value.stride(), value.dtype)
    return tuple(value) if isinstance(value, list) else value


@lru_cache(maxsize=4096)
def _shapes(function: Any, args: tuple) -> tuple[list[_Form], bool]:
    """The forms that a product answers, whose arguments are forms, and whether these are several; layers are alike."""
    given = (torch.empty_strided(*a[:2], dtype=a.dtype, device="meta") if isinstance(a, _Form) else a for a in args)
    shaped = function(*given)
    return [_form(t) for t in (shaped if isinstance(shaped, tuple) else (shaped,))], isinstance(shaped, tuple)


def _memory(tensor: Tensor) -> torch.UntypedStorage | None:
    """Where the values lie; None for a layout without one place for them."""
    return tensor.untyped_storage() if tensor.layout == torch.strided and not tensor.is_nested else None


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments or outputs of an operation, of which some are lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
