"""Names of methods: `fpgm`, `ix_minus_redundancy(0.5)`, `hybrid(taylor, magnitude_plus_ix(2))`."""

import inspect
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lit_prune.errors import InputError, did_you_mean
from lit_prune.scores.method import Method, Score

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
