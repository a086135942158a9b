"""What an attention has for each of its heads and for each position within them, by name.

What was read off one is said of the next that is built alike, and the trial of each confirms it.
"""

from dataclasses import dataclass, replace

from torch import nn

from lit_prune.structure.attention_slices import Slices
from lit_prune.structure.coupling import common_scope

_PLAIN = frozenset({bool, int, float, str})


@dataclass(frozen=True)
class Inner:
    """A width of the heads: position by position, the same in every head.

    Attributes:
        size: positions in a head.
        slices: what serves one position alone, in all heads.
        columns: position by position, the input channels of the layer that reads the heads; none for queries and keys.
    """

    size: int
    slices: tuple[Slices, ...] = ()
    columns: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        name: qualified name of the module in whose forward it happens.
        heads: their number.
        reader: name of the weight of the layer that reads the heads.
        columns: head by head, the input channels of that layer.
        slices: what serves one head alone, without the reader.
        reason: "" or why heads cannot be taken from it.
        values: the width of the values.
        pairs: the width of queries and keys.
    """

    name: str
    heads: int
    reader: str = ""
    columns: tuple[tuple[int, ...], ...] = ()
    slices: tuple[Slices, ...] = ()
    reason: str = ""
    values: Inner = Inner(0)
    pairs: Inner = Inner(0)


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
    tensors = (attention.reader, *(part.name for part in parts))
    return common_scope([attention.name, *(name.rpartition(".")[0] for name in tensors)])


def _form(model: nn.Module, scope: str) -> list[tuple]:
    """What tells modules apart that are built in different ways."""
    whole = model.get_submodule(scope)
    plain = [
        (name, type(module), sorted((key, value) for key, value in vars(module).items() if type(value) in _PLAIN))
        for name, module in whole.named_modules()
    ]
    return plain + [(name, tensor.shape) for name, tensor in (*whole.named_parameters(), *whole.named_buffers())]
