"""Progress bars around loops: a `Watch` takes what is looped over and a description, and gives the items on."""

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Watch = Callable[[Iterable, str], Iterator]


@dataclass(frozen=True)
class _Counted:
    """What is looped over, and how many there will be."""

    items: Iterable
    total: int

    def __iter__(self) -> Iterator:
        return iter(self.items)

    def __length_hint__(self) -> int:
        return self.total


def unwatched(items: Iterable, description: str) -> Iterator:
    """A watch that shows nothing."""
    return iter(items)


def bars(shown: bool = True, console: Console | None = None) -> Progress:
    """Bars that vanish at the end: description, bar, count, time."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, transient=True, disable=not shown, console=console)


def terminal() -> Console:
    """Where tables and lines are printed; what is in brackets or colons is text, such as the name of a folder."""
    return Console(markup=False, emoji=False)


@contextmanager
def progress_bars(console: Console | None = None) -> Iterator[Watch]:
    """A watch that shows each loop as a bar while it lasts."""
    with bars(console=console) as progress:

        def watch(items: Iterable, description: str) -> Iterator:
            task = progress.add_task(description, total=operator.length_hint(items, 0) or None)
            try:
                for item in items:
                    yield item
                    progress.advance(task)
            finally:
                progress.remove_task(task)

        yield watch


_WATCH: ContextVar[Watch] = ContextVar("watch", default=unwatched)


def watched(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
    """The items; inside `looking_on` with a bar.

    Args:
        items: what is looped over.
        description: what happens to each.
        total: how many there are, where the items do not know.
    """
    return _WATCH.get()(items if total is None else _Counted(items, total), description)


@contextmanager
def looking_on() -> Iterator[None]:
    """Shows the `watched` loops inside as bars, where somebody looks on: in a terminal or a notebook."""
    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield
        return
    with progress_bars(console) as watch:
        token = _WATCH.set(watch)
        try:
            yield
        finally:
            _WATCH.reset(token)
