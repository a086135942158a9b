"""The table of scores, and `score`, which looks one up and applies it."""

import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.layers import Batches
from lit_prune.scores import axes, gradients, labels, outputs, weights
from lit_prune.scores.evidence import Evidence


@dataclass(frozen=True)
class Score:
    """One entry of `SCORES`.

    Attributes:
        function: from `Evidence` (and parameters) to {layer name: float64 [N]}, higher = keep.
        axis: which kind of information it uses; reports group by it.
        cost: what it has to look at.
        defaults: values of its parameters, `name(0.5)` overrides them in order.
    """

    function: Callable[..., dict[str, Tensor]]
    axis: Literal["local", "target", "baseline", "mixed"]
    cost: Literal["weights", "activations", "gradients", "labels"]
    defaults: tuple[float, ...] = ()


SCORES: dict[str, Score] = {
    "magnitude": Score(weights.magnitude, "baseline", "weights"),
    "taylor": Score(gradients.taylor, "baseline", "gradients"),
    "random": Score(weights.random, "baseline", "weights"),
    "fpgm": Score(weights.fpgm, "baseline", "weights"),
    "network_slimming": Score(weights.network_slimming, "baseline", "weights"),
    "proxy": Score(weights.proxy, "baseline", "weights"),
    "activation_rms": Score(outputs.activation_rms, "local", "activations"),
    "variance": Score(outputs.variance, "local", "activations"),
    "cmr_logit": Score(outputs.cmr_logit, "local", "activations"),
    "cmr_const": Score(outputs.cmr_const, "target", "gradients"),
    "reconstruction": Score(outputs.reconstruction, "mixed", "gradients", (1.0,)),
    "composite_ix": Score(axes.composite_ix, "local", "activations"),
    "ix_minus_redundancy": Score(axes.ix_minus_redundancy, "local", "activations", (0.5,)),
    "magnitude_plus_ix": Score(axes.magnitude_plus_ix, "local", "activations", (1.0,)),
    "composite_pid": Score(axes.composite_pid, "target", "labels"),
    "pid_no_red": Score(axes.pid_no_red, "target", "labels"),
    "label_information": Score(labels.label_information, "target", "labels"),
    "conditional_information": Score(labels.conditional_information, "target", "labels"),
}


def score(
    model: nn.Module, name: str, batches: Batches | None = None, table: pd.DataFrame | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Scores of the channels of every Conv2d and Linear layer; higher = keep.

    Dead channels (constant output, told from `table`, else from `batches`) get the lowest finite score of their layer
    minus 1, so they go first. No score is NaN or infinite.

    Args:
        model: any network; left as found.
        name: a name of `SCORES`, with parameters where it has them: `ix_minus_redundancy(0.5)`.
        batches: iterable of (images, labels); not needed by `magnitude`, `random` and `fpgm`, nor, given `table`, by
            those made of its columns. A pass over them measures the channel table if it is not given.
        table: a channel table from `measure`, so that many scores share one pass.
        seed: of `random`.

    Returns:
        Layer name to float64 [N] on the CPU. Layers a score is not defined for are left out.

    Raises:
        InputError: unknown name (near matches are listed), wrong parameters, missing batches.
    """
    entry, parameters = find_score(name)
    evidence = Evidence(model, batches, table, seed)
    scores = entry.function(evidence, *parameters)
    dead = evidence.dead()
    return {layer: _with_dead_last(values, dead.get(layer)) for layer, values in scores.items()}


def find_score(name: str) -> tuple[Score, tuple[float, ...]]:
    """The entry of `SCORES` and its parameters for a name such as `fpgm` or `ix_minus_redundancy(0.5)`.

    Raises:
        InputError: as in `score`.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", name)
    plain = match[1] if match else name
    if plain not in SCORES:
        near = difflib.get_close_matches(plain, SCORES, n=3, cutoff=0.5) or list(SCORES)
        raise InputError(f"score: {name!r} is unknown; did you mean {', '.join(near)}?")
    entry = SCORES[plain]
    try:
        given = tuple(float(text) for text in match[2].split(",")) if match[2] else ()
    except ValueError:
        raise InputError(f"score: {name!r} has a parameter that is not a number; write {plain}(0.5)") from None
    if len(given) > len(entry.defaults):
        names = list(inspect.signature(entry.function).parameters)[1:]
        raise InputError(f"score: {name!r} has too many parameters; {plain} takes ({', '.join(names)})")
    return entry, given + entry.defaults[len(given) :]


def _with_dead_last(values: Tensor, dead: Tensor | None) -> Tensor:
    """The scores with dead and undefined channels one below the lowest of the others."""
    last = ~values.isfinite()
    if dead is not None:
        last = last | dead
    lowest = values[~last].min() - 1 if not last.all() else values.new_zeros(())
    return torch.where(last, lowest, values)
