"""A sweep in its folder: computes the cells that are missing and puts them into one table."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.progress import track

from lit_prune.lab.ledger import Ledger
from lit_prune.lab.sweep.executors import Execute
from lit_prune.lab.sweep.request import Cell, Keys, list_cells, list_units
from lit_prune.lab.sweep.work import Piece, SweepJob, measure_dense, plan_unit, run_cell
from lit_prune.scores import find_score
from lit_prune.structure.record import record_of


@dataclass(frozen=True)
class Sweep:
    """A sweep in its folder.

    Attributes:
        job: networks, data, request.
        keys: names of result files.
        folder: holds `dense/`, `plans/` and `cells/`.
        checkpoints: names of the networks.
    """

    job: SweepJob
    keys: Keys
    folder: Path
    checkpoints: tuple[str, ...]

    def ledger(self, name: str) -> Ledger:
        """The results of one kind."""
        return Ledger(self.folder / name)

    def fill(self, execute: Execute) -> None:
        """Computes what is missing: first what cells share, then the cells; each is written when done."""
        self._measure(execute)
        self._plan(execute)
        self._fill_cells(execute)

    def _measure(self, execute: Execute) -> None:
        ledger = self.ledger("dense")
        missing = [n for n in range(len(self.checkpoints)) if not ledger.has(self.keys.dense(n))]
        for number, result in execute([Piece(measure_dense, (n,)) for n in missing]):
            if "error" in result:
                raise SystemExit(f"error: {self.checkpoints[missing[number]]} cannot be measured: {result['error']}")
            ledger.keep_value(self.keys.dense(missing[number]), result)

    def _plan(self, execute: Execute) -> None:
        ledger, methods = self.ledger("plans"), self.job.request.all_methods
        wanted = {
            unit: tuple(method for method in methods if not ledger.has(self.keys.plans(unit, method)))
            for unit in list_units(self.job.request, len(self.checkpoints))
        }
        tasks = [Piece(plan_unit, (unit, names)) for unit, names in wanted.items() if names]
        for number, result in track(execute(tasks), "scores and plans", total=len(tasks), transient=True):
            unit, names = tasks[number].arguments
            for method in names:
                ledger.keep_value(self.keys.plans(unit, method), result.get(method) or {"error": result["error"]})

    def _fill_cells(self, execute: Execute) -> None:
        ledger = self.ledger("cells")
        cells = list(list_cells(self.job.request, len(self.checkpoints)))
        missing = [cell for cell in cells if not ledger.has(self.keys.cell(cell))]
        plans = {cell: self._plan_of(cell) for cell in missing}
        ready = [cell for cell in missing if "error" not in plans[cell]]
        for cell in missing:
            if "error" in plans[cell]:
                ledger.keep_value(self.keys.cell(cell), {**plans[cell], "cell": asdict(cell), "seconds": 0.0})
        tasks = [Piece(run_cell, (cell, plans[cell])) for cell in ready]
        for number, result in track(execute(tasks), "cells", total=len(tasks), transient=True):
            cell = ready[number]
            ledger.keep_value(self.keys.cell(cell), {**result, "cell": asdict(cell)})

    def _plan_of(self, cell: Cell) -> dict[str, Any]:
        """The entry of a cell's plan, with what it is or with `error`."""
        found = self.ledger("plans").value(self.keys.plans(cell.unit, cell.method))
        wanted = (cell.removal, cell.allocation, cell.sparsity)
        for entry in found.get("plans", ()):
            if (entry["removal"], entry["allocation"], entry["sparsity"]) == wanted:
                return entry
        return {"error": found["error"]}

    def table(self) -> pd.DataFrame:
        """One row a cell, in the order of the request; failed cells have NaN results and their error."""
        dense = [self.ledger("dense").value(self.keys.dense(n)) for n in range(len(self.checkpoints))]
        cells = list_cells(self.job.request, len(self.checkpoints))
        ledger = self.ledger("cells")
        return pd.DataFrame(
            [self._row(cell, ledger.value(self.keys.cell(cell)), dense[cell.unit.checkpoint]) for cell in cells]
        )

    def _row(self, cell: Cell, result: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
        checkpoint, several = self.checkpoints[cell.unit.checkpoint], len(self.checkpoints) > 1
        request, data = self.job.request, self.job.data
        checks = result.get("accuracy_checks", {})
        return {
            "backbone": record_of(self.job.networks[cell.unit.checkpoint]).backbone,
            "checkpoint": checkpoint,
            "seed": cell.unit.seed,
            "unit": checkpoint if several else str(cell.unit.seed),
            "unit_kind": "model" if several else "draw",
            "method": cell.method,
            "axis": find_score(cell.method).score.axis,
            "allocation": cell.allocation,
            "removal": cell.removal,
            "recovery": cell.recovery,
            "sparsity": cell.sparsity,
            "channels_removed": result.get("channels_removed", np.nan),
            "plan_met": result.get("plan_met"),
            "macs_removed": 1 - result.get("macs", np.nan) / dense["macs"],
            "macs_dense": dense["macs"],
            "macs": result.get("macs", np.nan),
            "params_dense": dense["params"],
            "params": result.get("params", np.nan),
            "accuracy_dense": dense["accuracy"],
            "accuracy_before": result.get("accuracy_before", np.nan),
            "accuracy_repaired": checks.get("0", np.nan),  # without training
            **{f"accuracy_batches_{n}": checks.get(str(n), np.nan) for n in request.recovery_checks},
            "accuracy_after": result.get("accuracy_after", np.nan),
            "batches": result.get("batches", 0),
            "first": "none",
            **{k: v for k, v in request.recovery_fields(cell.recovery).items() if k != "recovery_checks"},
            **request.planning,
            "batch_size": data.batch_size,
            "calibration_images": len(data.calibration_indices),
            "test_images": dense["test_images"],
            "precision": self.job.precision,
            "seconds": result["seconds"],
            "error": result.get("error"),
        }
