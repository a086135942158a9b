"""What works on which network: a table of cases x (measure, scores, plan and cut, stand-ins, save and load, callbacks).

    python benchmarks/tasks.py [CASE ...]

Random weights and small inputs, so the figures say that things fit together and not how good a network is. `cut`:
largest difference, relative to the largest output, between the cut network and the dense one with the readers' columns
zeroed. `stand-ins`: distortion of the prediction after delete / constant / affine / refit, share of its own power.
`save`: the same difference between the saved and the loaded network. A refusal is its line.
"""

import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from task_cases import CASES, Case
from task_fit import fit
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.channel_table import measure
from lit_prune.replace import Replacement, replace_mechanisms
from lit_prune.scores import Evidence, find_score, plan_method
from lit_prune.structure import Budget, CostModel, apply_plan, load_compact, save_compact
from lit_prune.structure.axes import is_weighted
from lit_prune.structure.record import describe_inputs
from lit_prune.task import Task, find_task, recognise
from lit_prune.train.batchnorm import recalibrate_batchnorm

LABELLED = ("taylor", "cmr_const", "cmr_affine", "composite_pid", "label_information")
FREE = ("magnitude", "variance", "cmr_logit", "composite_ix", "chip", "mipp", "reconstruction")
KINDS = ("delete", "constant", "affine", "refit")
ERRORS = (ImportError, LookupError, AttributeError, AssertionError, RuntimeError, TypeError, ValueError)


@dataclass
class Row:
    """One case, filled column by column; a column that raises holds what was said.

    Attributes:
        case: what is examined.
        cells: column -> text.
    """

    case: Case
    cells: dict[str, str] = field(default_factory=dict)

    def fill(self) -> dict[str, str]:
        """Runs all columns, one after the other."""
        torch.manual_seed(0)
        self.model = self.case.build().eval()
        self.batches = [self.case.batch(self.case.samples) for _ in range(2)]
        self.attempt("task", self.recognised)
        if not hasattr(self, "task"):
            return self.cells
        recalibrate_batchnorm(self.model, self.batches, task=self.task)
        for column in ("measure", "scores", "cut", "stand-ins", "save", "callbacks"):
            self.attempt(column, getattr(self, column.replace("-", "_")))
        return self.cells

    def attempt(self, column: str, examine: Callable[[], str]) -> None:
        """One cell; an error is its first line, with its type where it is not meant for a user."""
        try:
            self.cells[column] = examine()
        except ERRORS as error:
            line = (str(error).strip().splitlines() or [""])[0]
            self.cells[column] = line if isinstance(error, InputError) else f"{type(error).__name__}: {line}"

    def recognised(self) -> str:
        """The task."""
        given = self.case.task
        self.task: Task = recognise(self.model, self.batches[0]) if given is None else find_task(given)
        return (self.task.name or "custom") + ("" if given is None else ", given")

    def measure(self) -> str:
        """Channels, and share of the live ones with a value on the target axis."""
        table = measure(self.model, self.batches, task=self.case.task)
        live = table[~table["dead"]]
        both = (live["input_capture"].notna().mean(), live["task_information"].notna().mean())
        return f"{len(table)} channels, I_X {both[0]:.0%}, I_T {both[1]:.0%}"

    def scores(self) -> str:
        """Which scores work."""
        said, works = {}, 0
        self.evidence = Evidence(self.model, self.batches, task=self.task)
        for name in (*FREE, *LABELLED):
            try:
                works += bool(find_score(name).at(1 - self.case.keep).ranks(self.evidence))
            except ERRORS as error:
                line = (str(error).strip().splitlines() or [""])[0]
                said[name] = line if isinstance(error, InputError) else f"{type(error).__name__}: {line}"
        by_line: dict[str, list[str]] = {}
        for name, line in said.items():
            by_line.setdefault(line, []).append(name)
        missing = "; ".join(f"{', '.join(names)}: {line}" for line, names in by_line.items())
        return f"{works} of {len(FREE) + len(LABELLED)}" + (f" ({missing})" if missing else "")

    def cut(self) -> str:
        """Plan, surgery, equality."""
        self.example, graph = self.evidence.example, self.evidence.graph
        price = CostModel.build(self.model, graph, self.example)
        plan = plan_method(self.evidence, "cmr_logit", graph, price, Budget("macs", self.case.keep))
        self.small, self.plan = apply_plan(self.model, plan, self.example), plan
        removed = {name: plan.removed(name) for name in plan.keep_channels if plan.removed(name)}
        zeroed = apply_zeros(self.model, graph.removed_positions(removed))
        kept = price.macs(price.widths(plan.keep_channels)) / price.macs(price.sizes)
        return (
            f"{len(removed)} of {len(graph.groups)} groups, {kept:.0%} MACs, {self.difference(zeroed, self.small):.1e}"
        )

    def stand_ins(self) -> str:
        """Distortion of the prediction after each kind."""
        found = []
        settings = Replacement(unsupported="delete")
        for kind in KINDS if self.case.samples > 4 else ("constant", "refit"):
            reduced = replace_mechanisms(
                self.model, self.plan, self.batches, kind, self.example, settings=settings, task=self.task
            )
            self.reduced = reduced
            found.append(f"{self.distortion(reduced.model):.3f}")
        refused = f", {len(reduced.report['refused'])} refused" if reduced.report["refused"] else ""
        return " / ".join(found) + refused

    def save(self) -> str:
        """Saved, loaded on a dense instance."""
        inputs = describe_inputs(self.example)
        with tempfile.TemporaryDirectory() as folder:
            save_compact(
                folder + "/compact",
                self.small,
                backbone=None,
                arguments={},
                input_shape=None,
                plans=[self.plan],
                inputs=inputs,
            )
            torch.manual_seed(1)
            loaded = load_compact(folder + "/compact", model=self.case.build())
        return f"{self.difference(self.small, loaded):.1e}"

    def callbacks(self) -> str:
        """A fit with both callbacks."""
        return fit(self.case, self.task)

    def predictions(self, model: nn.Module) -> list[Tensor]:
        """What the network predicts for the batches, without targets where they change how it runs."""
        with torch.no_grad():
            torch.manual_seed(0)
            return [self.task.compared(self.task.run(model, batch)) for batch in self.batches]

    def difference(self, one: nn.Module, other: nn.Module) -> float:
        """Largest difference over the largest value."""
        pairs = list(zip(self.predictions(one), self.predictions(other), strict=True))
        return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)

    def distortion(self, other: nn.Module) -> float:
        """Mean squared difference of the predictions over their variance across samples and values."""
        a, b = (torch.cat(self.predictions(model)).double() for model in (self.model, other))
        return float((a - b).square().mean() / (a - a.mean(0)).square().mean())


def apply_zeros(model: nn.Module, removed: dict[tuple[str, str], list[int]]) -> nn.Module:
    """A copy of the network whose layers read nothing of what is removed."""
    zeroed = deepcopy(model)
    modules = dict(zeroed.named_modules())
    for (name, axis), positions in removed.items():
        module = modules.get(name)
        if axis != "in" or not is_weighted(module):
            continue
        dimension = 0 if getattr(module, "transposed", False) else 1
        with torch.no_grad():
            module.weight.index_fill_(dimension, torch.tensor(positions), 0.0)
    return zeroed


def main(names: Iterable[str]) -> None:
    """Prints a table in markdown, row by row as they are ready."""
    warnings.filterwarnings("ignore")
    columns = ("task", "measure", "scores", "cut", "stand-ins", "save", "callbacks")
    print("| case | " + " | ".join(columns) + " | s |\n|" + " --- |" * (len(columns) + 2), flush=True)
    for name in names:
        clock = time.perf_counter()
        cells = Row(CASES[name]).fill()
        seconds = time.perf_counter() - clock
        print(f"| {name} | " + " | ".join(cells.get(c, "") for c in columns) + f" | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or CASES)
