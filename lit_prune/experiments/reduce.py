"""`reduce`: score, keep, compile, verify, for every method, width, calibration size and seed; cell by cell."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.data.calibration import stratified_order
from lit_prune.errors import InputError
from lit_prune.evaluation import evaluate
from lit_prune.experiments.analyze import fingerprint
from lit_prune.experiments.reduce_diagnostics import curvature_rows, stress_rows
from lit_prune.experiments.reduce_request import Method, ReduceRequest
from lit_prune.experiments.reduce_sites import Site, find_site
from lit_prune.experiments.reduce_tables import summarise
from lit_prune.files import write_json
from lit_prune.structure import Plan, cost

FILE = "reduction.json"
CHECKED_IMAGES = 64  # on which the compiled network is compared with what was verified
Batches = list[tuple[Tensor, Tensor]]
Watch = Callable[[Iterable, str], Iterator]
Repairing = Callable[[nn.Module, nn.Module, Plan, Path], nn.Module]  # compiled, original, plan, folder


def _unwatched(items: Iterable, description: str) -> Iterator:
    return iter(items)


@dataclass(frozen=True)
class Images:
    """Calibration images, from which each seed draws, and test images; batches of (images, labels)."""

    calibration: Batches
    test: Batches

    def drawn(self, size: int, classes: tuple[int, ...] | None, seed: int) -> Batches:
        """`size` calibration images of the classes, class-balanced, in batches as large as those given.

        Raises:
            InputError: there are fewer.
        """
        images = torch.cat([images for images, _ in self.calibration])
        labels = torch.cat([labels for _, labels in self.calibration])
        chosen = torch.arange(len(labels))
        if classes is not None:
            chosen = chosen[torch.isin(labels, torch.tensor(classes))]
        if len(chosen) < size:
            of = "" if classes is None else f" of classes {list(classes)}"
            raise InputError(
                f"request.calibration_sizes={size}: there are {len(chosen)} calibration images{of}; "
                "raise --data.calibration_size or ask for fewer"
            )
        order = stratified_order(labels[chosen], torch.Generator().manual_seed(seed))[:size]
        picked = chosen[order].split(len(self.calibration[0][1]))
        return [(images[part], labels[part]) for part in picked]


@dataclass(frozen=True)
class Cell:
    """One reduction of a seed's network."""

    method: Method
    kept: float
    calibration_size: int
    seed: int


class Store:
    """`reduction.json`: finished cells and diagnostics, each under the hash of all that its result depends on.

    Args:
        folder: the run folder; None keeps everything in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.file = None if folder is None else folder / FILE
        there = self.file is not None and self.file.is_file()
        self.content: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8")) if there else {"results": {}}

    def get(self, key: str) -> Any:
        """A finished result, or None."""
        return self.content["results"].get(key)

    def put(self, key: str, value: Any) -> None:
        """Keeps a result; the file is written whole."""
        self.content["results"][key] = value
        self.write()

    def write(self, **entries: Any) -> None:
        """Sets further keys and writes the file."""
        self.content.update(entries)
        if self.file is not None:
            write_json(self.file, self.content)


def reduce(
    networks: Callable[[int], nn.Module],
    images: Images,
    request: ReduceRequest,
    *,
    run_dir: str | Path | None = None,
    repair: Repairing | None = None,
    watch: Watch = _unwatched,
) -> dict[str, Any]:
    """Carries out a request; what is in the run folder already for the same networks and images is not done again.

    Args:
        networks: seed -> trained network.
        images: calibration and test images.
        request: where, how much, by which methods.
        run_dir: `reduction.json` is written there after every cell; None writes nothing.
        repair: trains a compiled network further, given the original, the plan and a folder; needed where
            `repair_epochs` is not 0.
        watch: wraps the list of cells for a progress bar.

    Returns:
        The content of `reduction.json`: `layer`, `units`, `request`, `cells` (in the file: their keys in `results`, the
        store that resuming reads), `stress`, `curvature`, `summary`, and `differences` (of every method from the first,
        paired over seeds, with 95 % intervals).

    Raises:
        InputError: as `find_site`, `ReduceRequest.width` and the methods.

    Source: causal mechanism reduction, sections 3 to 5.
    """
    folder = None if run_dir is None else Path(run_dir)
    store = Store(folder)
    keys: list[str] = []
    stress: list[dict] = []
    curvature: list[dict] = []
    for seed in watch(request.seeds, "seeds"):
        bench = Bench.build(networks(seed), images, request, seed)
        for cell in watch(bench.cells(), f"seed {seed}"):
            key = bench.key(asdict(cell))
            if store.get(key) is None:
                store.put(key, bench.run(cell, folder, repair))
            keys.append(key)
        for extra, rows, measure in (("stress", stress, stress_rows), ("curvature", curvature, curvature_rows)):
            if extra in request.extras:
                key = bench.key({"extra": extra, "draws": request.stress_draws, "seed": seed})
                if store.get(key) is None:
                    store.put(key, measure(bench.site, bench.drawn(request.calibration_sizes[0]), request, seed))
                rows += store.get(key)
    cells = [store.get(key) for key in keys]
    tables = summarise(cells, [method.label for method in request.methods])
    entries = {"layer": bench.layer, "units": bench.site.size, "request": request.to_dict(), "cells": keys}
    store.write(**entries, stress=stress, curvature=curvature, **tables)
    return {**store.content, "cells": cells}


@dataclass(frozen=True)
class Bench:
    """All that the cells of one seed share."""

    model: nn.Module
    site: Site
    images: Images
    request: ReduceRequest
    seed: int
    identity: str
    test: Any
    dense_accuracy: float

    @classmethod
    def build(cls, model: nn.Module, images: Images, request: ReduceRequest, seed: int) -> Bench:
        """Finds the site and looks at the test images once."""
        site = find_site(model, request.layer, images.test[0][0][:1])
        for kept in request.kept:
            request.width(kept, site.size)
        dense = evaluate(model, images.test).accuracy
        identity = fingerprint(model, _sizes(images))
        return cls(model, site, images, request, seed, identity, site.test(images.test), dense)

    @property
    def layer(self) -> str:
        """Name of the layer, also where none was asked for."""
        site = self.site
        named = getattr(site, "name", "") or (site.group.name if getattr(site, "group", None) else "")
        return named or site.reader

    def cells(self) -> list[Cell]:
        """Everything asked for, method by method."""
        request = self.request
        return [
            Cell(method, kept, size, self.seed)
            for size in request.calibration_sizes
            for kept in request.kept
            for method in request.methods
        ]

    def key(self, cell: dict[str, Any]) -> str:
        """Hash of all that a result depends on."""
        request = self.request.to_dict()
        shared = {name: request[name] for name in ("layer", "calibration_classes", "swaps", "repair_epochs", "repair")}
        text = json.dumps([self.identity, shared, cell], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def drawn(self, size: int) -> Batches:
        """The seed's calibration images."""
        return self.images.drawn(size, self.request.calibration_classes, self.seed)

    def run(self, cell: Cell, folder: Path | None, repair: Repairing | None) -> dict[str, Any]:
        """One cell, whole."""
        method, width = cell.method, self.request.width(cell.kept, self.site.size)
        seconds = {"score": 0.0, "compile": 0.0}
        state = self._reduce(cell, width, seconds)
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

    def _reduce(self, cell: Cell, width: int, seconds: dict[str, float]) -> Any:
        """Scores and compiles, in as many steps as the method has."""
        method, site = cell.method, self.site
        batches = self.drawn(cell.calibration_size)
        clock = time.perf_counter()
        state = site.begin(batches)
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

    @property
    def _swap_seed(self) -> int:
        return self.request.swaps.seed + self.seed

    @property
    def _example(self) -> Tensor:
        return self.images.test[0][0][:1]

    def _difference(self, network: nn.Module, state: Any) -> float | None:
        """Largest difference of logits between the compiled network and the head that was verified."""
        if not hasattr(state, "evidence"):
            return None
        batch = self.images.test[0][0][:CHECKED_IMAGES]
        device = next(network.parameters()).device
        with torch.no_grad():
            logits = network(batch.to(device)).cpu()
        values = self.test.values[: len(batch)]
        return float((logits - state.evidence.head.logits(values)).abs().max())

    def _repaired(
        self, network: nn.Module, plan: Plan | None, cell: Cell, folder: Path | None, repair: Repairing | None
    ) -> float:
        if repair is None or plan is None or folder is None:
            raise InputError(
                f"request.repair_epochs={self.request.repair_epochs}: layer {self.layer!r} cannot be trained further "
                "here; it needs a group of channels, a run folder and the command line"
            )
        name = self.key(asdict(cell))
        trained = repair(network, self.model, plan, folder / "cells" / name)
        return evaluate(trained, self.images.test).accuracy


def _sizes(images: Images) -> dict[str, Any]:
    """What says which images these are: their numbers, labels and the first one's values."""
    labels = [torch.cat([labels for _, labels in part]) for part in (images.calibration, images.test)]
    pixels = [part[0][0][:8].double().sum().item() for part in (images.calibration, images.test)]
    return {"labels": [hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in labels], "pixels": pixels}


def ranges(units: Iterable[int]) -> str:
    """Ascending numbers in short: `0-3,7,9-10`."""
    parts: list[list[int]] = []
    for unit in units:
        if parts and unit == parts[-1][1] + 1:
            parts[-1][1] = unit
        else:
            parts.append([unit, unit])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in parts)
