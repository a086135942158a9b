"""Attention layers whose forward states the number of heads through the width of the input, written out again.

Their classes compute the width of a head as `width // heads`, so that a head cannot go without another forward. For
each of them one class is registered here that computes the same function from the same tensors and names, with the
number of heads and the width of a head as two attributes. An instance changes its class in place; nothing else changes.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import nn

from lit_prune.structure.open_attention_copied import open_class
from lit_prune.structure.tracing import copy_network

OPENED: dict[type, Any] = {}
"""Class of an attention layer -> class that computes the same function with heads that can go."""
LIBRARIES = {
    "lit_prune.structure.open_attention": "torch",
    "lit_prune.structure.open_attention_torchvision": "torchvision",
    "lit_prune.structure.open_attention_timm": "timm",
    "lit_prune.structure.open_attention_pyramids": "timm",
    "lit_prune.structure.open_attention_hybrids": "timm",
    "lit_prune.structure.open_attention_hf": "transformers",
}
"""Module that opens layers -> their library; imported, which takes seconds, where the library has been."""


def opens(kind: type) -> Callable[[type], type]:
    """Registers the decorated subclass of `kind` as the one that its instances become."""

    def register(cls: type) -> type:
        OPENED[kind] = cls
        return cls

    return register


def open_classes() -> dict[type, Any]:
    """`OPENED` with the layers of every library that is in use: a network of another one cannot hold them."""
    for module, library in LIBRARIES.items():
        if library in sys.modules:
            getattr(import_module(module), "open_families", lambda: None)()  # whose own modules come one by one
    return OPENED


def class_for(module: nn.Module, known: Mapping[type, Any]) -> Any:
    """The class with explicit heads for a layer: the one registered, that of attention as people copy it, or None."""
    return known.get(type(module)) or open_class(module)


def open_layer(module: nn.Module) -> nn.Module:
    """`module` itself, of the class with explicit heads if there is one for it."""
    cls = class_for(module, open_classes())
    if cls is not None:
        vars(module).update(cls.opened_attributes(module))
        module.__class__ = cls
    return module


def open_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` with open attention layers, or `model` itself where it has none to open; outputs are equal."""
    known = open_classes()
    if not any(class_for(module, known) for module in model.modules()):
        return model
    opened = copy_network(model)
    for module in opened.modules():
        open_layer(module)
    return opened


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Opens the attention layers of `model` and closes them again on exit."""
    known = open_classes()
    found = [(module, type(module), dict(vars(module))) for module in model.modules() if class_for(module, known)]
    try:
        for module, _, _ in found:
            open_layer(module)
        yield
    finally:
        for module, kind, attributes in found:
            module.__class__ = kind
            for name in set(vars(module)) - attributes.keys():
                delattr(module, name)
            vars(module).update({name: value for name, value in attributes.items() if not isinstance(value, dict)})
