"""The table of scores, and `score`, which looks one up and applies it."""

import pandas as pd
from torch import Tensor, nn

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.measurement.layers import Batches
from lit_prune.registry import import_files, imported
from lit_prune.scores.evidence import Evidence
from lit_prune.scores.method import SCORES, SPARSITY, Method, OwnScore, Score, parse_method
from lit_prune.task import Task


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
