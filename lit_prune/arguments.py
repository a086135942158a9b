"""Arguments of public functions and classes, compared with their annotations before anything is done with them."""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from lit_prune.errors import InputError

Public = TypeVar("Public", bound=Callable)
NO_ROW = (str, bytes, Mapping, Tensor, nn.Module)
"""What can be looped over and is no row of things to be taken one by one."""
MOST_AT_ONCE = 1024
"""Threads or processes beyond which systems refuse them, in words of their own or by ending the process."""
AT_ONCE = ("threads", "workers", "num_workers")
"""What options that number them are called."""
WORDS = {
    "Module": "a network",
    "Iterable": "a list",
    "Sequence": "a list",
    "Mapping": "a dict",
    "Callable": "a function",
    "type": "a class",
    "str": "text",
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "NoneType": "None",
}
"""What kinds are called; others by their name."""

WANTED = {"batches": "a list of batches, or a DataLoader"}
"""What arguments are to be that annotations say too little of."""


def checked(public: Public) -> Public:
    """The function or class, which refuses an argument of another kind than its annotation in one line.

    Looks at the outermost kind, a network, a plan, a number, text, a row of things, and at the kinds of what a list or
    a dict holds. Whatever an annotation says beyond that is left to the function.
    """
    if isinstance(public, type):
        public.__init__ = checked_call(public.__init__, public.__name__)  # type: ignore[misc]
        return public
    return typing.cast("Public", checked_call(public, public.__name__))


def check_seeds(*seeds: int) -> None:
    """Raises InputError where a seed is none that every generator takes."""
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise InputError(f"seed={seed} is no seed; give a whole number from 0 to 4294967295")


def check_counts(holder: object, least: Mapping[str, int], said: str = "{name}: {value}") -> None:
    """Looks at attributes that count something; one that is None is left to its default.

    Args:
        holder: whose attributes they are.
        least: name -> the smallest value.
        said: how a line begins.

    Raises:
        InputError: one is smaller, or is of threads or processes and greater than `MOST_AT_ONCE`.
    """
    for name, minimum in least.items():
        value = getattr(holder, name)
        if value is not None and not value >= minimum:
            raise InputError(f"{said.format(name=name, value=value)} is too small; give at least {minimum}")
        if value is not None and name in AT_ONCE:
            check_at_once(said.format(name=name, value=value), value)


def check_at_once(said: str, *counts: int) -> None:
    """Raises InputError, which begins with `said`, where there are more threads or processes than machines have."""
    if max(counts, default=0) > MOST_AT_ONCE:
        raise InputError(f"{said} is more than any machine carries at once; give at most {MOST_AT_ONCE}")


def checked_call(function: Callable, name: str) -> Callable:
    """The function, which refuses as `checked` says and calls itself `name`."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        check_arguments(function, _bound(signature, name, args, kwargs), name)
        return function(*args, **kwargs)

    return call


def _bound(signature: inspect.Signature, name: str, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name. TypeError: Python's own, with the names that there are."""
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        known = ", ".join(argument for argument in signature.parameters if argument != "self")
        raise TypeError(f"{name}: {error}; its arguments are {known}") from None


def check_arguments(function: Callable, arguments: Mapping[str, Any], name: str) -> None:
    """Compares arguments with the annotations of the function that they are of.

    Raises:
        InputError: one is of another kind; the line begins with `name`.
    """
    hints = _hints(function)
    for argument, value in arguments.items():
        if argument in hints and not _fits(value, hints[argument]):
            wanted = WANTED.get(argument) or _wanted(hints[argument])
            raise InputError(f"{name}: {argument} is {_short(value)}; give {wanted}")


@functools.cache
def _hints(function: Callable) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError:  # a name that only type checkers import
        return {}


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in inner)
    if origin is typing.Literal:
        return isinstance(value, str | int) and value in inner
    if hint is None or hint is type(None):
        return value is None
    kind = origin or hint
    if kind in (int, float):
        return _is_number(value, kind)
    if kind is Any or not isinstance(kind, type):
        return True
    if kind in (list, tuple, Sequence, Iterable):
        return _is_row(value, kind) and _holds(value, inner)
    if kind in (dict, Mapping):
        return isinstance(value, Mapping) and all(map(_fits, (*value, *value.values()), _of_each(value, inner)))
    return isinstance(value, kind)


def _is_row(value: Any, kind: type) -> bool:
    """Whether it is a row of things; a list is as good as a tuple."""
    return not isinstance(value, NO_ROW) and isinstance(value, Collection if kind in (list, tuple) else kind)


def _holds(value: Iterable, inner: tuple) -> bool:
    """Whether everything in a list, tuple or set is of the kind; other rows may be gone once they were looked at."""
    kinds = [kind for kind in inner if kind is not Ellipsis]
    if len(kinds) > 1:  # a tuple of fixed length
        return isinstance(value, Sequence) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    return not kinds or not isinstance(value, list | tuple | set | frozenset) or all(_fits(v, kinds[0]) for v in value)


def _of_each(value: Mapping, inner: tuple) -> list:
    """The kinds that the keys and then the values of a dict are to be."""
    return [kind for kind in inner or (Any, Any) for _ in value]


def _is_number(value: Any, kind: type) -> bool:
    """Whether it is a number, also one of another library such as numpy's; NaN is none."""
    if isinstance(value, bool):
        return False
    whole = isinstance(value, int) or hasattr(value, "__index__")
    if kind is int or whole:
        return whole
    return (isinstance(value, float) or hasattr(value, "__float__")) and bool(value == value)


def _short(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    if isinstance(value, str | bytes | int | float) and len(repr(value)) < 40:
        return f"{value!r} ({kind})"
    if isinstance(value, list | tuple | set | frozenset | dict) and value:
        held = {type(item).__name__ for item in (value.values() if isinstance(value, dict) else value)}
        return f"a {kind} of {', '.join(sorted(held)[:3])}"
    return f"a {kind}"


def _wanted(hint: Any) -> str:
    words = list(dict.fromkeys(word for choice in _choices(hint) for word in _words(choice)))
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _choices(hint: Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _words(hint: Any) -> list[str]:
    """What a kind is called; one word for each of a few values."""
    origin, inner = typing.get_origin(hint), [kind for kind in typing.get_args(hint) if kind is not Ellipsis]
    if origin is typing.Literal:
        return [str(choice) for choice in inner]
    name = getattr(origin or hint, "__name__", str(hint))
    word = WORDS.get(name, f"a {name}")
    if name in ("Callable", "type") or not inner or Any in inner[-1:]:
        return [word]
    held = [" or ".join(w for choice in _choices(kind) for w in _words(choice)) for kind in inner]
    if origin in (dict, Mapping):
        return [f"{word} {{{held[0]}: {held[1]}}}"]
    return [f"{word} of {held[0]}" if len(held) == 1 else f"{word} ({', '.join(held)})"]
