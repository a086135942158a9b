"""Accuracy after compression without training: each part of the recipe added in turn, Torch-Pruning beside it.

    python benchmarks/compression.py BACKBONE WEIGHTS IMAGES.npz --out FILE.jsonl [--keep 0.5 0.3] [--seeds 0 1 2]

IMAGES.npz holds `train` and `test`, uint8 [N, H, W, 3], `train_labels` and `test_labels`. Calibration images are drawn
from `train` by the seed. One JSON line a cell (method, share of the MACs kept, seed); cells that FILE has are not run
again. Torch-Pruning cuts channels inside blocks, iteratively, until the MACs are met; its accuracy is also given after
BatchNorm recalibration on the calibration images, moved and mirrored. At the end a Markdown table.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn

from lit_prune import recalibrate_batchnorm
from lit_prune.compression import Recipe, compress
from lit_prune.models import build_backbone, load_weights
from lit_prune.replace import Replacement
from lit_prune.structure import cost, trace_groups
from lit_prune.train.evaluation import evaluate

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Batches = list[tuple[Tensor, Tensor]]
_GREEDY = Replacement(scope="consumers", clipped=False, unsupported="delete")
_ALL = Replacement(clipped=False, unsupported="delete")
RECIPES = {
    "greedy": Recipe(allocation="global", only="mid", replacement=_GREEDY),
    "+ all layers": Recipe(allocation="global", only="mid", replacement=_ALL),
    "+ clips": Recipe(allocation="global", only="mid"),
    "+ measured widths": Recipe(only="mid"),
    "+ trunk": Recipe(),
}
IMPORTANCES = {
    "torch-pruning group norm": torch_pruning.importance.GroupMagnitudeImportance,
    "torch-pruning taylor": torch_pruning.importance.GroupTaylorImportance,
}
STEPS = 100


@dataclass(frozen=True)
class Cell:
    """One line of the file."""

    method: str
    keep: float
    seed: int
    macs: float
    accuracy: float
    recalibrated: float
    seconds: float


@dataclass(frozen=True)
class Bench:
    """The network and its images, normalised."""

    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: Batches
    images: int

    def calibration(self, seed: int) -> Batches:
        """Batches drawn from the training part."""
        order = torch.randperm(len(self.train[1]), generator=torch.Generator().manual_seed(seed))[: self.images]
        return [tuple(values[part] for values in self.train) for part in order.split(125)]

    def cell(self, method: str, keep: float, seed: int) -> Cell:
        """Compresses and measures."""
        batches, start = self.calibration(seed), time.perf_counter()
        reduced = self.reduced(method, keep, batches, seed)
        seconds = time.perf_counter() - start
        accuracy = evaluate(reduced, self.test).figure
        example = self.test[0][0][:1]
        macs = cost(reduced, example).macs / cost(self.model, example).macs
        recalibrate_batchnorm(reduced, moved(batches, seed))
        return Cell(method, keep, seed, macs, accuracy, evaluate(reduced, self.test).figure, seconds)

    def reduced(self, method: str, keep: float, batches: Batches, seed: int) -> nn.Module:
        """The network of one method."""
        if method == "dense":
            return copy.deepcopy(self.model)
        if method in RECIPES:
            recipe = Recipe(**{**vars(RECIPES[method]), "seed": seed})
            return compress(self.model, batches, keep, recipe=recipe)[0]
        return torch_pruned(self.model, keep, batches, IMPORTANCES[method])


def torch_pruned(model: nn.Module, keep: float, batches: Batches, importance: Callable) -> nn.Module:
    """Torch-Pruning's global plan on the channels inside blocks."""
    model, example = copy.deepcopy(model), batches[0][0][:1]
    outside = {name for group in trace_groups(model, example).groups if group.role != "mid" for name in group.producers}
    ignored = [model.get_submodule(name) for name in outside]
    ignored += [module for module in model.modules() if isinstance(module, nn.Linear)]
    pruner = torch_pruning.pruner.MetaPruner(
        model, example, importance(), True, iterative_steps=STEPS, pruning_ratio=0.98, ignored_layers=ignored
    )
    dense = cost(model, example).macs
    if "Taylor" in importance.__name__:
        sum(F.cross_entropy(model(images), labels) for images, labels in batches[:4]).backward()
    for _ in range(STEPS):
        pruner.step()
        if cost(model, example).macs <= keep * dense:
            break
    return model.eval()


def moved(batches: Batches, seed: int) -> Batches:
    """The images mirrored at random and shifted by up to four pixels, as in training."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for images, labels in batches:
        down, right, mirror = (torch.randint(0, high, (len(images),), generator=generator) for high in (9, 9, 2))
        padded, (height, width) = F.pad(images, (4, 4, 4, 4)), images.shape[2:]
        parts = [
            (image.flip(2) if m else image)[:, d : d + height, r : r + width]
            for image, d, r, m in zip(padded, down, right, mirror, strict=True)
        ]
        found.append((torch.stack(parts), labels))
    return found


def load(arguments: argparse.Namespace) -> Bench:
    """The network with its weights, and the images."""
    stored = np.load(arguments.images)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (arguments.mean, arguments.std))
    parts = {}
    for name in ("train", "test"):
        labels = torch.from_numpy(stored[f"{name}_labels"]).long()
        parts[name] = ((torch.from_numpy(stored[name]).permute(0, 3, 1, 2).float() / 255 - mean) / std, labels)
    model = build_backbone(arguments.backbone, num_classes=int(parts["train"][1].max()) + 1)
    load_weights(model, arguments.weights)
    order = torch.randperm(len(parts["test"][1]), generator=torch.Generator().manual_seed(0))[: arguments.test_images]
    test = [tuple(values[part] for values in parts["test"]) for part in order.split(250)]
    return Bench(model.eval(), parts["train"], test, arguments.calibration_images)


def table(cells: list[Cell]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    lines = ["| method | MACs | accuracy | recalibrated | seconds |", "| --- | ---: | ---: | ---: | ---: |"]
    for key in dict.fromkeys((cell.method, cell.keep) for cell in cells):
        found = [cell for cell in cells if (cell.method, cell.keep) == key]
        values = np.array([[100 * c.accuracy, 100 * c.recalibrated] for c in found])
        shown = [f"{m:.2f} ± {s:.2f}" for m, s in zip(values.mean(0), values.std(0), strict=True)]
        seconds = np.mean([cell.seconds for cell in found])
        lines.append(f"| {key[0]} | {key[1]:.0%} | {shown[0]} | {shown[1]} | {seconds:.0f} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone")
    parser.add_argument("weights")
    parser.add_argument("images")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", nargs="+", type=float, default=(0.5, 0.3))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--methods", nargs="+", default=("dense", *RECIPES, *IMPORTANCES))
    parser.add_argument("--calibration-images", type=int, default=1000)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--mean", nargs=3, type=float, default=MEAN)
    parser.add_argument("--std", nargs=3, type=float, default=STD)
    return parser.parse_args()


def main() -> None:
    """Runs the cells that are missing and prints the table."""
    arguments = parse()
    cells = (
        [Cell(**json.loads(line)) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    )
    done, bench = {(cell.method, cell.keep, cell.seed) for cell in cells}, load(arguments)
    wanted = [
        (m, k, s)
        for s in arguments.seeds
        for m in arguments.methods
        for k in ((1.0,) if m == "dense" else arguments.keep)
    ]
    for key in wanted:
        if key not in done:
            cells.append(bench.cell(*key))
            with arguments.out.open("a") as file:
                file.write(json.dumps(asdict(cells[-1])) + "\n")
    print(table(cells))


if __name__ == "__main__":
    main()
