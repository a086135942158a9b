"""What rebuilds the structure of a network, kept with the network itself and with its copies."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.preparation import Preparation
from lit_prune.structure.example import Example, as_example, first_sample
from lit_prune.structure.plan import Plan

ATTRIBUTE = "lit_prune_record"
LARGEST_INPUT = 2**28  # values
MOST_WHOLE = 1024  # whole numbers of one tensor that are written down; nobody's images are


@dataclass(frozen=True)
class Record:
    """How a network came about.

    Attributes:
        backbone: name of the builder where `build_network` made it; None for somebody's own network.
        arguments: the builder's arguments.
        plans: applied since it was built, in order.
        inputs: what it is called with, see `describe_inputs`; None where that is not known.
        preparation: how images are prepared for it; None where that is not known.
    """

    backbone: str | None = None
    arguments: dict[str, Any] | None = None
    plans: tuple[Plan, ...] = ()
    inputs: dict[str, Any] | None = None
    preparation: Preparation | None = None

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """Shape of one image where the network is called with images [B, C, H, W] alone."""
        if self.inputs is None or self.inputs["kwargs"]["dict"] or len(self.inputs["args"]) != 1:
            return None
        shape = self.inputs["args"][0].get("shape") or ()
        return tuple(shape[1:]) if len(shape) == 4 else None


def record_of(model: nn.Module) -> Record:
    """The record of a network; an empty one where it has none."""
    return getattr(model, ATTRIBUTE, None) or Record()


def note_record(model: nn.Module, record: Record) -> nn.Module:
    """Leaves the record with the network, which is returned."""
    setattr(model, ATTRIBUTE, record)
    return model


def note_plan(model: nn.Module, before: Record, plan: Plan) -> nn.Module:
    """Leaves with the network the record of the one that `plan` was applied to, and the plan."""
    return note_record(model, replace(before, plans=(*before.plans, plan)))


def note_cut(smaller: nn.Module, model: nn.Module, plan: Plan, called_with: Any) -> nn.Module:
    """Leaves with `smaller`, which `plan` made of `model`, the record of both; returns it.

    What it is called with is noted where that is not known yet and plain values can describe it.
    """
    before = record_of(model)
    if before.inputs is None:
        with suppress(InputError):
            before = replace(before, inputs=describe_inputs(first_sample(as_example(called_with))))
    return note_plan(smaller, before, plan)


def describe_inputs(example: Example) -> dict[str, Any]:
    """The arguments of a network's call as plain values: shapes of tensors, of whole numbers the values or the range.

    Raises:
        InputError: an argument that is neither a tensor, a plain value, nor a list, tuple or dict of these.
    """
    return {"args": [_describe(value) for value in example.args], "kwargs": _describe(example.kwargs)}


def image_inputs(shape: Sequence[int]) -> dict[str, Any]:
    """What a network is called with that reads one input of a shape, such as an image (C, H, W), described."""
    return describe_inputs(Example((torch.zeros(1, *shape),)))


def rebuild_inputs(described: Mapping[str, Any] | None, device: torch.device | str = "cpu") -> Example:
    """Arguments as described; real and complex values are fixed ones in [0, 1), in tensors of up to two axes 0, 1, ...

    Of an image of zeros, layers without biases show nothing of what they do.

    Raises:
        InputError: as `check_inputs`, or a description that is damaged.
    """
    checked = check_inputs(described)
    try:
        kwargs = _rebuild(checked["kwargs"], device)
        return Example(tuple(_rebuild(value, device) for value in checked["args"]), kwargs)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        problem = f"{type(error).__name__} {error}"
        raise InputError(f"inputs: what the network is called with is damaged ({problem}); save it again") from error


def check_inputs(described: Any) -> Mapping[str, Any]:
    """The description of a call; what nothing can be built from is refused.

    Raises:
        InputError: it is missing, or a size is no whole number, below 0 or larger than any network reads.
    """
    if not isinstance(described, Mapping):
        raise InputError("inputs: nothing says what the network is called with, so its plans cannot be carried out")
    if not isinstance(described.get("args"), list) or not isinstance(described.get("kwargs"), Mapping):
        raise InputError("inputs: no args and kwargs as describe_inputs writes them")
    if _largest(described) > LARGEST_INPUT:
        raise InputError("inputs are larger than any network reads")
    return described


def _largest(described: Any) -> int:
    """Values of the largest tensor among described arguments."""
    if isinstance(described, Mapping) and "shape" in described:
        sizes = described["shape"]
        if not isinstance(sizes, list) or any(type(size) is not int or size < 0 for size in sizes):
            raise InputError(f"inputs: the shape {sizes} is none of a tensor")
        return math.prod(sizes)
    inner = described.values() if isinstance(described, Mapping) else described
    if not isinstance(described, Mapping | list):
        return 0
    return max((_largest(value) for value in inner), default=0)


def example_input(example: Example) -> Any:
    """The one tensor that a network is called with where it is called so, else the `Example`."""
    single = len(example.args) == 1 and not example.kwargs and isinstance(example.args[0], Tensor)
    return example.args[0] if single else example


def _describe(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"dtype": dtype, "shape": list(value.shape)} | _whole_values(value)
    if isinstance(value, Mapping):
        return {"dict": {str(key): _describe(item) for key, item in value.items()}}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_describe(item) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"plain": value}
    raise InputError(
        f"network: it is called with a {type(value).__name__}, which cannot be described in plain values; call it with "
        "tensors, numbers, text, or lists, tuples and dicts of these"
    )


def _whole_values(value: Tensor) -> dict[str, Any]:
    """The values of a tensor of whole numbers; of one with many, such as an image, the least and the largest."""
    if value.is_floating_point() or value.is_complex():
        return {}
    if value.numel() <= MOST_WHOLE:
        return {"values": value.flatten().tolist()}
    return {"least": int(value.min()), "most": int(value.max())}


def _rebuild(described: Mapping[str, Any], device: torch.device | str) -> Any:
    if "shape" in described:
        dtype, shape = getattr(torch, str(described["dtype"]), None), described["shape"]
        if not isinstance(dtype, torch.dtype):
            raise InputError(
                f"inputs: {described['dtype']!r} is no type of numbers; the file is damaged, save it again"
            )
        if "values" in described:
            return torch.tensor(described["values"], dtype=dtype, device=device).reshape(shape)
        if "most" in described:
            least, count = int(described["least"]), torch.arange(math.prod(shape), device=device)
            return (count % (int(described["most"]) - least + 1) + least).to(dtype).reshape(shape)
        if len(shape) > 2:
            return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        return torch.arange(math.prod(shape), device=device).to(dtype).reshape(shape)  # boxes have an area
    if "dict" in described:
        return {key: _rebuild(item, device) for key, item in described["dict"].items()}
    for kind in (tuple, list):
        if kind.__name__ in described:
            return kind(_rebuild(item, device) for item in described[kind.__name__])
    return described["plain"]
