"""What there is: the verbs of the command line, and the names that options take."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from textwrap import shorten
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lit_prune.errors import InputError, did_you_mean
from lit_prune.progress import terminal

USAGE = """usage: lit-prune VERB [-c RECIPE ...] [--option value ...]

Train a vision network, watch its channels, prune it in stages, repair it, hand over a smaller dense one.
"""
LIGHTNING = {
    "fit": "Trains; callbacks trace, prune and repair on the way. The same command resumes.",
    "validate": "The validation figures of a run's last checkpoint.",
    "test": "The test figures of a run's last checkpoint.",
    "predict": "Lightning's predictions; with --compact DIR the classes of image files: predict --compact DIR a.jpg",
}
OURS = ("compress", "analyze", "sensitivity", "lesion", "sweep", "reduce")
KINDS = {
    "delete": "nothing",
    "constant": "their means, folded into the readers",
    "affine": "affine combinations of kept inputs, folded into the readers",
    "refit": "the readers solved again, layer after layer, against the dense network's outputs",
}
ALLOCATIONS = {
    "global": "one threshold over all groups",
    "uniform": "the same share of every group",
    "layerwise": "a share for each group from its own scores",
    "measured": "widths by what they do to the prediction",
}


def first_sentence(function: Any) -> str:
    """First line of a docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def verb_list(functions: Mapping[str, Callable[..., Any]]) -> str:
    """Text of `lit-prune --help`: every verb with a line, Lightning's own and ours in one list.

    Args:
        functions: the verbs that are a function each.
    """
    from lit_prune.cli.trainer import Trainer

    ours = {verb: first_sentence(getattr(Trainer, verb)) for verb in OURS}
    said = LIGHTNING | ours | {name: first_sentence(function) for name, function in functions.items()}
    lines = [f"  {verb:11} {shorten(text, 108, placeholder=' ...')}" for verb, text in said.items()]
    ends = "\n\nEvery verb has --help. `lit-prune choices` lists scores, budgets, stand-ins; `recipes` what -c takes."
    return USAGE + "\nverbs:\n" + "\n".join(lines) + ends


def choices(of: list[str] = []) -> None:  # noqa: B006
    """Lists the names that options take: scores, budgets, allocations, stand-ins, tasks, backbones.

    Args:
        of: which of these; default: all.
    """
    tables = {
        "scores": scores,
        "budgets": _budgets,
        "allocations": lambda: _named(ALLOCATIONS.items()),
        "stand-ins": lambda: _named(KINDS.items()),
        "tasks": _tasks,
        "backbones": _backbones,
    }
    for name in of:
        if name not in tables:
            raise InputError(f"of: {name!r} is none of {', '.join(tables)}; {did_you_mean(name, tables)}")
    for name in of or tables:
        table = tables[name]()
        table.title, table.title_justify = name, "left"
        terminal().print(table)


def scores() -> Table:
    """Every score with its axis, what it costs, its parameters, and what it is."""
    from lit_prune.scores import SCORES

    table = Table("score", "axis", "reads", "defaults", "ranks by", box=SIMPLE_HEAD, pad_edge=False)
    for name, entry in SCORES.items():
        defaults = ", ".join(
            "share removed" if value is None else str(getattr(value, "name", value)) for value in entry.defaults
        )
        table.add_row(name, entry.axis, entry.cost, defaults, first_sentence(entry.function))
    return table


def _budgets() -> Table:
    from lit_prune.structure.budgets import BUDGETS

    return _named((name, first_sentence(type(quantity))) for name, quantity in BUDGETS.items())


def _tasks() -> Table:
    from lit_prune.task import TASKS

    return _named((name, first_sentence(task)) for name, task in TASKS.items())


def _backbones() -> Table:
    from lit_prune.models import backbone_names

    return _named([("own, torchvision", ", ".join(backbone_names())), ("timm/NAME", "every network of timm")])


def _named(rows: Any) -> Table:
    table = Table("name", "is", box=SIMPLE_HEAD, pad_edge=False)
    for name, text in _pairs(rows):
        table.add_row(name, text)
    return table


def _pairs(rows: Any) -> Iterator[tuple[str, str]]:
    yield from ((str(name), str(text)) for name, text in rows)
