"""What an entry of the table of scores is, a score together with the values of its parameters, and its name."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from lit_prune.arguments import checked
from lit_prune.errors import InputError, did_you_mean
from lit_prune.registry import Registry
from lit_prune.scores.evidence import COLLECTORS, Evidence

Axis = Literal["local", "target", "baseline", "mixed"]
Reads = Literal["weights", "activations", "gradients", "labels"]
SPARSITY = 0.8  # taken for a score that depends on the sparsity where no plan says how much goes


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


OwnScore = Callable[[Evidence], dict[str, Tensor]]
SCORES: Registry[Score] = Registry("score")
_Function = TypeVar("_Function", bound=Callable[..., dict[str, Tensor]])


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


PEERS = {  # names of other tools, without underscores -> the score here
    "l1": "magnitude", "l1norm": "magnitude", "l1normpruner": "magnitude", "weightmagnitude": "magnitude",
    "l2": "group_norm", "l2norm": "group_norm", "l2normpruner": "group_norm", "groupnormimportance": "group_norm",
    "groupmagnitude": "group_norm", "bn": "network_slimming", "bnscale": "network_slimming",
    "bnscaleimportance": "network_slimming", "slim": "network_slimming", "slimpruner": "network_slimming",
    "taylorfo": "taylor", "taylorfoweight": "taylor", "taylorimportance": "taylor", "geometricmedian": "fpgm",
    "gm": "fpgm", "fpgmpruner": "fpgm", "fpgmimportance": "fpgm", "thinet": "reconstruction",
}  # fmt: skip


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
