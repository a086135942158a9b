"""What `compress` found: the compact network compared with the original."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.replace import Reduced
from lit_prune.replace.errors import Spread
from lit_prune.running import undisturbed
from lit_prune.structure import apply_plan, cost
from lit_prune.structure.axes import EVEN
from lit_prune.structure.budgets import find_budget
from lit_prune.task import Task


class CompressionReport(dict[str, Any]):
    """The values that `compress` returns, a dictionary; printed, they are told in a few lines."""

    def __repr__(self) -> str:
        """Costs, distance to the original, what was cut, and the seconds."""
        dense, compact, plan = self["dense"], self["compact"], self["plan"]
        lines = [", ".join(_change(name, dense[name], compact[name]) for name in ("macs", "params"))]
        lines += [_change(name, dense[name], compact[name]) for name in compact if name not in ("macs", "params")]
        lines.append(
            f"agreement with the original {self['agreement']:.4g}, distortion of its prediction "
            f"{self['distortion']:.3g}, on the {self['images']} calibration samples"
        )
        if budget := self.get("budget"):
            lines.append(
                f"{budget['kind']} {budget['dense']:.4g} -> {budget['compact']:.4g} {budget['unit']} measured "
                f"({budget['measured']:.1%}, predicted {budget['predicted']:.1%}, the dense network's figures "
                f"{budget['spread']:.1%} apart)"
            )
        sizes, kept = plan["sizes"], plan["keep_channels"]
        cut = [name for name in kept if len(kept[name]) < sizes[name]]
        blocks = f"{len(plan['drop_blocks'])} blocks dropped, " if plan["drop_blocks"] else ""
        lines.append(f"{blocks}{len(cut)} groups of channels cut, {len(self['layers'])} layers solved again")
        if odd := [name for name in cut if len(kept[name]) % EVEN and not sizes[name] % EVEN]:
            lines.append(
                f"{len(odd)} of the {len(cut)} widths are no multiples of {EVEN}, as they were: kernels may take "
                f"longer for them than for the dense ones; Recipe(round_to={EVEN}) or a budget of time avoids it"
            )
        if whole := plan["notes"].get("without_scores"):
            named = ", ".join(whole[:3]) + (", ..." if len(whole) > 3 else "")
            lines.append(f"{len(whole)} groups left whole, which the score says nothing of: {named}")
        lines.append(", ".join(f"{name} {seconds:.1f} s" for name, seconds in self["seconds"].items()))
        return "\n".join(lines) + f"\nkeys: {', '.join(self)}"


def _change(name: str, before: float, after: float) -> str:
    """From the original to the compact network; counts with their share."""
    if name in ("macs", "params"):
        label = {"macs": "MACs", "params": "parameters"}[name]
        return f"{label} {before:,} -> {after:,} ({after / before:.1%})"
    return f"{name} {before:.4g} -> {after:.4g}"


def verify(model: nn.Module, reduced: Reduced, batches: Iterable[Any], example: Any, task: Task) -> dict[str, Any]:
    """Compares both networks on the batches and checks that the plan alone rebuilds the compact one's structure.

    Raises:
        RuntimeError: it does not.
    """
    rebuilt = apply_plan(model, reduced.plan, example)
    shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in (rebuilt, reduced.model)]
    if shapes[0] != shapes[1]:
        raise RuntimeError("the plan does not rebuild the compact network: their tensors have other shapes")
    comparison = Comparison(task, needs_figure=False)
    with undisturbed(model), undisturbed(reduced.model):
        for piece in (piece for batch in batches for piece in task.pieces(batch)):
            original, other = (task.run(net, task.to(piece, net)) for net in (model, reduced.model))
            comparison.add(original, other, piece)
    figures = comparison.figures()
    if comparison.refused:
        warnings.warn(f"compress: no {task.metric_name} is given: {comparison.refused}", stacklevel=4)
    report = {"plan": reduced.plan.to_dict(), "layers": reduced.report["layers"], "images": comparison.count}
    for name, net in (("dense", model), ("compact", reduced.model)):
        counted = cost(net, example)
        report[name] = {"macs": counted.macs, "params": counted.params} | figures.get(name, {})
    return report | comparison.distances()


def measure_budget(model: nn.Module, reduced: Reduced, example: Any) -> dict[str, Any]:
    """What a measured budget came to, see `compress`."""
    notes = reduced.plan.notes
    quantity = find_budget(notes["budget"])
    dense, compact = quantity.compare([model, reduced.model], example)
    shares = {name: notes[name] for name in ("requested", "predicted", "spread")}
    return {"kind": quantity.name, "unit": quantity.unit, "dense": dense, "compact": compact} | (
        shares | {"measured": compact / dense}
    )


@dataclass
class Comparison:
    """Sums over samples of two networks' outputs, the original's first.

    Attributes:
        task: says what they mean.
        needs_figure: whether targets that the task refuses are an error; else there is no figure.
        refused: why there is none.
    """

    task: Task
    needs_figure: bool = True
    refused: str = ""
    count: int = 0
    agreed: float = 0.0
    squared: float = 0.0
    spread: Spread = field(default_factory=Spread)  # of the original's values
    metrics: tuple[Tensor, ...] = ()

    def add(self, original: Any, other: Any, batch: Any) -> None:
        """Adds one batch."""
        task = self.task
        answers = [task.compared(output) for output in (original, other)]
        before, after = (values.double().reshape(len(values), -1) for values in answers)
        self.count += len(before)
        if task.decides:
            self.agreed += float(task.agreement(*answers).sum())
        self.squared += float((after - before).square().sum())
        self.spread.add(before)
        if task.needs_target and not self.refused and task.target(batch) is not None:
            self._add_figure(original, other, batch)

    def _add_figure(self, original: Any, other: Any, batch: Any) -> None:
        try:
            found = tuple(self.task.metric(output, batch) for output in (original, other))
        except InputError as error:
            if self.needs_figure:
                raise
            self.refused, self.metrics = str(error), ()
            return
        self.metrics = tuple(a + b for a, b in zip(self.metrics, found, strict=True)) if self.metrics else found

    def distances(self) -> dict[str, float]:
        """`distortion` and `agreement`."""
        variance = self.spread.variance() * self.count
        distortion = self.squared / variance if variance else self.squared
        return {
            "distortion": distortion,
            "agreement": self.agreed / self.count if self.task.decides else 1 - distortion,
        }

    def figures(self) -> dict[str, dict[str, float]]:
        """The task's figure of both networks, under its name; empty without targets."""
        if not self.metrics:
            return {}
        names = ("dense", "compact")
        return {
            name: {self.task.metric_name: self.task.figure(sums.cpu())}
            for name, sums in zip(names, self.metrics, strict=True)
        }
