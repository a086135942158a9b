"""Replaces the mechanisms that a plan removes and compiles what is left into a smaller dense network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.measurement.layers import Batches
from lit_prune.replace.errors import output_errors
from lit_prune.replace.flow import Reader, observe
from lit_prune.replace.methods import (
    DEFAULT_REPLACEMENT,
    Done,
    Job,
    Replacement,
    StandInMethod,
    example_of,
    find_stand_in,
    register_stand_in,
)
from lit_prune.replace.refit import refit, refit_segments
from lit_prune.replace.segments import find_segments
from lit_prune.replace.side_by_side import Pair
from lit_prune.structure import Plan
from lit_prune.structure.example import Example
from lit_prune.structure.record import note_cut
from lit_prune.task import Task, settle
from lit_prune.task.batches import describe
from lit_prune.tensor_files import check_defined


@dataclass(frozen=True)
class Reduced:
    """A reduced network and how faithful its parts are.

    Attributes:
        model: the smaller dense network; no masks, no hooks.
        report: plain values: `kind`, `images`, `groups` (kept, removed, readers), `layers` (one entry a layer changed:
            kept, removed, `error` of its output relative to the output's variance, ...), `refused`.
        plan: the plan to replay for the structure of `model`; beyond the plan given it may name biases that were added
            and keep a carrier in some groups.
        carriers: group -> unit that stays only to carry constants (`border="carrier"`).
    """

    model: nn.Module
    report: dict[str, Any]
    plan: Plan
    carriers: Mapping[str, int] = field(default_factory=dict)


@checked
def replace_mechanisms(
    model: nn.Module,
    plan: Plan,
    batches: Batches,
    kind: str = "delete",
    example_input: Any = None,
    *,
    settings: Replacement = DEFAULT_REPLACEMENT,
    task: Task | str | None = None,
) -> Reduced:
    """The network without what `plan` removes, with something in its place; `model` is untouched.

    The mechanism of a removed unit is what a layer reads from it: an input channel of that layer, behind norm,
    activation, pooling, depthwise convolution or gate. `delete`: zero (`apply_plan`). `constant`: its mean, folded into
    the reader's bias. `affine`: a ridge combination of kept input channels, folded into their columns. `refit`: the
    reader is solved again (see `refit`). A bias goes into the BatchNorm behind the reader where there is one, so the
    structure is the plan's; else the reader gains a bias, which `Reduced.plan` says.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> plan = Plan(keep_channels={"0": (0, 3, 5)}, sizes={"0": 8})
    >>> found = replace_mechanisms(net, plan, [torch.randn(64, 4)], "constant")
    >>> found.model[2].in_features, found.report["images"]
    (3, 64)

    Args:
        model: the original network.
        plan: what to keep; its blocks are dropped first.
        batches: unaugmented; targets are read only where `settings.objective` is a loss.
        kind: "delete", "constant", "affine", "refit", or `package.module:Class` of a `StandInMethod`.
        example_input: what the network is called with, for tracing; None takes the first batch.
        settings: see `Replacement`.
        task: what a batch and an output mean; None recognises it.

    Raises:
        InputError: unknown kind, no images, or a layer in which nothing can stand in (it is named; see
            `Replacement.unsupported`).

    Source: causal mechanism reduction, section 3.2; refit: He et al. 2017, made sequential.
    """
    method = find_stand_in(kind)
    method.check(settings)
    task, batches = settle(task, model, batches)
    taken = take_batches(batches, settings.images, task)
    check_finite(model, taken, task)
    example_input = example_of(task, model, taken[0]) if example_input is None else example_input
    job = Job.prepare(model, plan, example_input, method, settings, task)
    with task.paired(job.dense, job.reduced):
        layers, gained = method.put(job, taken, settings)
        readers = [job.readers[name] for name in layers]
        errors = output_errors(job.dense, job.reduced, readers, job.flow.norms, taken, task)
    for name, entry in layers.items():
        entry |= _shape(job.readers[name]) | errors[name].report(entry.pop("border", 0.0))
    final = replace(job.plan, added_biases=tuple(dict.fromkeys((*plan.added_biases, *gained))))
    note_cut(job.reduced, model, final, example_input)
    report = {
        "kind": kind,
        "images": sum(map(task.size, taken)),
        "groups": _group_report(plan, layers, job.readers),
        "layers": layers,
        "refused": job.refused,
    }
    return Reduced(job.reduced, report, final, job.carriers)


def refitted(
    model: nn.Module, plan: Plan, batches: Sequence[Any], example_input: Any, settings: Replacement, task: Task
) -> nn.Module:
    """The network of `replace_mechanisms(kind="refit")` alone, without a report: for trials."""
    method = Refit()
    job = Job.prepare(model, plan, example_input, method, settings, task)
    with task.paired(job.dense, job.reduced):
        method.put(job, batches, settings)
    return job.reduced


def check_finite(model: nn.Module, batches: Sequence[Any], task: Task, source: str = "model") -> None:
    """Refuses a network, or inputs, that hold NaN or infinity.

    Raises:
        InputError: the tensor, or the number of the batch, is named.
    """
    check_defined(model.state_dict(), source)
    for number, batch in enumerate(batches):
        if not _is_finite(task.inputs(batch)):
            raise InputError(f"batches: batch {number} holds NaN or infinity in its inputs; leave it out or repair it")


def _is_finite(example: Example) -> bool:
    values = (*example.args, *example.kwargs.values())
    return all(torch.isfinite(v).all() for v in values if isinstance(v, Tensor) and v.is_floating_point())


def take_batches(batches: Batches, limit: int, task: Task) -> list[Any]:
    """The first `limit` samples, batch by batch.

    Raises:
        InputError: there is no image, or a batch is of another kind than the first.
    """
    taken: list[Any] = []
    count, kinds = 0, None
    for batch in batches:
        if count >= limit:
            break
        found = _kinds(task, batch)
        kinds = found if kinds is None else kinds
        if found != kinds:
            raise InputError(
                f"batches: batch {len(taken)} is {describe(batch)}, the first is {describe(taken[0])}; give a list of "
                "batches of one kind"
            )
        taken.append(batch if task.size(batch) <= limit - count else task.take(batch, limit - count))
        count += task.size(taken[-1])
    if not count:
        raise InputError("batches: there is no batch in it; give at least one")
    return taken


def _kinds(task: Task, batch: Any) -> set[tuple[int, bool]]:
    """Numbers of dimensions of what the network is called with, and whether it is floats; of lists of any length."""
    return {(tensor.ndim, tensor.is_floating_point()) for tensor in task.inputs(batch).tensors}


@register_stand_in("delete")
class Delete(StandInMethod):
    """Nothing."""

    changes = False

    def put(self, job: Job, batches: Sequence[Any], settings: Replacement) -> Done:
        """Leaves the readers as they are."""
        return {reader.name: {} for reader in job.losing()}, []


@register_stand_in("refit")
class Refit(StandInMethod):
    """The readers solved again, layer after layer, against the dense network's outputs."""

    renews = True

    def put(self, job: Job, batches: Sequence[Any], settings: Replacement) -> Done:
        """See `refit`."""
        names = [reader.name for reader in job.losing()]
        if settings.scope == "all" or not names:
            names = _downstream(job, example_of(job.task, job.model, job.task.take(batches[0], 1)))
        stops = job.flow.stops(names)
        pair, readers = Pair(job.model, job.reduced, job.task), dict(job.readers)
        layers, gained = refit(pair, stops, readers, batches, settings)
        if settings.together:
            example = example_of(job.task, job.model, job.task.take(batches[0], 1))
            segments = find_segments(job.dense, job.reduced, job.plan, job.graph, example, names)
            together = refit_segments(pair, segments, batches, settings)
            layers = {name: found | together.get(name, {}) for name, found in layers.items()}
        return layers, gained


def _downstream(job: Job, example: Example) -> list[str]:
    """Every layer that can be solved again and whose input may have changed."""
    order = list(job.readers)
    lost = [position for position, name in enumerate(order) if job.readers[name].removed]
    first = min(lost, default=len(order))
    if job.dense is not job.model:
        original = dict.fromkeys(observe(job.model, example).layers)
        first = min(first, next(position for position, name in enumerate(original) if name not in job.readers))
    return [name for name in order[first:] if not job.readers[name].obstacle]


def _shape(reader: Reader) -> dict[str, Any]:
    return {"groups": list(reader.groups), "kept": len(reader.kept), "removed": len(reader.removed)}


def _group_report(plan: Plan, layers: Mapping[str, dict], readers: Mapping[str, Reader]) -> dict[str, dict]:
    report = {}
    for name, kept in plan.keep_channels.items():
        if plan.removed(name):
            reading = [reader.name for reader in readers.values() if name in reader.groups]
            errors = {layer: layers[layer]["error"] for layer in reading if layer in layers}
            report[name] = {"kept": len(kept), "removed": len(plan.removed(name)), "readers": reading, "errors": errors}
    return report
