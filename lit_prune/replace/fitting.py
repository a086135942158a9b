"""Stand-ins that fold into their readers: constants and affine combinations, from what was measured at the inputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.measurement.inputs import InputMoments
from lit_prune.measurement.moments import Moments
from lit_prune.measurement.passes import Collector, run_pass
from lit_prune.replace.carrier import carried_value, carrier_columns, light_carriers, pads_with_zeros
from lit_prune.replace.curvature import Curvature, CurvatureSums, HutchinsonSums
from lit_prune.replace.flow import Reader
from lit_prune.replace.kernels import add_to_output, kernel_of, set_kernel
from lit_prune.replace.methods import Done, Job, Replacement, StandInMethod, example_of, register_stand_in
from lit_prune.replace.risk import RiskRows, RiskSamples, weighted_affine
from lit_prune.replace.stand_ins import Folded, StandIn, affine, choose_parents, constants, fold
from lit_prune.task import Task

LEAST_RIDGE = 1e-6
MOST_ROWS = 20_000


@dataclass(frozen=True)
class InputEvidence:
    """What is known of one layer's input channels.

    Attributes:
        inputs: first and second moments.
        size: of the map that the layer reads; () for a linear layer.
        risk: second-order risk of what the method fits, where its objective is a loss: a `Curvature` for constants,
            `RiskRows` sample by sample for combinations.
    """

    inputs: Moments
    size: tuple[int, ...] = ()
    risk: Any = None

    def asked(self, settings: Replacement) -> Any:
        """The risk that the objective means: of "curvature" without the gradient."""
        return self.risk.without_gradient() if settings.objective == "curvature" else self.risk


class Folding(StandInMethod):
    """A stand-in that is an affine function of kept input channels, folded into each reader before the surgery.

    A subclass says how it is fitted (`fit`); one whose objective may be a loss says what else it looks at (`watch`).
    """

    carries = True

    def fit(
        self, reader: Reader, weight: Tensor, evidence: InputEvidence, settings: Replacement
    ) -> tuple[StandIn, dict[str, Any]]:
        """The stand-in of a reader's removed channels, and what the report says about it.

        Args:
            reader: which go and which stay.
            weight: of the reader, [O, C, *taps].
            evidence: of its input.
            settings: objective, parents, ridge.
        """
        raise NotImplementedError

    def watch(
        self, model: nn.Module, layers: Sequence[str], batches: Sequence[Any], task: Task, settings: Replacement
    ) -> Collector:
        """What collects `InputEvidence.risk`, by layer; asked where the objective is a loss."""
        raise NotImplementedError

    def put(self, job: Job, batches: Sequence[Any], settings: Replacement) -> Done:
        """Fits on the network before the surgery, folds into the one after it."""
        readers = job.losing()
        inputs = self.collect(job.dense, [reader.name for reader in readers], batches, job.task, settings)
        gained = light_carriers(job.reduced, job.graph, job.plan, job.carriers, job.flow)
        report = {}
        for reader in readers:
            module, found = job.dense.get_submodule(reader.name), inputs[reader.name]
            stand_in, said = self.fit(reader, kernel_of(module), found, settings)
            folded = fold(module, reader, stand_in, found.size)
            border, created = _write(job, reader, folded, job.task.take(batches[0], 2))
            gained += [reader.name] if created else []
            report[reader.name] = {"rows": found.inputs.count, "unexplained": stand_in.unexplained, "border": border}
            report[reader.name] |= said
        light_carriers(job.reduced, job.graph, job.plan, job.carriers, job.flow)  # a reader may write carriers itself
        return report, gained

    def collect(
        self, model: nn.Module, layers: Sequence[str], batches: Sequence[Any], task: Task, settings: Replacement
    ) -> dict[str, InputEvidence]:
        """What `fit` needs of each layer, measured on the network before the surgery.

        Args:
            model: the network; left as found.
            layers: readers that lose channels.
            batches: what the task reads; targets are read where the objective is a loss.
            task: what a batch and an output mean.
            settings: objective, curvature, seed.
        """
        moments = InputMoments(model, layers)
        by_loss = settings.objective != "distortion"
        risks = [self.watch(model, layers, batches, task, settings)] if by_loss else []
        run_pass(model, batches, [moments, *risks], task)
        found = risks[0].result() if risks else {}
        seen = moments.result()
        return {str(name): InputEvidence(one.moments, one.size, found.get(name)) for name, one in seen.items()}


@register_stand_in("constant")
class Constant(Folding):
    """Their means (or the constants of least loss), folded into the readers."""

    objectives = ("distortion", "curvature", "loss", "joint_loss")
    curvatures = ("gauss_newton", "hutchinson")

    def fit(
        self, reader: Reader, weight: Tensor, evidence: InputEvidence, settings: Replacement
    ) -> tuple[StandIn, dict[str, Any]]:
        """One number a removed channel."""
        if settings.objective == "distortion":
            return constants(evidence.inputs, reader), {}
        curvature: Curvature = evidence.asked(settings)
        removed = list(reader.removed)
        joint = settings.objective == "joint_loss"
        offsets = curvature.joint_constants(removed) if joint else curvature.constants()[removed]
        stand_in = StandIn(offsets, offsets.new_zeros(len(offsets), len(reader.kept)), math.nan)
        return stand_in, {"curvature": curvature.method}

    def watch(
        self, model: nn.Module, layers: Sequence[str], batches: Sequence[Any], task: Task, settings: Replacement
    ) -> Collector:
        """Curvature of the loss at the inputs."""
        kinds: dict[str, Any] = {"hutchinson": HutchinsonSums, "gauss_newton": CurvatureSums}
        return kinds[settings.curvature](model, layers, task, settings.seed)


@register_stand_in("affine")
class Affine(Folding):
    """Affine combinations of kept inputs, folded into the readers."""

    objectives = ("distortion", "curvature", "loss")

    def fit(
        self, reader: Reader, weight: Tensor, evidence: InputEvidence, settings: Replacement
    ) -> tuple[StandIn, dict[str, Any]]:
        """A ridge regression a removed channel."""
        ridge = max(LEAST_RIDGE, settings.noise**2) if settings.ridge == "held_out" else settings.ridge
        parents = choose_parents(evidence.inputs, reader, weight, settings)
        if settings.objective == "distortion":
            stand_in, said = affine(evidence.inputs, reader, parents, ridge), {}
        else:
            rows: RiskRows = evidence.asked(settings)
            stand_in, said = _weighted(rows, reader, parents, ridge), {"curvature": rows.method}
        return stand_in, said | {"ridge": ridge, "singular": stand_in.singular, "parents": parents.shape[1]}

    def watch(
        self, model: nn.Module, layers: Sequence[str], batches: Sequence[Any], task: Task, settings: Replacement
    ) -> Collector:
        """Inputs and gradients, sample by sample."""
        images = sum(map(task.size, batches))
        return RiskSamples(model, layers, task, settings.seed, MOST_ROWS // max(1, images), MOST_ROWS)


def _weighted(rows: RiskRows, reader: Reader, parents: Tensor, ridge: float) -> StandIn:
    channels = torch.tensor(reader.kept)[parents]  # [R, r]
    fit = weighted_affine(rows, reader.removed, channels, ridge)
    coefficients = fit.coefficients.new_zeros(len(reader.removed), len(reader.kept))
    coefficients.scatter_(1, parents, fit.coefficients)
    return StandIn(fit.offsets, coefficients, math.nan, fit.singular)


def _write(job: Job, reader: Reader, folded: Folded, batch: Any) -> tuple[float, bool]:
    """Puts a folded map into the reduced network; the border error left, and whether the reader gained a bias."""
    columns = carrier_columns(job.graph, job.carriers, reader)
    module = job.reduced.get_submodule(reader.name)
    places = {column: place for place, column in enumerate(sorted((*reader.kept, *columns)))}
    weight = folded.weight.new_zeros(len(folded.weight), len(places), *folded.weight.shape[2:])
    weight[:, [places[column] for column in reader.kept]] = folded.weight
    carried = bool(columns) and pads_with_zeros(module)
    if carried:
        value = carried_value(job.reduced, reader.name, places[columns[0]], example_of(job.task, job.reduced, batch))
        weight[:, places[columns[0]]] = folded.carried[:, 0] / value
    set_kernel(module, weight)
    if carried:
        return 0.0, False
    return folded.border, add_to_output(job.reduced, reader.name, job.flow.norms.get(reader.name, ""), folded.shift)
