"""The one exception that means: the input is wrong, and here is the remedy."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input that its giver can mend.

    The message is one line: what is wrong, where, what to do. The command line prints it and exits with 2; every
    other exception is a defect and keeps its traceback.
    """


def near_names(name: str, known: Iterable[str], shown: int = 3) -> str:
    """A question about the names nearest to an unknown one; empty where none is near."""
    near = difflib.get_close_matches(name, list(known), n=shown)
    return f"did you mean {' or '.join(near)}?" if near else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the names nearest to it, or the first few of those there are.

    >>> did_you_mean("magnitud", ["random", "magnitude"])
    'did you mean magnitude?'
    >>> did_you_mean("xyz", ["random", "magnitude"])
    'there are random, magnitude'
    """
    names = list(known)
    if near := near_names(name, names):
        return near
    return f"there are {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "there is none"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class UndefinedLossError(InputError):
    """A sample has no finite loss; whoever goes through the batches knows which batch it is."""
