"""Hooks of a network: its own, which are part of what it computes, and those of people who watch it."""

import copy
import functools
import types
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LIBRARIES = ("torch.nn.utils", "transformers.")
"""Weight norm, spectral norm, masks; the layers whose outputs Hugging Face's networks hand on."""


class OwnHooks:
    """Tells the hooks that belong to a network from those that somebody else put on it.

    A hook is the network's own if it comes from a library whose layers do not compute without it; if it is a method of
    one of its modules, or of an object that one of them holds; or if it is a function from the source file of one of
    its classes whose closure holds such a module or object.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._held = {id(module) for module in self._modules}
        for module in self._modules:
            values = (value for key, value in vars(module).items() if key not in _EMPTY)
            self._held |= {id(value) for value in values if not isinstance(value, (*_SHARED, Tensor))}
        self._sources = {type(module).__module__ for module in self._modules}

    def __contains__(self, hook: Any) -> bool:
        """Whether the network does not compute without it."""
        if isinstance(hook, functools.partial):
            held = any(id(value) in self._held for value in (*hook.args, *hook.keywords.values()))
            return held or hook.func in self
        source = getattr(hook, "__module__", None) or ""
        if source.startswith(_LIBRARIES):
            return True
        if isinstance(hook, types.MethodType):
            return id(hook.__self__) in self._held
        if isinstance(hook, types.FunctionType):
            return source in self._sources and any(id(value) in self._held for value in _closure(hook))
        return id(hook) in self._held

    def copied(self, hook: Callable, memo: dict[int, Any]) -> Callable:
        """The hook for a copy of the network; `memo` is the one of `copy.deepcopy`, with all modules."""
        if isinstance(hook, functools.partial):
            args, keywords = copy.deepcopy((hook.args, hook.keywords), memo)
            return functools.partial(self.copied(hook.func, memo), *args, **keywords)
        if not isinstance(hook, types.FunctionType) or not hook.__closure__:
            return copy.deepcopy(hook, memo)
        cells = tuple(
            types.CellType(copy.deepcopy(value, memo)) if id(value) in self._held else cell
            for cell, value in zip(hook.__closure__, _closure(hook), strict=True)
        )
        twin = types.FunctionType(hook.__code__, hook.__globals__, hook.__name__, hook.__defaults__, cells)
        twin.__kwdefaults__ = hook.__kwdefaults__
        return twin


_EMPTY = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, str, bytes, tuple, frozenset, type, type(None))
_SHARED = (*_PLAIN, types.FunctionType, types.BuiltinFunctionType)
"""Values that may be one object in unrelated places."""


def _closure(hook: types.FunctionType) -> list[Any]:
    """What the cells of a function hold; None for one that is still empty."""
    cells = hook.__closure__ or ()
    return [getattr(cell, "cell_contents", None) for cell in cells]


def without_hooks(model: nn.Module) -> AbstractContextManager[None]:
    """Takes the hooks of others off every module of `model` and puts them back on exit; its own stay (`OwnHooks`).

    Recorders must not see probe images.
    """
    return _with_only(model, OwnHooks(model) if any(_hooked(model)) else ())


def bare(model: nn.Module) -> AbstractContextManager[None]:
    """Takes all hooks off and puts them back on exit: a copy must not drag a trainer along."""
    return _with_only(model, ())


@contextmanager
def _with_only(model: nn.Module, kept: Container[Any]) -> Iterator[None]:
    taken = list(_hooked(model))
    for module, table, hooks in taken:
        module.__dict__[table] = type(hooks)((key, hook) for key, hook in hooks.items() if hook in kept)
    try:
        yield
    finally:
        for module, table, hooks in taken:
            module.__dict__[table] = hooks


def copy_hooks(model: nn.Module, twin: nn.Module, memo: dict[int, Any]) -> None:
    """Gives a copy of `model` without hooks the copies of the network's own ones."""
    hooked = list(_hooked(model))
    if not hooked:
        return
    own = OwnHooks(model)
    twins = dict(zip(model.modules(), twin.modules(), strict=True))
    for module, table, hooks in hooked:
        copies = {key: own.copied(hook, memo) for key, hook in hooks.items() if hook in own}
        getattr(twins[module], table).update(copies)


def _hooked(model: nn.Module) -> Iterator[tuple[nn.Module, str, dict]]:
    """Tables of hooks that are not empty: (module, name of the table, table)."""
    for module in model.modules():
        for table in _TABLES:
            if hooks := vars(module)[table]:
                yield module, table, hooks
