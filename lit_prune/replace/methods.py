"""How mechanisms are replaced: settings, ways (each a registered class), and what one replacement works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import nn

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.registry import Kinds, Named
from lit_prune.replace.carrier import with_carriers
from lit_prune.replace.flow import Flow, Reader, find_readers, observe
from lit_prune.structure import ChannelGraph, Plan, apply_plan, trace_groups
from lit_prune.structure.example import Example
from lit_prune.structure.opened import open_copy
from lit_prune.task import Task

ROWS_A_WEIGHT = 20


@checked
@dataclass(frozen=True)
class Replacement:
    """Settings of `replace_mechanisms`.

    Attributes:
        ridge: of affine relative to the inputs' mean variance, of refit to each input's own; "held_out": refit takes
            the one of a grid that serves held-out images best, at least `noise`² (affine: `noise`², at least 1e-6).
        noise: error of the inputs, as a share of their spread, that a solution has to bear: least squares with so much
            noise on each input are those with a ridge of its square. Without it a reader whose inputs hardly vary in
            some directions may get weights a hundred times as large to read what little is left there; the fit is
            somewhat closer, but the first steps of any training that move the inputs destroy it.
        parents: affine: kept channels that stand in for a removed one; None: all of them.
        parent_rule: which ones: the best by `pearson` correlation, by `weighted_pearson` (correlation times the cosine
            of the two channels' outgoing weights; both absolute), or `random` ones.
        objective: what constants and affine stand-ins are fitted to: "distortion" (squared error of the value: means
            and least squares), "curvature" (the same, samples weighted by the loss's curvature), "loss" (second-order
            rise of the loss, gradient included, each removed channel alone), "joint_loss" (constants only: all removed
            channels of a layer together). All but the first read labels.
        curvature: of the loss: "gauss_newton", or "hutchinson" (random probes of the Hessian's diagonal; constants
            only).
        border: where the constants go: "bias" (exact away from a zero-padded border) or "carrier" (exact; one of the
            removed channels stays in each group and carries them).
        scope: refit: "all" (every layer from the first change on) or "consumers" (layers that lose input channels).
        towards: refit: where the ridge pulls the weights, "zero" or the "weights" the layer has.
        clipped: refit: where a ReLU or ReLU6 reads the result, fit what it lets through; off: the value in front of it.
        together: refit: passes over the images in which the layers of each segment (a residual block, say) are then
            solved together, by gradient steps towards what the segment of the original network gives; 0: none.
        images: most calibration images used.
        rows: refit: most positions (over all images) in one regression, but at least `ROWS_A_WEIGHT` times the length
            of a patch; where there are more, equally many of each image are sampled, seeded.
        held_out: share of the batches that choose the ridge.
        unsupported: "refuse" raises for a layer in which nothing can stand in, or that has fewer positions than weights
            to solve for; "delete" leaves the one with what is kept, and pulls the other towards the weights it has.
        seed: of sampled positions, drawn labels, probes and random parents.
    """

    ridge: float | Literal["held_out"] = "held_out"
    noise: float = 0.0
    parents: int | None = 16
    parent_rule: Literal["pearson", "weighted_pearson", "random"] = "pearson"
    objective: Literal["distortion", "curvature", "loss", "joint_loss"] = "distortion"
    curvature: Literal["gauss_newton", "hutchinson"] = "gauss_newton"
    border: Literal["bias", "carrier"] = "bias"
    scope: Literal["all", "consumers"] = "all"
    towards: Literal["zero", "weights"] = "zero"
    clipped: bool = True
    together: int = 0
    images: int = 4096
    rows: int = 100_000
    held_out: float = 0.2
    unsupported: Literal["refuse", "delete"] = "refuse"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values. InputError: one is outside its range."""
        if not isinstance(self.ridge, str) and self.ridge <= 0:
            raise InputError(f"ridge={self.ridge!r} must be above 0 (relative to the inputs' variance), or 'held_out'")
        if not 0 <= self.noise < 1:
            raise InputError(f"noise={self.noise!r} must be within [0, 1), a share of the inputs' spread")
        if self.parents is not None and self.parents < 0:
            raise InputError(f"parents={self.parents} must be 0 or more, or None for all kept channels")
        if self.together < 0:
            raise InputError(f"together={self.together} must be 0 or more passes over the images")
        if self.images < 1 or self.rows < 1 or not 0 <= self.held_out < 1:
            raise InputError(
                f"images={self.images} and rows={self.rows} must be at least 1, held_out={self.held_out} within [0, 1)"
            )

    def holds_out(self, index: int, batches: int) -> bool:
        """Whether batch `index` of `batches` belongs to the held-out part: the last ones, none of a single batch."""
        return index >= batches - int(self.held_out * batches + 0.5)


DEFAULT_REPLACEMENT = Replacement()


Done = tuple[dict[str, dict], list[str]]
"""Report by layer, and the layers that gained a bias."""


class StandInMethod(Named):
    """A way to fill the place of what a plan removes. Most are a `Folding` of `replace.fitting`: they say how to fit.

    Attributes:
        objectives: values of `Replacement.objective` that it can be fitted to.
        curvatures: values of `Replacement.curvature` where the objective is one of a loss.
        changes: whether it changes the layers that read what goes; those that cannot be changed are then refused.
        carries: whether a carrier may hold its constants (`Replacement.border`).
        renews: whether it puts BatchNorm statistics right too, so that a stage need not recalibrate them.
    """

    objectives: ClassVar[tuple[str, ...]] = ("distortion",)
    curvatures: ClassVar[tuple[str, ...]] = ("gauss_newton",)
    changes: ClassVar[bool] = True
    carries: ClassVar[bool] = False
    renews: ClassVar[bool] = False

    def put(self, job: Job, batches: Sequence[Any], settings: Replacement) -> Done:
        """Fills the places in `job.reduced`, in place.

        Args:
            job: the networks and who reads what goes.
            batches: what the job's task reads.
            settings: see `Replacement`.
        """
        raise NotImplementedError

    def check(self, settings: Replacement) -> None:
        """Refuses settings that have no meaning here. InputError: such a one."""
        for name, allowed in (("objective", self.objectives), ("curvature", self.curvatures)):
            value = getattr(settings, name)
            if value not in allowed and (name == "objective" or settings.objective != "distortion"):
                raise InputError(
                    f"{name}={value!r} is not for kind={self.name!r}, which takes {', '.join(allowed)}; change one"
                )


STAND_INS = Kinds("kind", StandInMethod)


def register_stand_in(name: str) -> Callable[[type[StandInMethod]], type[StandInMethod]]:
    """Class decorator: what goes may be replaced so, under this name."""
    return STAND_INS.register(name)


def find_stand_in(name: str) -> StandInMethod:
    """The method of a name, or of the class that `package.module:Class` names.

    Raises:
        InputError: unknown name, or no `StandInMethod`.
    """
    return STAND_INS.make(name)


@dataclass(frozen=True)
class Job:
    """One replacement.

    Attributes:
        model: the original network.
        dense: the same without the plan's blocks.
        reduced: without the plan's channels too; changed in place.
        plan: what `reduced` keeps: the plan given, and the carriers.
        carriers: group -> removed unit that stays and carries the constants.
        graph: of `dense`.
        flow: of `dense`.
        readers: layers of `dense` in forward order, with what the plan given takes from them.
        refused: layer -> why nothing stands in for what it loses.
        task: what a batch and an output mean.
    """

    model: nn.Module
    dense: nn.Module
    reduced: nn.Module
    plan: Plan
    carriers: Mapping[str, int]
    graph: ChannelGraph
    flow: Flow
    readers: Mapping[str, Reader]
    refused: dict[str, str]
    task: Task

    @classmethod
    def prepare(
        cls, model: nn.Module, plan: Plan, example_input: Any, method: StandInMethod, settings: Replacement, task: Task
    ) -> Job:
        """Surgery, and who reads what goes. InputError: as `replace_mechanisms`."""
        model = open_copy(model)  # its projections are layers of their own that can be read and solved again
        dense = apply_plan(model, Plan(plan.drop_blocks), example_input) if plan.drop_blocks else model
        graph, flow = trace_groups(dense, example_input), observe(dense, example_input)
        readers = find_readers(dense, plan, graph, flow)
        refused = {r.name: r.obstacle for r in readers.values() if r.removed and r.obstacle and method.changes}
        if refused and settings.unsupported == "refuse":
            name, reason = next(iter(refused.items()))
            groups = ", ".join(readers[name].groups)
            raise InputError(
                f"kind={method.name!r}: layer {name!r} reads units of group {groups} that the plan removes, "
                f"but {reason}; protect the group or set unsupported='delete'"
            )
        carriers: dict[str, int] = {}
        if settings.border == "carrier" and method.carries:
            plan, carriers = with_carriers(dense, plan, readers)
            wider = find_readers(dense, plan, graph, flow)
            readers = {name: replace(reader, written=wider[name].outputs) for name, reader in readers.items()}
            if plan.removes_nothing:
                raise InputError("border='carrier': the plan removes one unit a group, which its carrier would replace")
        reduced = apply_plan(model, plan, example_input)
        return cls(model, dense, reduced, plan, carriers, graph, flow, readers, refused, task)

    def losing(self) -> list[Reader]:
        """The layers that lose input channels and can be changed."""
        return [reader for reader in self.readers.values() if reader.removed and not reader.obstacle]


def example_of(task: Task, model: nn.Module, batch: Any) -> Example:
    """What the network is called with for a batch."""
    return task.inputs(task.to(batch, model))
