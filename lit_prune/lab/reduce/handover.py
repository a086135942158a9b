"""What a reduction hands over: the `compact/` folder of one reduced network, where a plan can say its structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_prune.files import read_json
from lit_prune.lab.reduce.bench import Bench
from lit_prune.lab.reduce.images import Images
from lit_prune.lab.reduce.request import ReduceRequest
from lit_prune.structure import compare_profiles, save_compact
from lit_prune.structure.networks import load_network
from lit_prune.structure.record import note_plan, record_of

FOLDER = "compact"
HELD = 0.01
"""Loss of accuracy against the dense network up to which a narrower network is preferred."""


@dataclass(frozen=True)
class Chosen:
    """The cell whose network is handed over: its key, and its result."""

    key: str
    result: dict[str, Any]

    @classmethod
    def of(cls, content: dict[str, Any]) -> Chosen:
        """The narrowest network that holds its accuracy (within `HELD` of the dense one), the best of that width.

        Where none holds it, the most accurate of all; accuracies after training where there was some.
        """

        def figures(place: int) -> tuple[int, float, float]:
            cell = content["cells"][place]
            return cell["width"], cell.get("accuracy_repaired", cell["accuracy"]), cell["accuracy_dense"]

        places = range(len(content["cells"]))
        held = [place for place in places if figures(place)[1] >= figures(place)[2] - HELD]
        narrow = min(held, key=lambda place: (figures(place)[0], -figures(place)[1])) if held else None
        place = narrow if narrow is not None else min(places, key=lambda p: (-figures(p)[1], figures(p)[0]))
        return cls(content["keys"][place], content["cells"][place])

    @property
    def words(self) -> str:
        """Which one it is, for the terminal."""
        cell = self.result
        return f"{cell['method']}, {cell['width']} of {cell['units']} units, seed {cell['seed']}"


def hand_over(
    original: Callable[[int], nn.Module], images: Images, request: ReduceRequest, content: dict[str, Any], run_dir: Path
) -> str:
    """Writes `compact/` with the network that `Chosen.of` takes; its stand-ins are computed again.

    `report.json` gets `dense`, `compact` and `cell` (key, method, width, seed). A folder that another verb wrote stays.

    Args:
        original: seed -> the network that was reduced, with its record.
        images: as in `reduce`.
        request: as in `reduce`.
        content: what `reduce` returned.
        run_dir: the run folder.

    Returns:
        One line that says what was written, or why nothing was.
    """
    chosen, folder = Chosen.of(content), run_dir / FOLDER
    there = _written(folder)
    if there is not None and "cell" not in there:
        return f"{folder}: kept, it holds a network of another verb; give another --run_dir to have the reduced one"
    if there is not None and there["cell"]["key"] == chosen.key:
        return f"{folder}: {chosen.words} (was there)"
    seed = chosen.result["seed"]
    dense = original(seed)
    repaired = "accuracy_repaired" in chosen.result
    small = _trained(run_dir, chosen, dense) if repaired else _compiled(dense, images, request, chosen)
    if small is None:
        return (
            f"{folder}: not written; the units of {content['layer']!r} stay in the network and are only read no more, "
            "which no plan of removed channels can say"
        )
    save_compact(folder, small, report=_report(dense, small, chosen))
    return f"{folder}: {chosen.words}"


def _written(folder: Path) -> dict[str, Any] | None:
    file = folder / "report.json"
    return read_json(file) if file.is_file() else None


def _trained(run_dir: Path, chosen: Chosen, dense: nn.Module) -> nn.Module:
    """The network after its repair."""
    last, record = run_dir / "cells" / chosen.key / "checkpoints" / "last.ckpt", record_of(dense)
    return load_network(last, record.image_shape, trust=(record.backbone,))


def _compiled(dense: nn.Module, images: Images, request: ReduceRequest, chosen: Chosen) -> nn.Module | None:
    bench = Bench.build(dense, images, request, chosen.result["seed"])
    cell = next(cell for cell in bench.cells() if bench.cell_key(cell) == chosen.key)
    model, plan = bench.network(cell)
    return None if plan is None else note_plan(model, record_of(dense), plan)


def _report(dense: nn.Module, small: nn.Module, chosen: Chosen) -> dict[str, Any]:
    cell = chosen.result
    accuracies = [cell["accuracy_dense"], cell.get("accuracy_repaired", cell["accuracy"])]
    models = [model.cpu().eval() for model in (dense, small)]
    figures = compare_profiles(models, torch.zeros(1, *record_of(small).image_shape), accuracies)
    named = {name: cell[name] for name in ("method", "width", "units", "seed")}
    return {"dense": figures[0], "compact": figures[1], "cell": {"key": chosen.key, **named}}
