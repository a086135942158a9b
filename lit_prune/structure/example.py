"""What a network is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lit_prune.errors import InputError


@dataclass(frozen=True)
class Example:
    """Arguments of one call of a network: `model(*args, **kwargs)`."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, lists and dictionaries looked into."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def shapes(self) -> str:
        """Shapes of the tensors, for messages."""
        return ", ".join(str(list(tensor.shape)) for tensor in self.tensors) or "no tensor"

    def map(self, function: Callable[[Tensor], Tensor]) -> Example:
        """The same arguments with `function` applied to each tensor."""
        args, kwargs = tree_map(
            lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)
        )
        return Example(args, kwargs)


def as_example(example_input: Any) -> Example:
    """The arguments of a call: a tensor or list is the only one, a tuple those by position, a dictionary those by name.

    Raises:
        InputError: something else, or without a tensor that has a batch dimension.
    """
    if isinstance(example_input, Example):
        example = example_input
    elif isinstance(example_input, tuple):
        example = Example(example_input)
    elif isinstance(example_input, Mapping):
        example = Example((), dict(example_input))
    else:
        example = Example((example_input,))
    if not any(tensor.dim() >= 2 and len(tensor) for tensor in example.tensors):
        got = example.shapes if example.tensors else type(example_input).__name__
        raise InputError(f"example_input is {got}; give a tensor with a batch dimension, such as [1, 3, 32, 32]")
    return example


def first_sample(example: Example) -> Example:
    """The first of the samples that every argument holds: tensors along their first dimension, lists one by one.

    Tuples of images [C, H, W] and of dicts, as detectors get them from `tuple(zip(*samples))`, count as lists.
    """
    values = [*example.args, *example.kwargs.values()]
    sizes = [len(value) for value in values if _listed(value) or (isinstance(value, Tensor) and value.dim() >= 2)]
    size = sizes[0] if sizes else 0

    def take(value: Any) -> Any:
        batched = _listed(value) or (isinstance(value, Tensor) and value.dim() >= 1)
        return value[:1] if batched and len(value) == size else value

    return Example(tuple(map(take, example.args)), {name: take(value) for name, value in example.kwargs.items()})


def cloned(values: Any) -> Any:
    """Nested arguments with copies of their tensors; one that comes several times stays one.

    >>> one = torch.zeros(2)
    >>> first, second = cloned((one, one))
    >>> first is second, first is one
    (True, False)
    """
    copies: dict[int, Tensor] = {}

    def clone(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and id(leaf) not in copies:
            copies[id(leaf)] = leaf.clone()
        return copies.get(id(leaf), leaf)

    return tree_map(clone, values)


def pair_of(example: Example) -> Example:
    """Every tensor twice along its first dimension: what a training pass needs where a norm sees one place."""
    return example.map(lambda tensor: torch.cat([tensor, tensor.flip(0)]))


def _listed(value: Any) -> bool:
    """Whether a value holds one entry a sample."""
    if not isinstance(value, tuple) or not value:
        return isinstance(value, list)
    images = all(isinstance(entry, Tensor) and entry.dim() == 3 and len(entry) <= 4 for entry in value)
    return images or all(isinstance(entry, Mapping) for entry in value)
