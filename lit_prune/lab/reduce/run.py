"""`reduce`: score, keep, compile, verify, cell by cell; and on a run folder, where it may train networks first."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import nn

from lit_prune.errors import InputError
from lit_prune.files import defined, read_json, write_json
from lit_prune.lab.reduce.bench import Bench, Repairing
from lit_prune.lab.reduce.diagnostics import curvature_rows, stress_rows
from lit_prune.lab.reduce.handover import hand_over
from lit_prune.lab.reduce.images import Images, evaluation_batches
from lit_prune.lab.reduce.request import ReduceRequest
from lit_prune.lab.reduce.tables import difference_table, reduction_table, summarise
from lit_prune.progress import Watch, progress_bars, terminal, unwatched
from lit_prune.structure import Plan
from lit_prune.structure.networks import epochs_done, find_network, load_network
from lit_prune.structure.record import note_plan, record_of
from lit_prune.tensor_files import read_torch
from lit_prune.train.distillation import Repair
from lit_prune.train.run_record import add_record
from lit_prune.train.teaching import Tutor

if TYPE_CHECKING:
    from lit_prune.data import ImageData
    from lit_prune.train.classifier import LitClassifier


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


Factory = Callable[[int, Path], tuple[pl.Trainer, "LitClassifier", "ImageData"]]


@dataclass(frozen=True)
class Setup:
    """What a reduction starts from.

    Attributes:
        trainer: for the device and the run folder.
        module: the network, trained or not.
        data: calibration and test images.
        ckpt_path: checkpoint of a fit, or None.
        make: builds a trainer, a module and data anew for a seed and a folder; None where nothing can be trained.
    """

    trainer: pl.Trainer
    module: LitClassifier
    data: ImageData
    ckpt_path: str | None = None
    make: Factory | None = None

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.trainer.default_root_dir)

    @property
    def trains(self) -> bool:
        """Whether each seed gets a network of its own: nothing trained was given."""
        there = (self.run_dir / "checkpoints" / "last.ckpt").is_file()
        return self.make is not None and not (self.module.is_trained or self.ckpt_path or there)

    def network(self, seed: int) -> nn.Module:
        """The seed's network, in evaluation mode on the trainer's device."""
        if not self.trains:
            found = find_network(self.module, self.run_dir, self.ckpt_path, "reduce")
        else:
            found = trained_network(self.make, seed, self.run_dir / f"seed={seed}")
        return found.to(self.trainer.strategy.root_device).eval()


def reduce_run(setup: Setup, request: ReduceRequest) -> None:
    """Carries out the verb; see `Trainer.reduce`."""
    setup.data.prepare_data()
    setup.data.setup("fit")
    setup.data.setup("test")
    images = Images(
        list(setup.data.calibration_dataloader()),
        evaluation_batches(setup.data.test_dataloader(), request.test_images, request.swaps.images),
    )
    repair = None
    if request.repair_epochs and setup.make is not None:
        repair = Repairer(setup, request)
    trains = setup.trains or request.repair_epochs  # training shows a bar of its own, and two at once fail
    with nullcontext(unwatched) if trains else progress_bars() as watch:
        arguments = {"run_dir": setup.run_dir, "repair": repair, "watch": watch}
        content = reduce(setup.network, images, request, **arguments)
    record = {"verb": "reduce", "data": setup.data.fingerprint(), "request": asdict(request)}
    add_record(setup.run_dir, "reduce", record)
    console = terminal()
    console.print(reduction_table(content))
    differences = difference_table(content)
    if differences is not None:
        console.print(differences)
    console.print(f"results: {setup.run_dir}/reduction.json")
    console.print(hand_over(setup.network, images, request, content, setup.run_dir))


def trained_network(make: Factory, seed: int, folder: Path) -> nn.Module:
    """The network of a seed, trained in `folder` as the configuration says, or as far as is missing.

    Args:
        make: builds trainer, module and data.
        seed: of initial weights and of the order of the images.
        folder: for its checkpoint.
    """
    last = folder / "checkpoints" / "last.ckpt"
    trainer, module, data = make(seed, folder)
    if epochs_done(last) < trainer.max_epochs:
        trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    return load_network(last, module.image_shape, trust=(module.backbone_name,))


@dataclass(frozen=True)
class Repairer:
    """Trains compiled networks further: the configuration's optimizer and schedule over `repair_epochs`.

    The teacher, where the request has distillation, is the network that was reduced.
    """

    setup: Setup
    request: ReduceRequest

    def __call__(self, network: nn.Module, dense: nn.Module, plan: Plan, folder: Path) -> nn.Module:
        """The trained network; an interrupted repair goes on from its checkpoint."""
        seed = self.request.seeds[0]
        trainer, module, data = self.setup.make(seed, folder)
        last = folder / "checkpoints" / "last.ckpt"
        trainer.fit_loop.max_epochs = self.request.repair_epochs
        module.backbone = note_plan(network.train(), record_of(module.backbone), plan)
        if self.request.repair is not None:
            trainer.callbacks.insert(0, Tutor(self._checked(self.request.repair), copy.deepcopy(dense)))
        if epochs_done(last) < self.request.repair_epochs:
            trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
        else:
            module.load_state_dict(read_torch(last, "checkpoint")["state_dict"])
        return module.backbone.eval()

    @staticmethod
    def _checked(repair: Repair) -> Repair:
        if repair.beta:
            raise InputError(f"request.repair.beta={repair.beta}: a reduced layer has other features; use beta=0")
        return repair
