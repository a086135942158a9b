"""What a worker of a sweep does: measure a dense network, plan a unit's methods, carry out a cell."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.data import ImageData
from lit_prune.lab.sweep.recovery import precision_context, recover
from lit_prune.lab.sweep.request import BUDGET_METHOD, Cell, SweepRequest, Unit
from lit_prune.replace import replace_mechanisms
from lit_prune.scores import Evidence, plan_method
from lit_prune.scores.planning import mask_method, method_needs
from lit_prune.structure import CostModel, Plan, apply_plan, cost
from lit_prune.structure.masking import mask_channels
from lit_prune.structure.ranking import selected_groups
from lit_prune.structure.record import record_of
from lit_prune.train.batchnorm import recalibrate_batchnorm
from lit_prune.train.evaluation import Evaluation, evaluate
from lit_prune.train.stages import STAND_IN_SETTINGS

Result = dict[str, Any]


@dataclass(frozen=True)
class SweepJob:
    """All that the workers of a sweep share; it is sent to each of them once."""

    request: SweepRequest
    networks: tuple[nn.Module, ...]
    data: ImageData
    precision: str = "32-true"


@dataclass(frozen=True)
class Workplace:
    """A job on a device."""

    job: SweepJob
    device: torch.device

    def model(self, checkpoint: int) -> nn.Module:
        """The dense network of a checkpoint; the parts of a sweep leave it as it is."""
        return self.job.networks[checkpoint].to(self.device).eval()

    def example(self, checkpoint: int) -> Tensor:
        """A zero image [1, C, H, W] for tracing."""
        return torch.zeros(1, *(record_of(self.job.networks[checkpoint]).image_shape or ()), device=self.device)

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Accuracy on the test images of the sweep."""
        batches = self.job.data.subset_dataloader("test", self.job.request.limit_test)
        with precision_context(self.job.precision, self.device):
            return evaluate(model, batches)


@dataclass(frozen=True)
class Piece:
    """A function of a workplace and its further arguments, for any worker."""

    function: Callable[..., Result]
    arguments: tuple[Any, ...]


class Worker:
    """Carries out tasks one after the other on one device."""

    def __init__(self, job: SweepJob, device: str | torch.device = "cpu") -> None:
        self.place = Workplace(job, torch.device(device))

    def carry_out(self, task: Piece) -> Result:
        """The task's result with its `seconds`; an exception becomes the result's `error`."""
        threads, started = torch.get_num_threads(), time.perf_counter()
        devices = [self.place.device] if self.place.device.type == "cuda" else []
        torch.set_num_threads(self.place.job.request.threads)
        try:
            with torch.random.fork_rng(devices):
                result = task.function(self.place, *task.arguments)
        except Exception as error:  # the sweep goes on; the error is what the cell's file says
            result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        finally:
            torch.set_num_threads(threads)
        return {**result, "seconds": time.perf_counter() - started}


def measure_dense(place: Workplace, checkpoint: int) -> Result:
    """Accuracy, multiply-adds and parameters of a checkpoint's network."""
    price = cost(place.model(checkpoint), place.example(checkpoint))
    found = place.evaluate(place.model(checkpoint))
    return {"accuracy": found.figure, "macs": price.macs, "params": price.params, "test_images": found.images}


def plan_unit(place: Workplace, unit: Unit, methods: tuple[str, ...]) -> Result:
    """Plans of several methods for every removal, allocation and sparsity, from passes that all methods share.

    Returns:
        `{method: {"seconds": ..., "plans": [{"removal", "allocation", "sparsity", "channels_removed", "met", and "plan"
        or, for masks, "kept" and "macs"}]}}`; where a plan cannot be made, "error" in place of what it is.
    """
    data = place.job.data.redrawn(place.job.data.seed + unit.seed)
    evidence = Evidence(place.model(unit.checkpoint), data.calibration_dataloader(), seed=unit.seed)
    evidence.gather(method_needs((*methods, BUDGET_METHOD) if "hybrid" in place.job.request.allocations else methods))
    planner = Planner(
        place.job.request, evidence, CostModel.build(evidence.model, evidence.graph, place.example(unit.checkpoint))
    )
    return {method: planner.plans(method) for method in methods}


@dataclass(frozen=True)
class Planner:
    """Plans from one unit's evidence."""

    request: SweepRequest
    evidence: Evidence
    cost_model: CostModel

    def plans(self, method: str) -> Result:
        """One method's plans, see `plan_unit`."""
        started = time.perf_counter()
        request, plans = self.request, []
        for removal, allocation, sparsity in itertools.product(
            request.removals, request.allocations, request.sparsities
        ):
            where = {"removal": removal, "allocation": allocation, "sparsity": sparsity}
            plans.append({**where, **self._entry(method, **where)})
        errors = [entry["error"] for entry in plans if "error" in entry][:1]
        failed = {"error": errors[0]} if errors else {}  # so that the next start plans this method again
        return {"plans": plans, **failed, "seconds": time.perf_counter() - started}

    def _entry(self, method: str, removal: str, allocation: str, sparsity: float) -> Result:
        try:
            if removal == "mask":
                return self.masks(method, allocation, sparsity)
            plan = self.plan(method, allocation, sparsity)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        removed = sum(len(plan.removed(name)) for name in plan.keep_channels)
        groups = selected_groups(self.evidence.graph, self.request.structure_budget(sparsity))
        share = removed / sum(group.size for group in groups)
        return {"plan": plan.to_dict(), "channels_removed": share, "met": bool(plan.notes.get("met", True))}

    def masks(self, method: str, allocation: str, sparsity: float) -> Result:
        """What masking takes in the place of a plan; multiply-adds counted as if removed."""
        budget = replace(self.request.structure_budget(sparsity), allocation=allocation)
        found = mask_method(self.evidence, method, budget)[1]
        share = 1 - found["channels"]
        return {"kept": found["kept"], "macs": found["macs"], "channels_removed": share, "met": found["met"]}

    def plan(self, method: str, allocation: str, sparsity: float) -> Plan:
        """Plan of a method under an allocation that removes `sparsity` of the budget."""
        budget = self.request.structure_budget(sparsity)
        if allocation != "hybrid":
            return self._plan(method, replace(budget, allocation=allocation))
        donor = self._plan(BUDGET_METHOD, budget)
        shares = {name: len(kept) / donor.sizes[name] for name, kept in donor.keep_channels.items()}
        return self._plan(method, replace(budget, allocation="layerwise", keep=shares))

    def _plan(self, method: str, budget: Any) -> Plan:
        return plan_method(self.evidence, method, self.evidence.graph, self.cost_model, budget)


def run_cell(place: Workplace, cell: Cell, entry: Result) -> Result:
    """Prunes by an entry of `plan_unit`, measures, recovers and measures again.

    Returns:
        `accuracy_before` and `accuracy_after` recovery, `accuracy_checks` (number of batches -> accuracy; 0 is after
        the repair without training), `batches` of recovery, `macs` and `params` of the pruned network; masks count
        `macs` as if the channels were removed.
    """
    pruned = _pruned(place, cell, entry).to(memory_format=torch.channels_last)  # a quarter faster on odd widths
    price = cost(pruned, place.example(cell.unit.checkpoint))
    before = place.evaluate(pruned).figure
    fields = place.job.request.recovery_fields(cell.recovery)
    checks: dict[int, float] = {}
    if "first" in fields:
        pruned = _repaired(place, cell, entry, pruned, fields["first"])
        checks[0] = place.evaluate(pruned).figure
    if fields["max_batches"]:
        data = place.job.data.redrawn(place.job.data.seed + cell.unit.seed)
        for done in recover(pruned, data, fields, place.job.precision, cell.unit.seed):
            checks[done] = place.evaluate(pruned).figure
    return {
        "macs": entry.get("macs", price.macs),
        "params": price.params,
        "channels_removed": entry["channels_removed"],
        "plan_met": entry["met"],
        "accuracy_before": before,
        "accuracy_after": list(checks.values())[-1] if checks else before,
        "accuracy_checks": {str(done): accuracy for done, accuracy in checks.items()},
        "batches": max(checks, default=0),
    }


def _pruned(place: Workplace, cell: Cell, entry: Result) -> nn.Module:
    """The dense network with the cell's channels removed or masked."""
    model = place.model(cell.unit.checkpoint)
    if cell.removal == "mask":
        return mask_channels(model, entry["kept"])
    return apply_plan(model, Plan.from_dict(entry["plan"]), place.example(cell.unit.checkpoint))


def _repaired(place: Workplace, cell: Cell, entry: Result, pruned: nn.Module, kind: str) -> nn.Module:
    """The pruned network with statistics of its norms measured again, or with its layers solved again."""
    data = place.job.data.redrawn(place.job.data.seed + cell.unit.seed)
    if kind == "recalibrate":
        recalibrate_batchnorm(pruned, data.recalibration_dataloader())
        return pruned
    model, example = place.model(cell.unit.checkpoint), place.example(cell.unit.checkpoint)
    batches = data.calibration_dataloader()
    plan = Plan.from_dict(entry["plan"])
    reduced = replace_mechanisms(model, plan, batches, kind, example, settings=STAND_IN_SETTINGS).model
    return reduced.to(memory_format=torch.channels_last)
