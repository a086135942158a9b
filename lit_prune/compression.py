"""A trained network and a budget in, a smaller network out: score, plan, cut, stand in, verify."""

import time
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lit_prune.arguments import checked
from lit_prune.compression_report import CompressionReport, measure_budget, verify
from lit_prune.errors import InputError
from lit_prune.measurement.layers import Batches
from lit_prune.progress import looking_on
from lit_prune.replace import Replacement, replace_mechanisms
from lit_prune.replace.distil import Distilling, distil
from lit_prune.replace.replacement import check_finite, take_batches
from lit_prune.scores import Evidence, plan_method
from lit_prune.structure import Budget, CostModel, Plan
from lit_prune.structure.budgets import find_budget
from lit_prune.structure.example import as_example
from lit_prune.structure.record import example_input
from lit_prune.task import Task, settle


@checked
@dataclass(frozen=True)
class Recipe:
    """How `compress` chooses and solves; the default is the strongest that was measured.

    Attributes:
        score: in which order units of a group go.
        allocation: how the budget is shared out, see `Budget`.
        only: "mid", "planes", "heads", "width", "head_width", "blocks" (residual blocks as a whole), several of them
            and of group names, or None for the first three.
        protect: names of groups that stay whole.
        round_to: widths are multiples of it; None: of 8 where a group has 32 units and more, see `Budget`.
        cap: largest share of a group that may go.
        kind: what stands in, see `replace_mechanisms`.
        replacement: its settings.
        seed: of all that is drawn.
    """

    score: str = "reconstruction"
    allocation: str = "measured"
    only: str | tuple[str, ...] | None = None
    protect: tuple[str, ...] = ()
    round_to: int | None = None
    cap: float = 0.95
    kind: str = "refit"
    replacement: Replacement = field(
        default_factory=lambda: Replacement(towards="weights", together=12, unsupported="delete")
    )
    seed: int = 0

    def budget(self, kind: str, keep: float) -> Budget:
        """The request to the allocation."""
        return Budget(kind, keep, self.allocation, self.round_to, cap=self.cap, only=self.only, protect=self.protect)


STRONGEST = Recipe()
TOLERABLE = 0.9
"""Agreement with the original below which a result is called bad."""


@checked
def compress(
    model: nn.Module,
    batches: Batches,
    keep: float = 0.5,
    budget: str = "macs",
    task: Task | str | None = None,
    seconds: float | None = None,
    *,
    recipe: Recipe = STRONGEST,
) -> tuple[nn.Module, CompressionReport]:
    """A smaller dense network within the budget whose prediction stays near the original's; `model` is untouched.

    Units that the readers' other inputs can make up for go first (`reconstruction`), widths are chosen by what they do
    to the prediction, every layer from the first cut on is solved again in closed form, then the layers of each block
    together, towards what the block of the original gives (`Replacement.together`). No labels are read, the network as
    a whole is not trained, BatchNorm is not recalibrated: the solve has put its statistics right. With `seconds` the
    compact network is then trained towards the original's prediction for so long, without labels (`distil`).

    >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
    >>> small, report = compress(net, [torch.randn(256, 4)], keep=0.75)
    >>> compact, dense = report["compact"], report["dense"]
    >>> compact["macs"] <= 0.75 * dense["macs"]
    True

    Args:
        model: any trained network that `trace_groups` can follow.
        batches: calibration samples, unaugmented, of any kind that the task reads; 1,000 to 2,000 images serve.
        keep: share kept, in (0, 1].
        budget: "macs", "params", "channels", or seconds of one sample or of 64: "latency", "latency_64" (PyTorch on the
            network's device), "latency_onnx", "latency_onnx_64" (ONNX Runtime on the CPU).
        task: what a batch and an output mean; None recognises it.
        seconds: of repair after that; None: no training.
        recipe: how.

    Returns:
        The network, in the mode of `model`, and a dictionary of plain values that prints as a summary: `plan` (a `Plan`
        dict; replayed on `model` it gives the structure), `dense` and `compact` (macs, params, and the task's figure on
        `batches` where they have targets), `distortion` (squared change of the prediction over its variance),
        `agreement` (see `Task.agreement`; of a task without decisions 1 - `distortion`), `layers` (see
        `Reduced.report`), `images`, `seconds` by step, and `repair` (see `distil`) where asked for; under a budget that
        is measured also `budget`: `dense` and `compact` (measured in turns at the end, `unit`), and the shares
        `requested`, `predicted` (by the plan's prices), `measured` and `spread` (of the dense figures).

    Raises:
        InputError: no batches, a budget outside (0, 1] or out of reach, nothing to prune; fewer images than a solve
            needs, where the recipe's replacement refuses (else the layer is pulled towards its weights, with a warning
            that says how many are needed).
    """
    task, batches = settle(task, model, batches)
    batches = take_batches(batches, recipe.replacement.images, task)
    check_finite(model, batches, task)
    clock = Clock()
    with looking_on(), clock.step("plan"):
        plan = plan_compression(model, batches, recipe.budget(budget, keep), task, recipe)
    example = task.inputs(task.to(task.take(batches[0], 1), model))
    with looking_on(), clock.step("stand_in"):
        reduced = replace_mechanisms(model, plan, batches, recipe.kind, example, settings=recipe.replacement, task=task)
    _say_undetermined(reduced.report["layers"])
    repair = {}
    if seconds is not None:
        with clock.step("repair"):
            repair["repair"] = distil(
                model, reduced.model, batches, task, Distilling(seconds=seconds, seed=recipe.seed)
            )
    with clock.step("verify"):
        report = verify(model, reduced, batches, example, task)
        if find_budget(budget).measured:
            report["budget"] = measure_budget(model, reduced, example_input(as_example(example)))
    if report["agreement"] < TOLERABLE:
        share = f"{1 - report['agreement']:.0%}"
        found = f"decides otherwise on {share} of the samples" if task.decides else f"is off by {share} of the variance"
        warnings.warn(
            f"compress: the compact network {found}; repair it (seconds=, or StagedPruning in a fit), keep more, or "
            "give more samples",
            stacklevel=3,  # past the check of arguments
        )
    return reduced.model, CompressionReport(report | repair | {"seconds": clock.seconds})


def _say_undetermined(layers: dict[str, Any]) -> None:
    """Warns of layers that had too few positions to be solved for."""
    needed = {name: found["undetermined"] for name, found in layers.items() if "undetermined" in found}
    if needed:
        most = max(needed, key=needed.__getitem__)
        warnings.warn(
            f"compress: {len(needed)} layers have fewer positions than weights to solve for and are pulled towards "
            f"those they have; {needed[most]} calibration images determine all of them (most for {most!r})",
            stacklevel=4,
        )


def plan_compression(model: nn.Module, batches: Iterable[Any], request: Budget, task: Task, recipe: Recipe) -> Plan:
    """The plan of `compress`.

    Raises:
        InputError: as `compress`.
    """
    evidence = Evidence(model, batches, seed=recipe.seed, task=task)
    cost_model = CostModel.build(model, evidence.graph, evidence.example)
    plan = plan_method(evidence, recipe.score, evidence.graph, cost_model, request)
    if plan.removes_nothing:
        raise InputError(f"keep={request.keep} removes nothing: {plan.notes.get('reason') or 'lower keep'}")
    if not plan.notes["met"] and plan.notes["achieved"] > request.keep:
        raise InputError(
            f"keep={request.keep} is out of reach: {plan.notes['reason']}; give at least "
            f"keep={plan.notes['achieved']:.3f}, or protect less"
        )
    return plan


@dataclass
class Clock:
    """Seconds that steps took, by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str):
        """Times what runs inside."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
