"""Attentions that are built alike: what was read off one is said of the next, and the trial of each confirms it."""

from dataclasses import replace

from torch import nn

from lit_prune.structure.attention_parts import Attention, Inner
from lit_prune.structure.attention_slices import Slices

_PLAIN = frozenset({bool, int, float, str})


def moved(model: nn.Module, attention: Attention, owner: str) -> Attention | None:
    """What is known of an attention, with the names of that in the module `owner`; None where that is built otherwise.

    Built alike are modules of the same types, with tensors of the same shapes and the same plain attributes.
    """
    scope = _scope(attention)
    place = attention.name[len(scope) :]
    if attention.reason or not owner.endswith(place):
        return None
    other = owner[: len(owner) - len(place)]
    if not (scope and other) or _form(model, scope) != _form(model, other):
        return None

    def named(name: str) -> str:
        return other + name[len(scope) :]

    def all_named(slices: tuple[Slices, ...]) -> tuple[Slices, ...]:
        return tuple(replace(part, name=named(part.name)) for part in slices)

    def inner(part: Inner) -> Inner:
        return replace(part, slices=all_named(part.slices))

    return replace(
        attention,
        name=owner,
        reader=named(attention.reader),
        slices=all_named(attention.slices),
        values=inner(attention.values),
        pairs=inner(attention.pairs),
    )


def _scope(attention: Attention) -> str:
    """The innermost module that holds all of it."""
    parts = (*attention.slices, *attention.values.slices, *attention.pairs.slices)
    scope = attention.name
    for name in (attention.reader, *(part.name for part in parts)):
        while scope and not name.startswith(f"{scope}."):
            scope = scope.rpartition(".")[0]
    return scope


def _form(model: nn.Module, scope: str) -> list[tuple]:
    """What tells modules apart that are built in different ways."""
    whole = model.get_submodule(scope)
    plain = [
        (name, type(module), sorted((key, value) for key, value in vars(module).items() if type(value) in _PLAIN))
        for name, module in whole.named_modules()
    ]
    return plain + [(name, tensor.shape) for name, tensor in (*whole.named_parameters(), *whole.named_buffers())]
