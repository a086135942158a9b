"""The curve table: what a network is worth at several budgets, without training and after growing repair."""

import copy
import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_prune.arguments import check_counts, check_seeds, checked
from lit_prune.compression import Clock, Recipe, compress
from lit_prune.errors import InputError
from lit_prune.files import read_json
from lit_prune.lab.judging import Judge
from lit_prune.progress import Watch, unwatched
from lit_prune.replace.distil import Distilling, distil
from lit_prune.replace.replacement import take_batches
from lit_prune.structure.budgets import find_budget
from lit_prune.structure.compact import REPORT, load_compact, save_compact
from lit_prune.structure.networks import fingerprint
from lit_prune.task import Task, settle
from lit_prune.tensor_files import tensor_bytes


@checked
@dataclass(frozen=True)
class CurveRequest:
    """The points of the curve.

    Attributes:
        keep: shares of the budget that stay, each in (0, 1).
        repair: seconds of repair after the cut, each at least 0; 0 is no training at all.
        budget: what `keep` is a share of, as in `compress`.
        images: calibration samples at the most.
        repair_images: samples that are repaired on at the most.
        evaluation_images: samples that the figure is of, at the most; None takes all.
        seed: of all that is drawn.
    """

    keep: tuple[float, ...] = (0.7, 0.5, 0.3)
    repair: tuple[float, ...] = (0.0, 30.0, 120.0)
    budget: str = "macs"
    images: int = 2000
    repair_images: int = 5000
    evaluation_images: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values. InputError: a share outside (0, 1), seconds below 0, an unknown budget, no images."""
        if not self.keep or not all(0 < share < 1 for share in self.keep):
            raise InputError(f"keep={list(self.keep)}: give shares in (0, 1)")
        if not self.repair or min(self.repair) < 0:
            raise InputError(f"repair={list(self.repair)}: give seconds, 0 for no training")
        check_counts(self, {"images": 1, "repair_images": 1})
        if self.evaluation_images is not None:
            check_counts(self, {"evaluation_images": 1})
        check_seeds(self.seed)
        find_budget(self.budget)

    @property
    def points(self) -> list[tuple[float, float]]:
        """All (keep, seconds of repair): the largest networks first, of each the shortest repair."""
        shares, repairs = sorted(set(self.keep), reverse=True), sorted(set(self.repair))
        return [(share, seconds) for share in shares for seconds in repairs]


def curve(
    model: nn.Module,
    batches: Iterable[Any],
    request: CurveRequest = CurveRequest(),
    repair: Iterable[Any] | None = None,
    evaluation: Iterable[Any] | None = None,
    task: Task | str | None = None,
    folder: str | Path | None = None,
    watch: Watch = unwatched,
) -> pd.DataFrame:
    """Compresses to each budget, repairs for each time, and judges every network; `model` is untouched.

    With `folder` every network is kept there as soon as it is done, in a compact folder of its own with its figures in
    `report.json`, and a curve that was stopped, or is asked for with more points, goes on from there.

    Args:
        model: any trained network that `trace_groups` can follow.
        batches: calibration samples, unaugmented, for `compress`.
        request: which points.
        repair: samples for `distil`, best augmented as in training; None takes the calibration samples.
        evaluation: samples that the figure is of; None takes the calibration samples, and flatters.
        task: what a batch and an output mean; None recognises it.
        folder: where the networks are kept; None keeps none.
        watch: shows the progress.

    Returns:
        One row a point: `keep`, `repair` (seconds asked for), `seconds` (all that the network took: compression and
        repair), `compress_seconds`, `macs_ratio`, `params_ratio`, `steps`, `figure`, `loss` (how much worse than
        dense), `dense` (the dense network's figure), `agreement`.

    Raises:
        InputError: as `compress` and `distil`.
    """
    task, batches = settle(task, model, batches)
    calibration = take_batches(batches, request.images, task)
    repaired = calibration if repair is None else take_batches(repair, request.repair_images, task)
    judged = calibration
    if evaluation is not None:
        judged = take_batches(evaluation, request.evaluation_images or 2**62, task)
    points = _Points(model, calibration, repaired, Judge(model, judged, task), request, folder and Path(folder))
    return pd.DataFrame([points.row(*point) for point in watch(request.points, "curve")])


@dataclass
class _Points:
    """The networks of a curve, made when asked for."""

    model: nn.Module
    calibration: list[Any]
    repair: list[Any]
    judge: Judge
    request: CurveRequest
    folder: Path | None
    present: tuple[float, nn.Module] | None = field(default=None, init=False)  # a share, and its network before repair
    rows: dict[tuple[float, float], dict[str, float]] = field(default_factory=dict, init=False)

    @cached_property
    def signature(self) -> str:
        """Hash of all that the networks and their figures depend on."""
        samples = [_hash(self.judge.task, part) for part in (self.calibration, self.repair, self.judge.samples)]
        return fingerprint(self.model, asdict(self.request) | {"keep": 0, "repair": 0, "samples": samples})

    def row(self, keep: float, seconds: float) -> dict[str, float]:
        """The figures of one point."""
        if (keep, seconds) not in self.rows:
            if (found := self._known(keep, seconds)) is None:
                network, found = self._repaired(keep, seconds) if seconds else self._cut(keep)
                found |= self.judge(network)
                if self.folder is not None:
                    said = {"point": found, "signature": self.signature}
                    save_compact(self._place(keep, seconds), network, report=said)
            self.rows[keep, seconds] = {"keep": keep, "repair": float(seconds)} | found
        return self.rows[keep, seconds]

    def _cut(self, keep: float) -> tuple[nn.Module, dict[str, float]]:
        recipe = Recipe(seed=self.request.seed)
        given = (self.model, self.calibration, keep, self.request.budget, self.judge.task)
        network, report = compress(*given, recipe=recipe)
        self.present = keep, network
        spent = report["seconds"]["plan"] + report["seconds"]["stand_in"]
        shares = {f"{name}_ratio": report["compact"][name] / report["dense"][name] for name in ("macs", "params")}
        return network, {"seconds": spent, "compress_seconds": spent, **shares, "steps": 0}

    def _repaired(self, keep: float, seconds: float) -> tuple[nn.Module, dict[str, float]]:
        before = self.row(keep, 0.0)
        network, clock = copy.deepcopy(self._network(keep)), Clock()
        with clock.step("repair"):
            settings = Distilling(seconds=seconds, seed=self.request.seed)
            said = distil(self.model, network, self.repair, self.judge.task, settings)
        spent = before["seconds"] + clock.seconds["repair"]
        same = {name: before[name] for name in ("compress_seconds", "macs_ratio", "params_ratio")}
        return network, {"seconds": spent, **same, "steps": said["steps"]}

    def _network(self, keep: float) -> nn.Module:
        """The one without repair, whose figures are known."""
        if self.present is None or self.present[0] != keep:
            assert self.folder is not None, "without a folder a network is used right after it was made"
            device = next(self.model.parameters()).device
            self.present = keep, load_compact(self._place(keep, 0.0), self.model).to(device)
        return self.present[1]

    def _place(self, keep: float, seconds: float) -> Path:
        return (self.folder or Path()) / f"keep={keep:g}_repair={seconds:g}"

    def _known(self, keep: float, seconds: float) -> dict[str, float] | None:
        file = self._place(keep, seconds) / REPORT
        if self.folder is None or not file.is_file():
            return None
        said = read_json(file, remedy="delete its folder and start again")
        return said["point"] if said.get("signature") == self.signature else None


def _hash(task: Task, batches: Iterable[Any]) -> str:
    """Hash of what the network is called with and of the targets, all of them."""
    digest = hashlib.sha256()
    for batch in batches:
        for leaf in tree_leaves((task.inputs(batch).tensors, task.target(batch))):
            digest.update(repr((leaf.dtype, leaf.shape) if isinstance(leaf, Tensor) else leaf).encode())
            if isinstance(leaf, Tensor):
                digest.update(tensor_bytes(leaf))
    return digest.hexdigest()
