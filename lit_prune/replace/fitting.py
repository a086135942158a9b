"""Which stand-in a reader gets: kind and objective, from what was measured at its input."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.inputs import InputMoments
from lit_prune.measurement.moments import Moments
from lit_prune.measurement.passes import Collector, run_pass
from lit_prune.replace.consumers import Reader
from lit_prune.replace.curvature import Curvature, CurvatureSums
from lit_prune.replace.hutchinson import HutchinsonSums
from lit_prune.replace.risk import RiskRows, weighted_affine
from lit_prune.replace.risk_samples import RiskSamples
from lit_prune.replace.settings import Replacement
from lit_prune.replace.stand_ins import StandIn, affine, choose_parents, constants
from lit_prune.task import Task

AFFINE_RIDGE = 1e-6
MOST_ROWS = 20_000


@dataclass(frozen=True)
class InputEvidence:
    """What is known of one layer's input channels.

    Attributes:
        inputs: first and second moments.
        size: of the map that the layer reads; () for a linear layer.
        curvature: second-order risk of constants; None where the objective does not need it.
        rows: second-order risk sample by sample; None likewise.
    """

    inputs: Moments
    size: tuple[int, ...] = ()
    curvature: Curvature | None = None
    rows: RiskRows | None = None


def collect_evidence(
    model: nn.Module, layers: Sequence[str], batches: Sequence[Any], task: Task, kind: str, settings: Replacement
) -> dict[str, InputEvidence]:
    """What `fit_stand_in` needs of each layer, measured on the network before the surgery.

    Args:
        model: the network; left as found.
        layers: readers that lose channels.
        batches: what the task reads; targets are read where the objective is a loss.
        task: what a batch and an output mean.
        kind: "constant" or "affine".
        settings: objective, curvature, seed.
    """
    moments, risks = InputMoments(model, layers), _risk_collector(model, layers, batches, task, kind, settings)
    run_pass(model, batches, [moments, *risks], task)
    found = risks[0].result() if risks else {}
    risk = "curvature" if kind == "constant" else "rows"
    return {
        name: InputEvidence(found_inputs.moments, found_inputs.size, **({risk: found[name]} if risks else {}))
        for name, found_inputs in moments.result().items()
    }


def _risk_collector(
    model: nn.Module, layers: Sequence[str], batches: Sequence[Any], task: Task, kind: str, settings: Replacement
) -> list[Collector]:
    """What second-order risk is collected with; nothing where distortion is the objective."""
    if settings.objective == "distortion":
        return []
    if kind == "affine":
        images = sum(map(task.size, batches))
        return [RiskSamples(model, layers, task, settings.seed, MOST_ROWS // max(1, images), MOST_ROWS)]
    kinds = {"hutchinson": HutchinsonSums, "gauss_newton": CurvatureSums}
    return [kinds[settings.curvature](model, layers, task, settings.seed)]


def fit_stand_in(
    reader: Reader, weight: Tensor, evidence: InputEvidence, kind: str, settings: Replacement
) -> tuple[StandIn, dict]:
    """The stand-in of a reader's removed channels, and what the report says about it.

    Args:
        reader: which go and which stay.
        weight: of the reader, [O, C, *taps].
        evidence: of its input.
        kind: "constant" or "affine".
        settings: objective, parents, ridge.

    Raises:
        InputError: an objective that the kind does not have.
    """
    check_objective(kind, settings)
    if kind == "constant":
        if settings.objective == "distortion":
            return constants(evidence.inputs, reader), {}
        curvature, removed = _as_asked(evidence.curvature, settings), list(reader.removed)
        joint = settings.objective == "joint_loss"
        offsets = curvature.joint_constants(removed) if joint else curvature.constants()[removed]
        return _constant_stand_in(offsets, reader), {"curvature": curvature.method}
    ridge = AFFINE_RIDGE if settings.ridge == "held_out" else settings.ridge
    parents = choose_parents(evidence.inputs, reader, weight, settings)
    if settings.objective == "distortion":
        stand_in = affine(evidence.inputs, reader, parents, ridge)
        said = {}
    else:
        stand_in = _weighted(_as_asked(evidence.rows, settings), reader, parents, ridge)
        said = {"curvature": evidence.rows.method}
    return stand_in, said | {"ridge": ridge, "singular": stand_in.singular, "parents": parents.shape[1]}


def _as_asked(risk: Curvature | RiskRows, settings: Replacement) -> Curvature | RiskRows:
    return risk.without_gradient() if settings.objective == "curvature" else risk


def check_objective(kind: str, settings: Replacement) -> None:
    """Refuses combinations that have no meaning.

    Raises:
        InputError: such a combination.
    """
    if settings.objective == "joint_loss" and kind != "constant":
        raise InputError(f"objective='joint_loss' is for kind='constant', got kind={kind!r}; use objective='loss'")
    if settings.objective != "distortion" and kind not in ("constant", "affine"):
        raise InputError(f"objective={settings.objective!r} is for constant and affine, got kind={kind!r}")
    if settings.curvature == "hutchinson" and kind == "affine" and settings.objective != "distortion":
        raise InputError("curvature='hutchinson' is for constants; affine stand-ins use curvature='gauss_newton'")


def _constant_stand_in(offsets: Tensor, reader: Reader) -> StandIn:
    return StandIn(offsets, offsets.new_zeros(len(offsets), len(reader.kept)), math.nan)


def _weighted(rows: RiskRows, reader: Reader, parents: Tensor, ridge: float) -> StandIn:
    channels = torch.tensor(reader.kept)[parents]  # [R, r]
    fit = weighted_affine(rows, reader.removed, channels, ridge)
    coefficients = fit.coefficients.new_zeros(len(reader.removed), len(reader.kept))
    coefficients.scatter_(1, parents, fit.coefficients)
    return StandIn(fit.offsets, coefficients, math.nan, fit.singular)
