"""Progress bars around loops: a `Watch` takes what is looped over and a description, and gives the items on."""

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Watch = Callable[[Iterable, str], Iterator]


def unwatched(items: Iterable, description: str) -> Iterator:
    """A watch that shows nothing."""
    return iter(items)


def bars(shown: bool = True) -> Progress:
    """Bars that vanish at the end: description, bar, count, time."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, transient=True, disable=not shown)


def terminal() -> Console:
    """Where tables and lines are printed; what is in brackets or colons is text, such as the name of a folder."""
    return Console(markup=False, emoji=False)


@contextmanager
def progress_bars() -> Iterator[Watch]:
    """A watch that shows each loop as a bar while it lasts."""
    with bars() as progress:

        def watch(items: Iterable, description: str) -> Iterator:
            task = progress.add_task(description, total=operator.length_hint(items, 0) or None)
            try:
                for item in items:
                    yield item
                    progress.advance(task)
            finally:
                progress.remove_task(task)

        yield watch
