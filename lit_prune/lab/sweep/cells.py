"""The cells of a sweep: what each one is, the file that holds its result."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from lit_prune.lab.ledger import signature
from lit_prune.lab.sweep.request import SweepRequest


@dataclass(frozen=True)
class Unit:
    """What is resampled by intervals: a checkpoint (its number in the list) and a seed of draws."""

    checkpoint: int
    seed: int


@dataclass(frozen=True)
class Cell:
    """One pruned network: which unit, how it is pruned, how it recovers."""

    unit: Unit
    method: str
    allocation: str
    removal: str
    recovery: str
    sparsity: float


def list_units(request: SweepRequest, checkpoints: int) -> list[Unit]:
    """Every checkpoint with every seed."""
    return [Unit(*pair) for pair in itertools.product(range(checkpoints), request.seeds)]


def list_cells(request: SweepRequest, checkpoints: int) -> Iterator[Cell]:
    """All cells of a sweep, a unit's together."""
    axes = (request.all_methods, request.allocations, request.removals, request.recoveries, request.sparsities)
    for unit in list_units(request, checkpoints):
        for values in itertools.product(*axes):
            yield Cell(unit, *values)


@dataclass(frozen=True)
class Keys:
    """Names of result files; equal exactly where all that a result depends on is equal.

    Attributes:
        request: the sweep.
        networks: fingerprint of each checkpoint's network.
        context: further plain values that every result depends on (data, precision).
    """

    request: SweepRequest
    networks: tuple[str, ...]
    context: dict[str, Any]

    def dense(self, checkpoint: int) -> str:
        """Of the dense network's cost and accuracy."""
        return self._name("dense", checkpoint, {"limit_test": self.request.limit_test})

    def plans(self, unit: Unit, method: str) -> str:
        """Of a method's plans in a unit, for all removals, allocations and sparsities."""
        wanted = {name: getattr(self.request, name) for name in ("removals", "allocations", "sparsities")}
        fields = {"method": method, "seed": unit.seed, **wanted, **self.request.planning}
        return self._name(f"{method}-seed{unit.seed}", unit.checkpoint, fields)

    def cell(self, cell: Cell) -> str:
        """Of a cell."""
        parts = (cell.method, cell.allocation, cell.removal, cell.recovery)
        label = f"{'-'.join(parts)}-{cell.sparsity:g}-seed{cell.unit.seed}"
        fields = asdict(cell) | {"unit": cell.unit.seed, "limit_test": self.request.limit_test}
        fields |= self.request.planning | self.request.recovery_fields(cell.recovery)
        return self._name(label, cell.unit.checkpoint, fields)

    def _name(self, label: str, checkpoint: int, fields: dict[str, Any]) -> str:
        signed = signature(self.networks[checkpoint], self.context, fields)
        return f"{re.sub(r'[^-.0-9A-Za-z_]+', '_', label)}-{signed[:16]}"
