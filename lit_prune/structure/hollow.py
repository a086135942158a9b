"""Passes that are run for their shapes: products of what depends on the input answer anything, all else is computed.

Which channels go together, what a pass costs and whether a copy runs at all does not hang on the values of the
products, which take most of the time, nor on what is computed from them value by value. Where it does (a number read
off a tensor, boxes that are chosen by their scores) the pass is run again with all values. What does not depend on the
input is computed in any case: a network may keep it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_prune.running import buffers_kept, replaced
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


def for_shapes(run: Callable[[bool], Found], model: nn.Module | None = None) -> Found:
    """What a pass finds, run hollow (True) and, if that does not come to its end, with all values (False).

    Args:
        run: the pass.
        model: a network that shall keep its buffers, whatever it writes to them.
    """
    try:
        with nullcontext() if model is None else buffers_kept(model):
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

    def __init__(
        self, inputs: Iterable[Tensor], skips: bool = True, fill: Callable[[Tensor], object] | None = None
    ) -> None:
        """For one pass.

        Args:
            inputs: what the network is called with.
            skips: whether products are skipped.
            fill: writes the values of a product; by default none matters, nor what is computed of them one by one.
        """
        super().__init__()
        self.skips, self._fill = skips, fill
        for tensor in inputs:
            self._note(tensor, hollow=False)

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Inside, values are read past torch's operations only where they are computed: by numpy, as lists.

        Raises:
            NeedsValues: they are not.
        """

        def guarded(read: Callable[..., Any]) -> Callable[..., Any]:
            def checked(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                if self._noted(tensor):
                    raise NeedsValues
                return read(tensor, *args, **kwargs)

            return checked

        with replaced(Tensor, numpy=guarded(Tensor.numpy), tolist=guarded(Tensor.tolist)):
            yield

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """As `answer`."""
        return self.answer(function, args, kwargs or {})

    def depends(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the input."""
        return self._noted(tensor) is not None

    def answer(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """The output of an operation of torch. NeedsValues: it is decided by values that are not computed."""
        notes = [note for leaf in _tensors((*args, *kwargs.values())) if (note := self._noted(leaf)) is not None]
        if not notes:
            return function(*args, **kwargs)
        hollow = any(notes)
        if hollow and operations.is_opaque(function):
            raise NeedsValues
        if self.skips and (operations.is_shaped(function, args) or (hollow and self._is_idle(function, args))):
            output, hollow = self._shaped(function, args, kwargs), True
        else:
            output = function(*args, **kwargs)
        if hollow and operations.gives_whole_numbers(function, output):
            raise NeedsValues
        for leaf in _tensors(output if isinstance(output, (list, tuple)) else (output,)):
            self._note(leaf, hollow)
        return output

    def _is_idle(self, function: Any, args: tuple) -> bool:
        """Whether an operation computes, value by value, what nobody asks for.

        Beside tensors that hold no floating-point numbers, plain numbers may change the type of what it gives.
        """
        plain = self._fill is None and operations.is_pointwise_copy(function)
        return plain and all(leaf.is_floating_point() for leaf in _tensors(args))

    def _shaped(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """Any values in the shape and strides of an output."""
        device = next(leaf.device for leaf in _tensors((*args, *kwargs.values())) if self.depends(leaf))
        function, args, kwargs = operations.without_addition(function, args, kwargs)
        named = tuple((key, _form(value)) for key, value in kwargs.items())
        forms, several = _shapes(function, tuple(map(_form, args)), named)
        found = [torch.empty_strided(f.shape, f.strides, dtype=f.dtype, device=device) for f in forms]
        for values in found:
            if self._fill is not None:
                self._fill(values)
            elif values.dtype == torch.bool:
                values.zero_()  # as it lies in memory it may be neither True nor False
            elif not values.is_cpu:
                values.fill_(1)  # a kernel that asserts something of its values ends all work on its device
        return tuple(found) if several else found[0]

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


def ones(values: Tensor) -> None:
    """Values of products that are nothing but finite."""
    values.fill_(1)


class Noise:
    """Values of products from -1 to 1, where gradients are to tell values apart."""

    def __init__(self) -> None:
        self._values = torch.empty(0)

    def __call__(self, values: Tensor) -> None:
        """Writes the same ones for every product of one size."""
        if len(self._values) < values.numel():
            generator = torch.Generator().manual_seed(0)
            self._values = torch.empty(values.numel()).uniform_(-1, 1, generator=generator)
        values.copy_(self._values[: values.numel()].view(values.shape))


def _form(value: Any) -> Any:
    """The form of a tensor; anything else itself, lists as tuples."""
    if isinstance(value, Tensor):
        return _Form(value.shape, value.stride(), value.dtype)
    return tuple(value) if isinstance(value, list) else value


def _empty(value: Any) -> Any:
    """A tensor of a form, without values; anything else itself."""
    if not isinstance(value, _Form):
        return value
    return torch.empty_strided(value.shape, value.strides, dtype=value.dtype, device="meta")


@lru_cache(maxsize=4096)
def _shapes(function: Any, args: tuple, kwargs: tuple) -> tuple[list[_Form], bool]:
    """The forms that an operation answers to forms, and whether these are several; layers are alike."""
    shaped = function(*map(_empty, args), **{key: _empty(value) for key, value in kwargs})
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
