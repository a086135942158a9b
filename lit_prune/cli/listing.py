"""What there is: the verbs of the command line, and the names that options take."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib import import_module
from textwrap import shorten
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lit_prune.errors import InputError, near_names
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
OURS = ("compress", "curve", "analyze", "sensitivity", "lesion", "sweep", "reduce")


def first_sentence(function: Any) -> str:
    """First line of a docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def verb_list(functions: Mapping[str, Callable[..., Any]]) -> str:
    """Text of `lit-prune --help`: every verb with a line, Lightning's own and ours in one list."""
    from lit_prune.cli.trainer import Trainer

    ours = {verb: first_sentence(getattr(Trainer, verb)) for verb in OURS}
    said = LIGHTNING | ours | {name: first_sentence(function) for name, function in functions.items()}
    lines = [f"  {verb:11} {shorten(text, 108, placeholder=' ...')}" for verb, text in said.items()]
    ends = "\n\nEvery verb has --help. `lit-prune choices` lists scores, budgets, stand-ins; `recipes` what -c takes."
    return USAGE + "\nverbs:\n" + "\n".join(lines) + ends


def choices(of: list[str] = []) -> None:  # noqa: B006
    """Lists the names that options take: scores, budgets, stand-ins, tasks, data sets and so on.

    Args:
        of: which of these; default: all.
    """
    tables: dict[str, Callable[[], Table]] = {
        "scores": scores,
        "budgets": partial(_registered, "lit_prune.structure.budgets", "BUDGETS"),
        "allocations": _allocations,
        "stand-ins": partial(_registered, "lit_prune.replace", "STAND_INS"),
        "layers": partial(_registered, "lit_prune.structure.layers", "LAYERS"),
        "families": partial(_registered, "lit_prune.models.families", "FAMILIES"),
        "tasks": partial(_registered, "lit_prune.task", "TASKS"),
        "data": _data,
        "extras": _extras,
        "sections": _sections,
        "backbones": _backbones,
    }
    for name in of:
        if name not in tables:
            raise InputError(f"of: {name!r} is none of {', '.join(tables)} {near_names(name, tables)}".rstrip())
    for name in of or tables:
        table = tables[name]()
        table.title, table.title_justify = name, "left"
        terminal().print(table)


def scores() -> Table:
    """Every score with its axis, what it reads, what it is, and its parameters."""
    from lit_prune.scores import SCORES

    return _named((name, _say_score(entry)) for name, entry in SCORES.items())


def _say_score(entry: Any) -> str:
    said = f" Parameters: {', '.join(parameters(entry))}." if entry.defaults else ""
    return f"{entry.axis}, from {entry.cost}. {first_sentence(entry.function)}{said}"


def parameters(entry: Any) -> list[str]:
    """The values that a score's parameters have unless they are given, in words."""
    return ["share removed" if value is None else str(getattr(value, "name", value)) for value in entry.defaults]


def _allocations() -> Table:
    from lit_prune.structure.ranking import ALLOCATIONS

    return _named(ALLOCATIONS.items())


def _registered(module: str, registry: str) -> Table:
    """The things of a registry, each with its first sentence."""
    return _named((name, first_sentence(thing)) for name, thing in getattr(import_module(module), registry).items())


def _data() -> Table:
    from lit_prune.data import ImageData

    whole = (cls for cls in _below(ImageData) if cls.load_split is not ImageData.load_split)
    return _named((cls.__name__, first_sentence(cls)) for cls in whole)


def _below(cls: type) -> Iterator[Any]:
    """The classes that derive from a class."""
    found: list[type] = cls.__subclasses__()
    for derived in found:
        yield derived
        yield from _below(derived)


def _extras() -> Table:
    from lit_prune.lab.analyze.extras import EXTRAS, extra_names

    return _named((name, first_sentence(EXTRAS[name].build)) for name in extra_names())


def _sections() -> Table:
    from lit_prune.report.sections import sections

    import_module("lit_prune.lab.sections")  # those of the lab register themselves
    return _named((section.key, section.title) for section in sections())


def _backbones() -> Table:
    from lit_prune.models import backbone_names

    return _named([("own, torchvision", ", ".join(backbone_names())), ("timm/NAME", "every network of timm")])


def _named(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)  # 80 columns are enough: a name is never broken
    table.add_column("is")
    for name, text in rows:
        table.add_row(name, text)
    return table
