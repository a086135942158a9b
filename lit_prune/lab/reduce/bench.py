"""The bench of a reduction: one seed's network, images and request, on which cells are computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.lab.ledger import signature
from lit_prune.lab.reduce.images import Batches, Images, first_images
from lit_prune.lab.reduce.request import ReduceMethod, ReduceRequest
from lit_prune.lab.reduce.sites import Site, find_site
from lit_prune.structure import Plan, cost
from lit_prune.structure.networks import fingerprint
from lit_prune.train.evaluation import evaluate

CHECKED_IMAGES = 64  # on which the compiled network is compared with what was verified
Repairing = Callable[[nn.Module, nn.Module, Plan, Path], nn.Module]  # compiled, original, plan, folder


@dataclass(frozen=True)
class ReduceCell:
    """One reduction of a seed's network."""

    method: ReduceMethod
    kept: float
    calibration_size: int
    seed: int


@dataclass(frozen=True)
class Bench:
    """All that the cells of one seed share; the test images are looked at once, when a cell needs them."""

    model: nn.Module
    site: Site
    images: Images
    request: ReduceRequest
    seed: int
    identity: str

    @classmethod
    def build(cls, model: nn.Module, images: Images, request: ReduceRequest, seed: int) -> Bench:
        """Finds the site and checks the widths."""
        site = find_site(model, request.layer, first_images(images.test, 1))
        for kept in request.kept:
            request.width(kept, site.size)
        return cls(model, site, images, request, seed, fingerprint(model, images.fingerprint()))

    @cached_property
    def test(self) -> Any:
        """What the site needs of the test images."""
        return self.site.test(self.images.test)

    @cached_property
    def dense_accuracy(self) -> float:
        """Accuracy of the original."""
        return evaluate(self.model, self.images.test).figure

    @property
    def layer(self) -> str:
        """Name of the layer, also where none was asked for."""
        site = self.site
        named = getattr(site, "name", "") or (site.group.name if getattr(site, "group", None) else "")
        return named or site.reader

    def cells(self) -> list[ReduceCell]:
        """Everything asked for, method by method."""
        request = self.request
        return [
            ReduceCell(method, kept, size, self.seed)
            for size in request.calibration_sizes
            for kept in request.kept
            for method in request.methods
        ]

    def cell_key(self, cell: ReduceCell) -> str:
        """Hash of all that the cell's result depends on."""
        return self.key(asdict(cell))

    def key(self, what: dict[str, Any]) -> str:
        """Hash of `what` and all else that a result depends on."""
        request = asdict(self.request)
        shared = {name: request[name] for name in ("layer", "calibration_classes", "swaps", "repair_epochs", "repair")}
        return signature(self.identity, shared, what)[:16]

    def drawn(self, size: int) -> Batches:
        """The seed's calibration images."""
        return self.images.drawn(size, self.request.calibration_classes, self.seed)

    def run(self, cell: ReduceCell, folder: Path | None, repair: Repairing | None) -> dict[str, Any]:
        """One cell, whole."""
        method, width = cell.method, self.request.width(cell.kept, self.site.size)
        seconds = {"score": 0.0, "compile": 0.0}
        state = self._reduce(cell, seconds)
        clock = time.perf_counter()
        accuracy, found = self.site.verify(state, self.test, replace(self.request.swaps, seed=self._swap_seed))
        seconds["verify"] = time.perf_counter() - clock
        network, plan = self.site.network(state)
        result = {
            "seed": cell.seed,
            "method": method.label,
            "kept": cell.kept,
            "width": width,
            "units": self.site.size,
            "calibration_size": cell.calibration_size,
            "accuracy_dense": self.dense_accuracy,
            "accuracy": accuracy,
            **found.report(),
            "macs": cost(network, self._example).macs,
            "params": sum(parameter.numel() for parameter in network.parameters()),
            "compiled_difference": self._difference(network, state),
            "compiled": state.report,
            "curvature_method": self.site.curvature_method,
            "kept_units": ranges(state.kept),
            "seconds": seconds,
        }
        if self.request.repair_epochs:
            result["accuracy_repaired"] = self._repaired(network, plan, cell, folder, repair)
        return result

    def network(self, cell: ReduceCell) -> tuple[nn.Module, Plan | None]:
        """The cell's compiled network, and the plan of its structure where a plan can say it."""
        return self.site.network(self._reduce(cell, {"score": 0.0, "compile": 0.0}))

    def _reduce(self, cell: ReduceCell, seconds: dict[str, float]) -> Any:
        """Scores and compiles, in as many steps as the method has."""
        method, site = cell.method, self.site
        width = self.request.width(cell.kept, site.size)
        state, seconds["score"] = self._begin(cell.calibration_size)
        clock = time.perf_counter()
        for step in range(1, method.steps + 1):
            left = round(site.size + (width - site.size) * step / method.steps)
            if left >= len(state.kept):
                continue
            ranks = site.rank(state, method.score, cell.seed)
            best = ranks.argsort(descending=True, stable=True)[:left].tolist()
            kept = sorted(state.kept[place] for place in best)
            seconds["score"] += time.perf_counter() - clock
            clock = time.perf_counter()
            state = site.reduce(state, kept, method.kind, method.settings(cell.seed))
            seconds["compile"] += time.perf_counter() - clock
            clock = time.perf_counter()
        return state

    def _begin(self, size: int) -> tuple[Any, float]:
        """What all cells of one calibration size start from, and the seconds that its one pass over images took."""
        if size not in self._starts:
            clock = time.perf_counter()
            state = self.site.begin(self.drawn(size))
            self._starts[size] = (state, time.perf_counter() - clock)
        return self._starts[size]

    @cached_property
    def _starts(self) -> dict[int, tuple[Any, float]]:
        return {}

    @property
    def _swap_seed(self) -> int:
        return self.request.swaps.seed + self.seed

    @property
    def _example(self) -> Tensor:
        return first_images(self.images.test, 1)

    def _difference(self, network: nn.Module, state: Any) -> float | None:
        """Largest difference of logits between the compiled network and the head that was verified."""
        if not hasattr(state, "evidence"):
            return None
        batch = first_images(self.images.test, CHECKED_IMAGES)
        device = next(network.parameters()).device
        with torch.no_grad():
            logits = network(batch.to(device)).cpu()
        values = self.test.values[: len(batch)]
        return float((logits - state.evidence.head.logits(values)).abs().max())

    def _repaired(
        self, network: nn.Module, plan: Plan | None, cell: ReduceCell, folder: Path | None, repair: Repairing | None
    ) -> float:
        if repair is None or plan is None or folder is None:
            raise InputError(
                f"request.repair_epochs={self.request.repair_epochs}: layer {self.layer!r} cannot be trained further "
                "here; it needs a group of channels, a run folder and the command line"
            )
        name = self.cell_key(cell)
        trained = repair(network, self.model, plan, folder / "cells" / name)
        return evaluate(trained, self.images.test).figure


def ranges(units: Iterable[int]) -> str:
    """Ascending numbers in short: `0-3,7,9-10`."""
    parts: list[list[int]] = []
    for unit in units:
        if parts and unit == parts[-1][1] + 1:
            parts[-1][1] = unit
        else:
            parts.append([unit, unit])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in parts)
