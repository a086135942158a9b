"""Accuracy after compression without training, and after a short repair; parts of the recipe, Torch-Pruning beside it.

    python benchmarks/compression.py NETWORK SAMPLES --out FILE.jsonl [--keep 0.5 0.3] [--seeds 0 1 2] [--epochs 0 2]

NETWORK is one of `compression_cases.CASES`, SAMPLES the folder that it reads. One JSON line a cell (network, method,
share of the MACs kept, images, repair epochs, seed), one process a cell; cells that FILE has are not run again, so that
a run that was stopped goes on. Calibration images are drawn from the training part by the seed. `figure` is the task's
on the test part, `agreement` with the dense network there. Torch-Pruning cuts channels inside blocks, iteratively,
until the MACs are met; then BatchNorm is recalibrated on the calibration images, moved and mirrored where the network
was trained so. Repair is `distil` on the first `--repair-images` training images. At the end a Markdown table and, with
`--draw`, the curve of the figure against seconds.
"""

import argparse
import copy
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from compression_cases import CASES, Bench, moved, split
from torch import nn

from lit_prune import recalibrate_batchnorm
from lit_prune.compression import Recipe, compress
from lit_prune.compression_report import Comparison
from lit_prune.replace import Replacement
from lit_prune.replace.distil import Distilling, distil
from lit_prune.running import undisturbed
from lit_prune.structure import cost, trace_groups
from lit_prune.structure.axes import is_weighted
from lit_prune.structure.networks import fingerprint
from lit_prune.task import settle
from lit_prune.version import commit

_GREEDY = Replacement(scope="consumers", clipped=False, unsupported="delete")
_ALL = Replacement(clipped=False, unsupported="delete")
_ALONE = Replacement(towards="weights", unsupported="delete")
RECIPES = {
    "strongest": Recipe(),
    "greedy": Recipe(allocation="global", only="mid", replacement=_GREEDY),
    "+ all layers": Recipe(allocation="global", only="mid", replacement=_ALL),
    "+ clips": Recipe(allocation="global", only="mid", replacement=_ALONE),
    "+ measured widths": Recipe(only="mid", replacement=_ALONE),
    "+ trunk": Recipe(replacement=_ALONE),
}
IMPORTANCES = {
    "torch-pruning group norm": "GroupMagnitudeImportance",
    "torch-pruning taylor": "GroupTaylorImportance",
}
STEPS = 100
MEGA = 1 << 10  # kB in a MB


@dataclass(frozen=True)
class Cell:
    """What one process does."""

    network: str
    method: str
    keep: float
    images: int
    epochs: float
    seed: int
    mirrored: bool = False


def run_cell(cell: Cell, samples: Path, repair_images: int, answers: Path, device: str) -> dict:
    """Compresses, repairs and measures; the line of the cell."""
    bench = CASES[cell.network](samples).to(device)
    generator = torch.Generator().manual_seed(cell.seed)
    order = torch.randperm(len(bench.train[1]), generator=generator)[: cell.images]
    calibration = split(bench.train, bench.batch, order)
    if cell.mirrored:  # beside each other: the last batches, held out, are no mirror images of what is solved for
        calibration = [view for part in calibration for view in (part, mirrored(part))]
    before = peak()
    small, seconds = compressed(bench, cell, calibration)
    found = {"device": device, "commit": (commit() or "")[:7], "seconds": seconds}
    found |= {"peak_mb": peak() - before, "process_mb": peak()}
    example = bench.test[0][:1]
    found["macs"] = cost(small, example).macs / cost(bench.model, example).macs
    judge = Judge(bench, answers)
    if cell.epochs:
        found["before_repair"] = judge(small)
        found["repair"] = repaired(bench, small, cell, repair_images)
    return asdict(cell) | found | judge(small)


def mirrored(part: tuple) -> tuple:
    """The mirror images of a batch, maps of labels too."""
    return tuple(values.flip(-1) if values.ndim > 1 else values for values in part)


def peak() -> int:
    """Most memory that the process has held, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // MEGA


def compressed(bench: Bench, cell: Cell, calibration: list) -> tuple[nn.Module, dict[str, float]]:
    """The network of one method, and the seconds that it took."""
    start = time.perf_counter()
    if cell.method == "dense":
        return copy.deepcopy(bench.model), {}
    if cell.method in RECIPES:
        recipe = replace(RECIPES[cell.method], seed=cell.seed)
        small, report = compress(bench.model, calibration, cell.keep, task=bench.task, recipe=recipe)
        return small, {name: round(value, 1) for name, value in report["seconds"].items()}
    small = torch_pruned(bench, cell.keep, calibration, IMPORTANCES[cell.method])
    generator = torch.Generator().manual_seed(cell.seed)
    images = [(moved(x, generator) if bench.moves else x, y) for x, y in calibration]
    recalibrate_batchnorm(small, images, limit=len(images))
    return small, {"all": round(time.perf_counter() - start, 1)}


def torch_pruned(bench: Bench, keep: float, batches: list, name: str) -> nn.Module:
    """Torch-Pruning's global plan on the channels inside blocks."""
    import torch_pruning

    model, example = copy.deepcopy(bench.model), batches[0][0][:1]
    groups = trace_groups(model, example).prunable
    inside = {name for group in groups if group.role == "mid" for name in group.producers}
    weighted = [(name, module) for name, module in model.named_modules() if is_weighted(module)]
    ignored = [module for name, module in weighted if name not in inside or isinstance(module, nn.Linear)]
    importance = getattr(torch_pruning.importance, name)()
    options = {"iterative_steps": STEPS, "pruning_ratio": 0.98, "ignored_layers": ignored}
    pruner = torch_pruning.pruner.MetaPruner(model, example, importance, True, **options)
    dense = cost(model, example).macs
    if "Taylor" in name:
        task, batches = settle(bench.task, model, batches[:4])
        sum(task.loss(task.run(model, batch), batch).mean() for batch in batches).backward()
    for _ in range(STEPS):
        pruner.step()
        if cost(model, example).macs <= keep * dense:
            break
    return model.eval()


def repaired(bench: Bench, small: nn.Module, cell: Cell, images: int) -> dict:
    """Repairs in place."""
    part = tuple(values[:images] for values in bench.train)
    order = torch.randperm(len(part[1]), generator=torch.Generator().manual_seed(cell.seed))
    batches = split(part, bench.batch, order)
    task, batches = settle(bench.task, bench.model, batches)
    move = moved_batch if bench.moves else None
    start = time.perf_counter()
    said = distil(bench.model, small, batches, task, Distilling(epochs=cell.epochs, seed=cell.seed), augment=move)
    return said | {"seconds": round(time.perf_counter() - start, 1)}


def moved_batch(batch: tuple, generator: torch.Generator) -> tuple:
    """A training batch, moved and mirrored."""
    return (moved(batch[0], generator), *batch[1:])


class Judge:
    """Figure and agreement on the test part; the dense network's answers are kept in a file where they are few.

    Args:
        bench: the network and its images.
        answers: file of the dense network's answers, read where it is there; its name gets a hash of the network and of
            what it is shown.
    """

    def __init__(self, bench: Bench, answers: Path) -> None:
        self.bench = bench
        self.task, self.batches = settle(bench.task, bench.model, split(bench.test, bench.batch))
        shown = [bench.batch, *bench.test[0].shape, float(bench.test[0].double().sum())]
        answers = answers.with_suffix(f".{fingerprint(bench.model, {'shown': shown})[:12]}.pt")
        self.answers = torch.load(answers) if answers.exists() else None
        if self.answers is None and bench.test[1].ndim == 1:
            with undisturbed(bench.model):
                self.answers = [self.task.run(bench.model, batch) for batch in self.batches]
            torch.save(self.answers, answers)

    def __call__(self, small: nn.Module) -> dict[str, float]:
        """What `small` answers, beside the dense network."""
        comparison = Comparison(self.task)
        with undisturbed(self.bench.model), undisturbed(small):
            for place, batch in enumerate(self.batches):
                dense = self.answers[place] if self.answers else self.task.run(self.bench.model, batch)
                comparison.add(dense, self.task.run(small, batch), batch)
        figures = {name: found[self.task.metric_name] for name, found in comparison.figures().items()}
        return {"figure": figures["compact"], "dense": figures["dense"], **comparison.distances()}


def table(rows: list[dict]) -> str:
    """A row for each network, share of the MACs, method, number of images and of repair epochs; means over seeds.

    Figures in percent, with the standard deviation over seeds where there are several; seconds of the compression (and
    of the repair), most memory of a whole process, and the commit.
    """
    lines = [
        "| network | MACs | method | images | epochs | dense | compact | agreement | seeds | seconds | MB | code |"
    ]
    lines.append("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    keys = ("network", "keep", "method", "images", "epochs", "mirrored")
    rows = [{"mirrored": False} | row for row in rows]
    order = {name: place for place, name in enumerate((*RECIPES, *IMPORTANCES))}
    wanted = sorted(
        {tuple(row[k] for k in keys) for row in rows},
        key=lambda key: (list(CASES).index(key[0]), -key[1], key[4], order[key[2]], key[3], key[5]),
    )
    for key in wanted:
        found = [row for row in rows if tuple(row[k] for k in keys) == key]
        seconds = f"{np.mean([sum(row['seconds'].values()) for row in found]):.0f}"
        if key[4]:
            seconds += f" + {np.mean([row['repair']['seconds'] for row in found]):.0f}"
        dense, figure, agreement = (shown([row[name] for row in found]) for name in ("dense", "figure", "agreement"))
        seeds, memory = ", ".join(str(row["seed"]) for row in found), max(row["process_mb"] for row in found)
        code = ", ".join(sorted({row["commit"] for row in found}))
        images = f"{key[3]} + mirrored" if key[5] else key[3]
        parts = (key[2], images, f"{key[4]:g}", dense, figure, agreement, seeds, seconds, memory, code)
        lines.append(f"| {' | '.join(map(str, (key[0], f'{key[1]:.0%}', *parts)))} |")
    return "\n".join(lines)


def shown(values: list[float]) -> str:
    """Mean in percent, and the standard deviation where there are several and they differ."""
    percent = 100 * np.array(values)
    return f"{percent.mean():.2f}" + (f" ± {percent.std():.2f}" if percent.std() > 1e-9 else "")


def draw(rows: list[dict], to: Path) -> None:
    """The curve of the figure against seconds, all compression and repair included, and the dense network's line."""
    from matplotlib.figure import Figure

    axes = (figure := Figure((6, 4), layout="constrained")).subplots()
    for key in dict.fromkeys((row["network"], row["method"], row["keep"]) for row in rows):
        found = [row for row in rows if (row["network"], row["method"], row["keep"]) == key]
        points = {}
        for row in found:
            spent = sum(row["seconds"].values()) + row.get("repair", {}).get("seconds", 0)
            points.setdefault(row["epochs"], []).append((spent, row["figure"]))
        means = sorted(tuple(np.mean(values, 0)) for values in points.values())
        axes.plot(*zip(*means, strict=True), "o-", label=f"{key[0]}, {key[1]}, {key[2]:.0%} of the MACs")
    for network in dict.fromkeys(row["network"] for row in rows):
        dense = next(row["dense"] for row in rows if row["network"] == network)
        axes.axhline(dense, linestyle="--", color="grey", label=f"{network}, dense")
    axes.set(xlabel="seconds", ylabel="figure on the test images", xscale="log")
    axes.legend(fontsize="small")
    figure.savefig(to)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=CASES)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", nargs="+", type=float, default=(0.5, 0.3))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--epochs", nargs="+", type=float, default=(0.0,))
    parser.add_argument("--methods", nargs="+", default=("strongest", *IMPORTANCES), help=", ".join(RECIPES))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--mirrored", action="store_true", help="the mirror images of the calibration images too")
    parser.add_argument("--repair-images", type=int, default=10_000)
    parser.add_argument("--device", default="cpu", help="where the network and its images lie")
    parser.add_argument("--draw", type=Path, help="file for the curve of the figure against seconds")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser.parse_args()


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    """All cells that are asked for."""
    name, images = arguments.network, arguments.images
    return [
        Cell(name, method, keep, images, epochs, seed, arguments.mirrored)
        for seed in arguments.seeds
        for method in arguments.methods
        for keep in arguments.keep
        for epochs in arguments.epochs
    ]


def read(file: Path) -> list[dict]:
    """The lines that are there."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> None:
    """Runs the cells that are missing, each in a process of its own, and prints the table."""
    arguments = parse()
    if arguments.cell:
        cell = Cell(**json.loads(arguments.cell))
        answers = arguments.out.with_suffix(f".{cell.network}.pt")
        row = run_cell(cell, arguments.samples, arguments.repair_images, answers, arguments.device)
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return
    for cell in cells_of(arguments):
        done = [{key: row.get(key, False) for key in asdict(cell)} for row in read(arguments.out)]
        if asdict(cell) not in done:
            command = [sys.executable, *sys.argv, "--cell", json.dumps(asdict(cell))]
            subprocess.run(command, check=True)
    print(table(read(arguments.out)))
    if arguments.draw:
        draw(read(arguments.out), arguments.draw)


if __name__ == "__main__":
    main()
