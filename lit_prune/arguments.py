"""Arguments of public functions, compared with their annotations before anything is done with them."""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from lit_prune.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which refuses an argument of another kind than its annotation in one line.

    Looks at the outermost kind alone: a network, a plan, a number, text, something to loop over. Whatever an annotation
    says beyond that is left to the function.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        hints = _hints(function)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in hints and not _fits(value, hints[name]):
                raise InputError(f"{function.__name__}: {name} is {_short(value)}; give {_wanted(hints[name])}")
        return function(*args, **kwargs)

    return call


@functools.cache
def _hints(function: Callable) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError:  # a name that only type checkers import
        return {}


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(hint))
    if hint is None or hint is type(None):
        return value is None
    kind = origin or hint
    if kind in (int, float):
        whole = (kind is int and isinstance(value, int)) or (kind is float and isinstance(value, int | float))
        return not isinstance(value, bool) and (whole or _is_number(value, kind))
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


def _is_number(value: Any, kind: type) -> bool:
    """Whether it is a number of another library, such as numpy's."""
    return hasattr(value, "__index__") or (kind is float and hasattr(value, "__float__"))


def _short(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _wanted(hint: Any) -> str:
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    names = [getattr(typing.get_origin(choice) or choice, "__name__", str(choice)) for choice in choices]
    return " or ".join("None" if name == "NoneType" else name for name in dict.fromkeys(names))
