"""`reduce`: score, keep, compile, verify, for every method, width, calibration size and seed; cell by cell."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from lit_prune.files import defined, read_json, write_json
from lit_prune.lab.reduce.bench import Bench, Repairing
from lit_prune.lab.reduce.diagnostics import curvature_rows, stress_rows
from lit_prune.lab.reduce.images import Images
from lit_prune.lab.reduce.request import ReduceRequest
from lit_prune.lab.reduce.tables import summarise
from lit_prune.progress import Watch, unwatched

FILE = "reduction.json"


class ReductionFile:
    """`reduction.json`: what is finished, under the hash of all that it depends on, and the tables of each request.

    Args:
        folder: the run folder; None keeps everything in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.file = None if folder is None else folder / FILE
        self.content: dict[str, Any] = {"results": {}, "requests": []}
        if self.file is not None and self.file.is_file():
            self.content = read_json(self.file, ("results", "requests"))

    def get(self, key: str) -> Any:
        """A finished result, or None."""
        return self.content["results"].get(key)

    def put(self, key: str, value: Any) -> None:
        """Keeps a result; the file is written whole."""
        self.content["results"][key] = defined(value)
        self._write()

    def conclude(self, tables: dict[str, Any]) -> None:
        """Keeps the tables of a request; those of the same request are replaced, those of others stay."""
        asked = json.dumps(tables["request"], sort_keys=True)
        others = [json.dumps(there["request"], sort_keys=True) for there in self.content["requests"]]
        place = others.index(asked) if asked in others else len(others)
        self.content["requests"][place : place + 1] = [tables]
        self._write()

    def _write(self) -> None:
        if self.file is not None:
            write_json(self.file, self.content)


def reduce(
    networks: Callable[[int], nn.Module],
    images: Images,
    request: ReduceRequest,
    *,
    run_dir: str | Path | None = None,
    repair: Repairing | None = None,
    watch: Watch = unwatched,
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
        What the list `requests` of `reduction.json` has of this request: `layer`, `units`, `request`, `keys` of the
        cells in `results` (the store that resuming reads), `stress`, `curvature`, `summary`, and `differences` (of
        every method from the first, paired over seeds, with 95 % intervals); and `cells`, the results themselves.

    Raises:
        InputError: as `find_site`, `ReduceRequest.width` and the methods.

    Source: causal mechanism reduction, sections 3 to 5.
    """
    folder = None if run_dir is None else Path(run_dir)
    store = ReductionFile(folder)
    keys: list[str] = []
    stress: list[dict] = []
    curvature: list[dict] = []
    for seed in watch(request.seeds, "seeds"):
        bench = Bench.build(networks(seed), images, request, seed)
        for cell in watch(bench.cells(), f"seed {seed}"):
            key = bench.cell_key(cell)
            if store.get(key) is None:
                store.put(key, bench.run(cell, folder, repair))
            keys.append(key)
        for extra, rows, measure in (("stress", stress, stress_rows), ("curvature", curvature, curvature_rows)):
            if extra in request.extras:
                size, scores = request.calibration_sizes[0], sorted({method.score for method in request.methods})
                what = {"extra": extra, "draws": request.stress_draws, "scores": scores, "calibration_size": size}
                key = bench.key({**what, "seed": seed})
                if store.get(key) is None:
                    store.put(key, measure(bench.site, bench.drawn(size), request, seed))
                rows += store.get(key)
    cells = [store.get(key) for key in keys]
    tables = {"layer": bench.layer, "units": bench.site.size, "request": asdict(request), "keys": keys}
    tables |= {"stress": stress, "curvature": curvature}
    tables |= summarise(cells, [method.label for method in request.methods])
    store.conclude(tables)
    return {**tables, "cells": cells}
