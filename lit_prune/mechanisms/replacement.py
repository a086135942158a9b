"""Replaces the mechanisms that a plan removes and compiles what is left into a smaller dense network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.layers import Batches
from lit_prune.mechanisms.consumers import Reader, find_readers
from lit_prune.mechanisms.errors import output_errors
from lit_prune.mechanisms.flow import Flow, observe
from lit_prune.mechanisms.folding import add_to_output, set_weight
from lit_prune.mechanisms.refit import Pair, refit
from lit_prune.mechanisms.settings import KINDS, Replacement
from lit_prune.mechanisms.stand_ins import affine, collect_inputs, constants, fold
from lit_prune.structure import Plan, apply_plan

DEFAULT_REPLACEMENT = Replacement()
AFFINE_RIDGE = 1e-6


@dataclass(frozen=True)
class Reduced:
    """A reduced network and how faithful its parts are.

    Attributes:
        model: the smaller dense network; no masks, no hooks.
        report: plain values: `kind`, `images`, `groups` (kept, removed, readers), `layers` (one entry a layer changed:
            kept, removed, `error` of its output relative to the output's variance, ...), `refused`.
        plan: the plan to replay for the structure of `model`; beyond the plan given it may name biases that were added.
    """

    model: nn.Module
    report: dict[str, Any]
    plan: Plan


def replace_mechanisms(
    model: nn.Module,
    plan: Plan,
    batches: Batches,
    example_input: Tensor,
    kind: str = "delete",
    *,
    settings: Replacement = DEFAULT_REPLACEMENT,
) -> Reduced:
    """The network without what `plan` removes, with something in its place; `model` is untouched.

    The mechanism of a removed unit is what a layer reads from it: an input channel of that layer, behind norm,
    activation, pooling, depthwise convolution or gate. `delete`: zero (`apply_plan`). `constant`: its mean, folded into
    the reader's bias. `affine`: a ridge combination of kept input channels, folded into their columns. `refit`: the
    reader is solved again (see `refit`). A bias goes into the BatchNorm behind the reader where there is one, so the
    structure is the plan's; else the reader gains a bias, which `Reduced.plan` says.

    Args:
        model: the original network.
        plan: what to keep; its blocks are dropped first.
        batches: unaugmented (images, labels); labels are not read.
        example_input: [B, C, H, W], for tracing.
        kind: "delete", "constant", "affine" or "refit".
        settings: see `Replacement`.

    Raises:
        InputError: unknown kind, no images, or a layer in which nothing can stand in (it is named; see
            `Replacement.unsupported`).

    Source: causal mechanism reduction, section 3.2; refit: He et al. 2017, made sequential.
    """
    if kind not in KINDS:
        raise InputError(f"kind={kind!r} is unknown; use one of {', '.join(KINDS)}")
    images = _images(batches, settings.images)
    job = _Job.prepare(model, plan, example_input, kind, settings)
    layers, gained = _METHODS[kind](job, images)
    readers = [job.readers[name] for name in layers]
    errors = output_errors(job.dense, job.reduced, readers, job.flow.norms, images)
    for name, entry in layers.items():
        entry |= _shape(job.readers[name]) | errors[name].report(entry.pop("border", 0.0))
    final = replace(plan, added_biases=tuple(dict.fromkeys((*plan.added_biases, *gained)))) if gained else plan
    report = {
        "kind": kind,
        "images": sum(map(len, images)),
        "groups": _group_report(plan, layers, job.readers),
        "layers": layers,
        "refused": job.refused,
    }
    return Reduced(job.reduced, report, final)


@dataclass(frozen=True)
class _Job:
    """One replacement.

    Attributes:
        model: the original network.
        dense: the same without the plan's blocks.
        reduced: without the plan's channels too; changed in place.
        readers: layers of `dense` in forward order.
        flow: of `dense`.
        refused: layer -> why nothing stands in for what it loses.
    """

    model: nn.Module
    dense: nn.Module
    reduced: nn.Module
    readers: Mapping[str, Reader]
    flow: Flow
    refused: dict[str, str]
    settings: Replacement
    example_input: Tensor

    @classmethod
    def prepare(cls, model: nn.Module, plan: Plan, example_input: Tensor, kind: str, settings: Replacement) -> "_Job":
        """Surgery, and who reads what goes."""
        reduced = apply_plan(model, plan, example_input)
        dense = apply_plan(model, Plan(plan.drop_blocks), example_input) if plan.drop_blocks else model
        flow = observe(dense, example_input)
        readers = find_readers(dense, plan, example_input, flow)
        refused = {r.name: r.obstacle for r in readers.values() if r.removed and r.obstacle and kind != "delete"}
        if refused and settings.unsupported == "refuse":
            name, reason = next(iter(refused.items()))
            groups = ", ".join(readers[name].groups)
            raise InputError(
                f"kind={kind!r}: layer {name!r} reads units of group {groups} that the plan removes, but {reason}; "
                "protect the group or set unsupported='delete'"
            )
        return cls(model, dense, reduced, readers, flow, refused, settings, example_input)

    def losing(self) -> list[Reader]:
        """The layers that lose input channels and can be changed."""
        return [reader for reader in self.readers.values() if reader.removed and not reader.obstacle]


def _images(batches: Batches, limit: int) -> list[Tensor]:
    images, count = [], 0
    for batch, _ in batches:
        images.append(batch[: limit - count])
        count += len(images[-1])
        if count >= limit:
            break
    if not count:
        raise InputError("batches: no batch of (images, labels) in it; give at least one")
    return images


def _delete(job: _Job, images: Sequence[Tensor]) -> tuple[dict[str, dict], list[str]]:
    return {reader.name: {} for reader in job.losing()}, []


def _constant(job: _Job, images: Sequence[Tensor]) -> tuple[dict[str, dict], list[str]]:
    return _folded(job, images, parents=0)


def _affine(job: _Job, images: Sequence[Tensor]) -> tuple[dict[str, dict], list[str]]:
    return _folded(job, images, job.settings.parents)


def _folded(job: _Job, images: Sequence[Tensor], parents: int | None) -> tuple[dict[str, dict], list[str]]:
    """Constants (no parents) or affine combinations, fitted on the network before the surgery."""
    readers = job.losing()
    inputs = collect_inputs(job.dense, [reader.name for reader in readers], images)
    ridge = AFFINE_RIDGE if job.settings.ridge == "held_out" else job.settings.ridge
    report, gained = {}, []
    for reader in readers:
        sums = inputs[reader.name].sums
        stand_in = constants(sums, reader) if parents == 0 else affine(sums, reader, parents, ridge)
        folded = fold(job.dense.get_submodule(reader.name), reader, stand_in, inputs[reader.name].size)
        set_weight(job.reduced.get_submodule(reader.name), folded.weight)
        if add_to_output(job.reduced, reader.name, job.flow.norms.get(reader.name, ""), folded.shift):
            gained.append(reader.name)
        report[reader.name] = {
            "rows": int(sums.samples),
            "unexplained": stand_in.unexplained,
            "border": folded.border,
        } | ({"ridge": ridge} if parents != 0 else {})
    return report, gained


def _refit(job: _Job, images: Sequence[Tensor]) -> tuple[dict[str, dict], list[str]]:
    names = [reader.name for reader in job.losing()]
    if job.settings.scope == "all" or not names:
        names = _downstream(job)
    stops = job.flow.stops(names)
    return refit(Pair(job.model, job.reduced), stops, dict(job.readers), images, job.settings)


def _downstream(job: _Job) -> list[str]:
    """Every layer that can be solved again and whose input may have changed."""
    order = list(job.readers)
    lost = [position for position, name in enumerate(order) if job.readers[name].removed]
    first = min(lost, default=len(order))
    if job.dense is not job.model:
        original = dict.fromkeys(observe(job.model, job.example_input).layers)
        first = min(first, next(position for position, name in enumerate(original) if name not in job.readers))
    return [name for name in order[first:] if not job.readers[name].obstacle]


_METHODS = {"delete": _delete, "constant": _constant, "affine": _affine, "refit": _refit}


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
