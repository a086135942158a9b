"""Hooks of a network: its own, which are part of what it computes, and those of people who watch it."""

import copy
import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

_FORWARD = ("_forward_hooks", "_forward_pre_hooks")
_TABLES = (*_FORWARD, "_backward_hooks", "_backward_pre_hooks")
_LIBRARIES = ("torch.nn.utils", "transformers.")
"""Weight norm, spectral norm, masks; the layers whose outputs Hugging Face's networks hand on."""


class OwnHooks:
    """Tells the hooks that belong to a network from those that somebody else put on it.

    A hook is the network's own if it comes from a library whose layers do not compute without it; if it is a method of
    one of its modules, or of an object that one of them holds; or if it is a function from the source file of one of
    its classes whose closure holds such a module or object. Whoever else's it is, a hook of the forward pass that
    returns something is part of what the network computes (`changes`).
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._held = {id(module) for module in self._modules}
        for module in self._modules:
            values = (value for key, value in vars(module).items() if key not in TABLES)
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

    def keep(self, table: str, hook: Any) -> bool:
        """Whether the network computes something else without this hook of a table."""
        return hook in self or (table in _FORWARD and changes(hook) is True)

    def copied(self, hook: Callable, memo: dict[int, Any]) -> Callable:
        """The hook for a copy of the network; `memo` is the one of `copy.deepcopy`, with all modules."""
        if hook not in self and not inspect.isfunction(hook):
            return hook  # whoever holds it would be copied too
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


TABLES = frozenset(vars(nn.Module()))
"""What every module holds: its flag, and tables of parts, tensors and hooks."""
_PLAIN = (bool, int, float, str, bytes, tuple, frozenset, type, type(None))
_SHARED = (*_PLAIN, types.FunctionType, types.BuiltinFunctionType)
"""Values that may be one object in unrelated places."""


def _closure(hook: types.FunctionType) -> list[Any]:
    """What the cells of a function hold; None for one that is still empty."""
    cells = hook.__closure__ or ()
    return [getattr(cell, "cell_contents", None) for cell in cells]


def changes(hook: Any) -> bool | None:
    """Whether a hook puts something in the place of what it is shown; None where its code does not tell.

    It does if it returns something else than None. A lambda that ends in a call returns whatever that gives.

    >>> changes(torch.nn.functional.relu), changes(print)
    (True, None)
    """
    while isinstance(hook, functools.partial):
        hook = hook.func
    if not inspect.isroutine(hook):
        hook = type(hook).__call__
    code = getattr(inspect.unwrap(hook), "__code__", None)
    if code is None or _is_ours(hook):
        return None
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("PRECALL", "CACHE")]
    last = [step if step.opname == "RETURN_CONST" else steps[at - 1] for at, step in enumerate(steps) if _ends(step)]
    if all(step.argval is None and "CONST" in step.opname for step in last):
        return False
    return None if code.co_name == "<lambda>" and any("CALL" in step.opname for step in last) else True


def _ends(step: dis.Instruction) -> bool:
    return step.opname in ("RETURN_VALUE", "RETURN_CONST")


def answers_otherwise(module: nn.Module) -> bool:
    """Whether hooks put something in the place of what a module itself gives."""
    return any(changes(hook) for hook in module._forward_hooks.values())


def others_hooks(model: nn.Module, changing: bool) -> list[str]:
    """Hooks of the forward pass that are not the network's own, as "module (function)".

    Args:
        model: the network.
        changing: those that change what it computes, which copies run too; else all others, which they do not run.
    """
    hooked = [entry for entry in _hooked(model) if entry[1] in _FORWARD]
    own = OwnHooks(model) if hooked else ()
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}
    return [
        f"{names[module]} ({getattr(hook, '__qualname__', type(hook).__name__)})"
        for module, _, hooks in hooked
        for hook in hooks.values()
        if hook not in own and (changes(hook) is True) is changing and not _is_ours(hook)
    ]


def _is_ours(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("lit_prune.")


def without_hooks(model: nn.Module) -> AbstractContextManager[None]:
    """Takes the hooks of others off every module of `model` and puts them back on exit; its own stay (`OwnHooks`).

    Recorders must not see probe images.
    """
    return _with_only(model, OwnHooks(model) if any(_hooked(model)) else None)


def bare(model: nn.Module) -> AbstractContextManager[None]:
    """Takes all hooks off and puts them back on exit: a copy must not drag a trainer along."""
    return _with_only(model, None)


@contextmanager
def _with_only(model: nn.Module, own: OwnHooks | None) -> Iterator[None]:
    taken = list(_hooked(model))
    for module, table, hooks in taken:
        module.__dict__[table] = type(hooks)(
            (key, hook) for key, hook in hooks.items() if own is not None and own.keep(table, hook)
        )
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
        copies = {key: own.copied(hook, memo) for key, hook in hooks.items() if own.keep(table, hook)}
        getattr(twins[module], table).update(copies)


def _hooked(model: nn.Module) -> Iterator[tuple[nn.Module, str, dict]]:
    """Tables of hooks that are not empty: (module, name of the table, table)."""
    for module in model.modules():
        for table in _TABLES:
            if hooks := vars(module)[table]:
                yield module, table, hooks
