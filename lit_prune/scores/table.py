"""The table of scores, and `score`, which looks one up and applies it."""

import pandas as pd
from torch import Tensor, nn

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.measurement.layers import Batches
from lit_prune.registry import import_files, imported
from lit_prune.scores import axes, clusters, gradients, labels, mixtures, outputs, second_order, weights
from lit_prune.scores.evidence import Evidence
from lit_prune.scores.method import SCORES, SPARSITY, Method, OwnScore, Score
from lit_prune.scores.names import parse_method
from lit_prune.task import Task

_SUMS, _TARGET, _TABLE, _LABELS = ("sums",), ("task_sums",), ("table",), ("pooled",)
_INPUTS, _UNITS = ("input_variances",), ("unit_moments", "sums")
_BOTH = ("table", "saliency")

_SHIPPED = {
    "magnitude": Score(weights.magnitude, "baseline", "weights"),
    "taylor": Score(gradients.taylor, "baseline", "gradients", needs=("saliency",)),
    "random": Score(weights.random, "baseline", "weights"),
    "fpgm": Score(weights.fpgm, "baseline", "weights"),
    "chip": Score(outputs.chip, "baseline", "activations", needs=("independence",)),
    "network_slimming": Score(weights.network_slimming, "baseline", "weights"),
    "group_norm": Score(weights.group_norm, "baseline", "weights"),
    "proxy": Score(weights.proxy, "baseline", "weights"),
    "activation_rms": Score(outputs.activation_rms, "baseline", "activations", needs=_SUMS),
    "variance": Score(outputs.variance, "local", "activations", needs=_INPUTS),
    "mipp": Score(outputs.mipp, "baseline", "activations", needs=_UNITS),
    "cmr_logit": Score(outputs.cmr_logit, "local", "activations", needs=_INPUTS),
    "cmr_const": Score(outputs.cmr_const, "target", "gradients", needs=("curvatures",)),
    "cmr_curvature": Score(outputs.cmr_curvature, "target", "gradients", needs=("curvatures",)),
    "cmr_affine": Score(second_order.cmr_affine, "target", "gradients", (16.0, 1e-4, "pearson"), needs=("risk_rows",)),
    "reconstruction": Score(outputs.reconstruction, "mixed", "gradients", (1.0,)),
    "composite_ix": Score(axes.composite_ix, "local", "activations"),
    "ix_minus_redundancy": Score(axes.ix_minus_redundancy, "local", "activations", (0.5,)),
    "magnitude_plus_ix": Score(axes.magnitude_plus_ix, "local", "activations", (1.0,)),
    "compact_support": Score(outputs.compact_support, "local", "activations", needs=_SUMS),
    "cap": Score(clusters.cap, "local", "labels", needs=_TABLE),
    "cap_qgw": Score(clusters.cap_qgw, "local", "gradients", needs=_BOTH),
    "cap_a": Score(clusters.cap_a, "local", "gradients", (None,), needs=_BOTH),
    "spectral_rs": Score(clusters.spectral_rs, "local", "labels", needs=_TARGET),
    "composite_pid": Score(axes.composite_pid, "target", "labels", needs=_TABLE),
    "pid_no_red": Score(axes.pid_no_red, "target", "labels", needs=_TABLE),
    "spectral_pid_rs": Score(clusters.spectral_pid_rs, "target", "labels", needs=_TARGET),
    "label_information": Score(labels.label_information, "target", "labels", ("output",), needs=_LABELS),
    "conditional_information": Score(labels.conditional_information, "target", "labels", ("output",), needs=_LABELS),
}
_SHIPPED["hybrid"] = Score(
    mixtures.hybrid, "mixed", "gradients", (Method(_SHIPPED["taylor"]), Method(_SHIPPED["composite_ix"]))
)
for _name, _entry in _SHIPPED.items():
    SCORES.add(_name, _entry, _entry.function)


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
