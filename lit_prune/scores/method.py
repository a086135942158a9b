"""Scores: what an entry of their table is, how one is named and found with its parameters, and `score` itself."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from lit_prune.arguments import checked
from lit_prune.errors import InputError, did_you_mean
from lit_prune.measurement.layers import Batches
from lit_prune.registry import Registry, import_files, imported
from lit_prune.scores.evidence import COLLECTORS, Evidence
from lit_prune.task import Task

Axis = Literal["local", "target", "baseline", "mixed"]
Reads = Literal["weights", "activations", "gradients", "labels"]
SPARSITY = 0.8  # taken for a score that depends on the sparsity where no plan says how much goes
OwnScore = Callable[[Evidence], dict[str, Tensor]]
_Function = TypeVar("_Function", bound=Callable[..., dict[str, Tensor]])
PEERS = {  # names of other tools, without underscores -> the score here
    "l1": "magnitude", "l1norm": "magnitude", "l1normpruner": "magnitude", "weightmagnitude": "magnitude",
    "l2": "group_norm", "l2norm": "group_norm", "l2normpruner": "group_norm", "groupnormimportance": "group_norm",
    "groupmagnitude": "group_norm", "bn": "network_slimming", "bnscale": "network_slimming",
    "bnscaleimportance": "network_slimming", "slim": "network_slimming", "slimpruner": "network_slimming",
    "taylorfo": "taylor", "taylorfoweight": "taylor", "taylorimportance": "taylor", "geometricmedian": "fpgm",
    "gm": "fpgm", "fpgmpruner": "fpgm", "fpgmimportance": "fpgm", "thinet": "reconstruction",
}  # fmt: skip


@dataclass(frozen=True)
class Score:
    """One entry of `SCORES`.

    Attributes:
        function: from `Evidence` (and parameters) to {layer name: float64 [N]}, higher = keep.
        axis: which kind of information it uses; reports group by it.
        cost: the most expensive thing it looks at.
        defaults: values of its parameters, `name(0.5)` overrides them in order. None stands for the share of channels
            that the plan removes, a `Method` for another score.
        needs: what it reads from a pass over the data, names of `evidence.COLLECTORS`; told beforehand, everything is
            collected in one pass. A channel table is made from "sums".
    """

    function: Callable[..., dict[str, Tensor]]
    axis: Axis
    cost: Reads
    defaults: tuple[Any, ...] = ()
    needs: tuple[str, ...] = ()


SCORES: Registry[Score] = Registry("score")


@checked
def register_score(
    axis: Axis,
    cost: Reads = "activations",
    *,
    name: str | None = None,
    defaults: tuple[Any, ...] = (),
    needs: tuple[str, ...] = (),
) -> Callable[[_Function], _Function]:
    """Puts the decorated function among the `SCORES`, under its own name or `name`; the fields of `Score` otherwise.

    Raises:
        InputError: a function that is written elsewhere has the name, or `needs` names what no pass collects.
    """
    unknown = [need for need in needs if need not in (*COLLECTORS, "table")]
    if name is not None and not name.isidentifier():
        raise InputError(f"name: {name!r} cannot be written as a score; use letters, digits and underscores")
    if unknown:
        raise InputError(f"needs: {unknown[0]!r} is unknown: {did_you_mean(unknown[0], (*COLLECTORS, 'table'))}")

    def register(function: _Function) -> _Function:
        SCORES.add(function.__name__ if name is None else name, Score(function, axis, cost, defaults, needs), function)
        return function

    return register


class Method(NamedTuple):
    """A score with the values of its parameters.

    Attributes:
        score: the entry of the table.
        parameters: numbers, words, other methods, or None for a sparsity that is not known yet.
    """

    score: Score
    parameters: tuple[Any, ...] = ()

    def at(self, sparsity: float) -> Method:
        """The method with the share of channels removed filled in."""
        filled = (
            sparsity if value is None else value.at(sparsity) if isinstance(value, Method) else value
            for value in self.parameters
        )
        return Method(self.score, tuple(filled))

    @property
    def name(self) -> str:
        """How the score is found again, without its parameters: its key in `SCORES`, or where its function lies."""
        known = (key for key, entry in SCORES.items() if entry is self.score)
        return next(known, f"{self.score.function.__module__}:{self.score.function.__qualname__}")

    @property
    def needs(self) -> tuple[str, ...]:
        """What the score and the methods among its parameters read from a pass."""
        inner = (need for value in self.parameters if isinstance(value, Method) for need in value.needs)
        return (*self.score.needs, *inner)

    def ranks(self, evidence: Evidence) -> dict[str, Tensor]:
        """Scores by layer, each finite float64 [N]; dead and undefined channels one below the lowest of the others."""
        evidence.gather((*self.needs, *(("sums",) if evidence.needs_sums else ())))
        values = evidence.once(self.score.function, *self.parameters)
        dead = evidence.dead()
        return {layer: dead_last(scores, dead.get(layer)) for layer, scores in values.items()}


def dead_last(values: Tensor, dead: Tensor | None) -> Tensor:
    """The scores with dead and undefined channels one below the lowest of the others."""
    last = ~values.isfinite()
    if dead is not None:
        last = last | dead
    lowest = values[~last].min() - 1 if not last.all() else values.new_zeros(())
    return torch.where(last, lowest, values)


def parse_method(name: str, known: Mapping[str, Score]) -> Method:
    """The method of a name.

    >>> from lit_prune.scores import SCORES
    >>> parse_method("ix_minus_redundancy(0.25)", SCORES).parameters
    (0.25,)

    Args:
        name: a key of `known`, with parameters in parentheses where it has them; those not given take their defaults.
        known: the table of scores.

    Raises:
        InputError: unknown name (near matches are listed), too many parameters, or one of the wrong kind.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", name, re.DOTALL)
    plain = match[1] if match else name
    if plain not in known:
        here = PEERS.get(plain.lower().replace("_", ""))
        hint = f"other tools' {plain} is {here} here" if here else did_you_mean(plain, known)
        raise InputError(f"score: {name!r} is unknown; {hint} (`lit-prune choices` lists them)")
    entry = known[plain]
    given = _arguments(match[2]) if match and match[2] is not None else []
    if len(given) > len(entry.defaults):
        names = list(inspect.signature(entry.function).parameters)[1:]
        raise InputError(f"score: {name!r} has too many parameters; {plain} takes ({', '.join(names)})")
    values = [_value(text, default, plain, known) for text, default in zip(given, entry.defaults, strict=False)]
    return Method(entry, (*values, *entry.defaults[len(given) :]))


def _arguments(text: str) -> list[str]:
    """The text between the outermost parentheses, cut at the commas that no inner parentheses hold."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _value(text: str, default: Any, plain: str, known: Mapping[str, Score]) -> Any:
    """An argument as what its default is: a method, a word or a number."""
    if isinstance(default, Method):
        return parse_method(text, known)
    if isinstance(default, str):
        return text.strip()
    with suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise InputError(f"score: {plain} has the parameter {text!r} that is not a number; write {plain}(0.5)")


@checked
def score(
    model: nn.Module,
    name: str | OwnScore,
    batches: Batches | None = None,
    table: pd.DataFrame | None = None,
    seed: int = 0,
    *,
    task: Task | str | None = None,
) -> dict[str, Tensor]:
    """Scores of the channels of every Conv2d and Linear layer; higher = keep.

    Dead channels (constant output, told from `table`, else from `batches`) get the lowest finite score of their layer
    minus 1, so they go first. No score is NaN or infinite.

    >>> import torch
    >>> layer = nn.Linear(2, 3)
    >>> layer.weight.data = torch.tensor([[0.0, 1.0], [3.0, 4.0], [5.0, 12.0]])
    >>> score(nn.Sequential(layer), "magnitude")["0"].tolist()
    [1.0, 5.0, 13.0]

    Args:
        model: any network; left as found.
        name: a name of `SCORES`, with parameters where it has them: `ix_minus_redundancy(0.5)`,
            `hybrid(taylor, composite_ix)`. A score that depends on the sparsity takes it as its parameter, as in
            `cap_a(0.9)`; `plan_method` fills in what its budget asks for. Your own: a function of an `Evidence`, or
            `package.module:function`.
        batches: what the task reads, such as (images, labels); not needed by `magnitude`, `random`, `fpgm`, nor, given
            `table`, by those made of its columns. A pass over them measures the channel table if it is not given.
        table: a channel table from `measure`, so that many scores share one pass.
        seed: of `random` and of clusterings.
        task: what a batch and an output mean; None recognises it. Labels are needed by scores that read a loss, the
            target axis or classes.

    Returns:
        Layer name to float64 [N] on the CPU. Layers a score is not defined for are left out.

    Raises:
        InputError: unknown name (near matches are listed), wrong parameters, missing batches.
    """
    return find_score(name).at(SPARSITY).ranks(Evidence(model, batches, table, seed, task))


def find_score(name: str | OwnScore) -> Method:
    """The entry of `SCORES` and its parameters for a name such as `fpgm` or `ix_minus_redundancy(0.5)`.

    `package.module:function` is imported, so it may come from the caller's own words only, never from a file of a run.
    A function, named so or given as it is, takes an `Evidence` and returns {layer name: Tensor [N]}, higher = keep.

    Raises:
        InputError: as in `score`; an import that leads to no function.
    """
    if callable(name):
        return _own_method(name)
    return _own_method(imported(name, "score")) if ":" in name else parse_method(name, SCORES)


def _own_method(function: OwnScore) -> Method:
    if isinstance(function, type):
        raise InputError(f"score: the class {function.__name__} is none; give a name or a function of an Evidence")
    known = next((entry for entry in SCORES.values() if entry.function is function), None)
    known = known or Score(function, "mixed", "activations")
    return Method(known, known.defaults)


import_files(__file__, __package__)
