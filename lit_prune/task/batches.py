"""Where a batch keeps what the network reads and what its answer is compared with."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from lit_prune.errors import InputError

INPUT_KEYS = ("image", "images", "input", "inputs", "x")  # given to the network as its first argument
KEYWORDS = (  # given to the network by name, as Hugging Face's models want it
    "pixel_values",
    "pixel_mask",
    "bool_masked_pos",
    "input_values",
    "input_features",
    "input_ids",
    "attention_mask",
    "token_type_ids",
)
TARGET_KEYS = ("label", "labels", "target", "targets", "mask", "y")


@dataclass(frozen=True)
class Layout:
    """How a batch is read.

    Attributes:
        inputs: keys of what is given by position; () stands for the batch itself.
        keywords: keys of what is given by name.
        target: key of the target, or None.
        listed: the one input is a list of images of any sizes.
    """

    inputs: tuple[Any, ...] | None = ()
    keywords: tuple[str, ...] = ()
    target: Any = None
    listed: bool = False

    def arguments(self, batch: Any) -> tuple[tuple, dict[str, Any]]:
        """Positional and named arguments of the network."""
        values = batch if (fields := fields_of(batch)) is None else fields
        found = [batch] if self.inputs == () and not self.keywords else [values[key] for key in self.inputs or ()]
        several = len(found) == 1 and isinstance(found[0], tuple | list) and not self.listed
        return tuple(found[0]) if several else tuple(found), {key: values[key] for key in self.keywords}

    def target_of(self, batch: Any) -> Any:
        """The target, or None."""
        values = batch if (fields := fields_of(batch)) is None else fields
        return None if self.target is None else values[self.target]


def forward_parameters(model: nn.Module) -> dict[str, bool]:
    """Names that a network can be called with, in order, and whether each must be given."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default is inspect.Parameter.empty for p in found if p.kind in named}


def find_layout(batch: Any, parameters: Mapping[str, bool] = {}) -> Layout:
    """The layout of a batch of a usual kind.

    x; (x, y); (x, y, ...); ((x1, x2), y); (x1, x2, y) where the network needs two arguments; dicts whose keys are the
    network's parameters, or with `INPUT_KEYS` or `KEYWORDS`, and with `TARGET_KEYS`; dataclasses, and objects that hold
    tensors, as dicts of their fields; a list of images [C, H, W], alone or with a list of targets.

    Args:
        batch: the batch.
        parameters: of the network's forward, see `forward_parameters`; none where they are not known.

    Raises:
        InputError: none of these; the line says what was found.
    """
    if isinstance(batch, Tensor):
        return Layout()
    if isinstance(batch, Mapping):
        return _mapping_layout(batch, batch, parameters)
    if (fields := fields_of(batch)) is not None:
        return _mapping_layout(fields, batch, parameters)
    if isinstance(batch, list | tuple) and batch:
        if are_images(batch):
            return Layout(listed=True)
        first, rest = batch[0], batch[1:]
        needed = sum(parameters.values())
        if 1 < needed <= len(batch) and _are_tensors(batch[:needed]):
            return Layout(tuple(range(needed)), target=needed if len(batch) > needed else None)
        if isinstance(first, Tensor) or (isinstance(first, tuple | list) and first and _are_tensors(first)):
            listed = are_images(first) and (not rest or isinstance(rest[0], list | tuple))
            return Layout((0,), target=1 if rest and rest[0] is not None else None, listed=listed)
    raise InputError(f"batches: a batch is {describe(batch)}, which is not recognised; {HOW_TO_GIVE}")


def is_listed(batch: Any, parameters: Mapping[str, bool] = {}) -> bool:
    """Whether the images of a batch are a list; no for a batch that is not recognised."""
    try:
        return find_layout(batch, parameters).listed
    except InputError:
        return False


HOW_TO_GIVE = (
    "give task=, for instance task=Custom(run=lambda model, batch: model(batch['a'], batch['b']), loss=lambda output, "
    "batch: ...) of lit_prune.task"
)


def fields_of(value: Any) -> dict[str, Any] | None:
    """Fields of a dataclass, or the attributes of another object (of attrs, say) that holds tensors in some; else None.

    >>> fields_of(Layout((0,)))["inputs"], fields_of("text")
    ((0,), None)
    """
    if isinstance(value, type | Tensor | nn.Module | Mapping | list | tuple):
        return None
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    slots = (slot for kind in type(value).__mro__ for slot in _tuple(vars(kind).get("__slots__", ())))
    slots = (slot for slot in slots if not slot.startswith("__"))  # __weakref__, __dict__
    held = {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)} | getattr(value, "__dict__", {})
    return held if any(isinstance(item, Tensor) for item in held.values()) else None


def _tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _mapping_layout(batch: Mapping, shown: Any, parameters: Mapping[str, bool]) -> Layout:
    """The first argument by position, under whatever usual key, others by the network's own names for them.

    Names of targets are inputs only where the network needs them.
    """
    given = [key for key, needed in parameters.items() if key in batch and (needed or key not in TARGET_KEYS)]
    target = next((key for key in TARGET_KEYS if key in batch and key not in given and batch[key] is not None), None)
    keywords = tuple(key for key in KEYWORDS if key in batch)
    if keywords:
        return Layout(None, tuple(dict.fromkeys((*keywords, *given))), target)
    own = [key for key in list(parameters)[:1] if key in given]
    first = next((key for key in (*own, *INPUT_KEYS) if key in batch), None)
    if first is None:
        wanted = ", ".join((*INPUT_KEYS, *KEYWORDS[:1]))
        raise InputError(f"batches: a batch is {describe(shown)}, with none of the keys {wanted}; {HOW_TO_GIVE}")
    rest = tuple(key for key in given if key != first)
    return Layout((first,), rest, target, listed=are_images(batch[first]))


def _are_tensors(values: Any) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def are_images(values: Any) -> bool:
    """Whether this is a list of single images, [C, H, W] with at most four channels each."""
    if not isinstance(values, list | tuple) or not values or not _are_tensors(values):
        return False
    return all(value.ndim == 3 and value.shape[0] <= 4 and value.is_floating_point() for value in values)


def is_one_hot(target: Any, classes: int | None = None) -> bool:
    """Whether a target [B, K, ...] says one class at every place: 0 and 1, with exactly one 1 along its second axis.

    >>> is_one_hot(torch.eye(3)), is_one_hot(torch.ones(2, 3))
    (True, False)
    """
    several = isinstance(target, Tensor) and target.ndim > 1 and target.shape[1] > 1
    if not several or classes not in (None, target.shape[1]):
        return False
    return bool(((target == 0) | (target == 1)).all() and (target.sum(1) == 1).all())


def describe(value: Any, depth: int = 2) -> str:
    """What a batch or an output is made of, on one line."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key}: {describe(item, depth - 1)}" for key, item in list(value.items())[:6])
        return f"{type(value).__name__} of {{{inner}}}" if depth else type(value).__name__
    if isinstance(value, list | tuple):
        inner = ", ".join(describe(item, depth - 1) for item in value[:4])
        more = ", ..." if len(value) > 4 else ""
        return f"{type(value).__name__} of ({inner}{more})" if depth else f"{type(value).__name__} of {len(value)}"
    if depth and (held := fields_of(value)):
        return f"{type(value).__name__} of {describe(held, depth).removeprefix('dict of ')}"
    return type(value).__name__


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same containers (dicts, lists, tuples, named tuples, `fields_of`) with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, change) for item in value)
    return _with_fields(value, lambda item: map_tensors(item, change))


def _with_fields(value: Any, change: Callable[[Any], Any]) -> Any:
    """An object with every one of its `fields_of` changed; anything else as it is."""
    held = fields_of(value)
    if held is None:
        return value
    twin = copy.copy(value)
    for name, item in held.items():
        object.__setattr__(twin, name, change(item))  # of frozen ones too
    return twin


def to_network(batch: Any, model: nn.Module) -> Any:
    """The batch on the device of the model's first parameter, floating-point values in that parameter's precision."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return batch

    on_its_way = parameter.device.type != "cpu"  # a copy to the CPU would be read before it is there

    def change(value: Tensor) -> Tensor:
        dtype = parameter.dtype if value.is_floating_point() else None
        return value.to(parameter.device, dtype, non_blocking=on_its_way)

    if hasattr(batch, "to") and not isinstance(batch, Tensor | Mapping):
        return batch.to(parameter.device)  # a batch of a class of its own
    return map_tensors(batch, change)


def size_of(arguments: tuple[tuple, dict[str, Any]]) -> int:
    """Number of samples in the network's arguments."""
    values = (*arguments[0], *arguments[1].values())
    inner = [value for value in values if isinstance(value, Mapping)]  # a network that is given the batch as it is
    values = (*values, *(value for holder in inner for value in holder.values()))
    first = next((value for value in values if isinstance(value, Tensor | list | tuple)), None)
    if first is None or (isinstance(first, Tensor) and not first.ndim):
        raise InputError(f"batches: the network reads {describe(values)}, in which samples cannot be counted")
    return len(first)


def slice_batch(batch: Any, samples: slice, size: int, listed: bool) -> Any:
    """The samples of a batch of `size`: tensors and lists with one entry a sample are cut, all else stays.

    Args:
        batch: the batch.
        samples: which ones.
        size: samples in the batch.
        listed: the images are a list, so lists as long as the batch hold one entry a sample.
    """
    if isinstance(batch, Tensor):
        return batch[samples] if batch.ndim and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: slice_batch(item, samples, size, listed) for key, item in batch.items()}
    if isinstance(batch, list | tuple):
        if len(batch) == size and (are_images(batch) if listed else not _holds_tensors(batch)):
            return type(batch)(batch[samples])
        if listed and len(batch) == size and isinstance(batch[0], Mapping):
            return type(batch)(batch[samples])
        cut = [slice_batch(item, samples, size, listed) for item in batch]
        return type(batch)(*cut) if hasattr(batch, "_fields") else type(batch)(cut)
    return _with_fields(batch, lambda item: slice_batch(item, samples, size, listed))


def _holds_tensors(values: Sequence) -> bool:
    return any(isinstance(value, Tensor | Mapping | list | tuple) for value in values)
