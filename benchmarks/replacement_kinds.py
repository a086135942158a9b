"""Accuracy of a pretrained CIFAR ResNet right after channels go, with each kind of stand-in; nothing is trained.

    python benchmarks/replacement_kinds.py cifar_resnet20 WEIGHTS DATA [--figure FILE] [--test-images 2000]

DATA holds train/<class>/ and test/<class>/ with 32x32 images. For each score, allocation and share of the MACs all
kinds take the same plan (channels inside the blocks). Second number: after BatchNorm recalibration on augmented
training images, beside which the dense network is shown with the same treatment. Prints a Markdown table.
"""

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_prune.data import ImageFolderData
from lit_prune.models import build_backbone, load_weights
from lit_prune.replace import STAND_INS, replace_mechanisms
from lit_prune.scores import score
from lit_prune.structure import Budget, CostModel, plan_channels, trace_groups
from lit_prune.train.batchnorm import recalibrate_batchnorm
from lit_prune.train.evaluation import evaluate

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLANS = ("cmr_logit/uniform", "variance/uniform", "reconstruction/global")


@dataclass(frozen=True)
class Row:
    """One network: accuracy before and after recalibration."""

    score: str
    allocation: str
    keep: float
    kind: str
    accuracy: float
    recalibrated: float


@dataclass(frozen=True)
class Bench:
    """Network and images."""

    model: nn.Module
    calibration: list[tuple[Tensor, Tensor]]
    recalibration: list[tuple[Tensor, Tensor]]
    test: list[tuple[Tensor, Tensor]]

    @property
    def example(self) -> Tensor:
        """One image."""
        return self.test[0][0][:1]

    def accuracies(self, model: nn.Module) -> tuple[float, float]:
        """Accuracy as it is, and with new BatchNorm statistics."""
        before = evaluate(model, self.test).figure
        model = copy.deepcopy(model)
        recalibrate_batchnorm(model, self.recalibration)
        return before, evaluate(model, self.test).figure

    def rows(self, arguments: argparse.Namespace) -> Iterator[Row]:
        """Every score, allocation, share and kind."""
        graph = trace_groups(self.model, self.example)
        costs = CostModel.build(self.model, graph, self.example)
        yield Row("", "", 1.0, "dense", *self.accuracies(self.model))
        for name, allocation in (entry.split("/") for entry in arguments.plans):
            ranks = score(self.model, name, self.calibration)
            for keep in arguments.keep:
                plan = plan_channels(graph, costs, ranks, Budget("macs", keep, allocation, only="mid"))
                for kind in STAND_INS:
                    reduced = replace_mechanisms(self.model, plan, self.calibration, kind, self.example).model
                    yield Row(name, allocation, keep, kind, *self.accuracies(reduced))


def load(arguments: argparse.Namespace) -> Bench:
    """The network, calibration and recalibration images of the training part, test images."""
    model = build_backbone(arguments.backbone, num_classes=10)
    load_weights(model, arguments.weights)
    sizes = {"calibration_size": arguments.calibration_images, "eval_batch_size": 250}
    data = ImageFolderData(root=arguments.data, resolution=32, resident=True, mean=MEAN, std=STD, **sizes)
    data.setup()
    recalibration = [batch for batch, _ in zip(data.recalibration_dataloader(), range(16), strict=False)]
    test, count = [], 0
    for images, labels in shuffled(data, arguments.test_images):
        test.append((images, labels))
        count += len(labels)
    return Bench(model.eval(), list(data.calibration_dataloader()), recalibration, test)


def shuffled(data: ImageFolderData, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`limit` test images in an order that mixes the classes, seeded."""
    batches = list(data.test_dataloader())
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:limit]
    for part in order.split(250):
        yield images[part], labels[part]


def draw(rows: list[Row], file: Path) -> None:
    """One panel a plan: accuracy over the share of MACs kept, a line a kind."""
    from lit_prune.report import drawing

    colours = {"delete": drawing.GREY, "constant": drawing.ORANGE, "affine": drawing.BLUE, "refit": drawing.VERMILLION}
    plans = list(dict.fromkeys((row.score, row.allocation) for row in rows[1:]))
    with drawing.styled():
        figure = drawing.new_figure(3.4)
        for axes, plan in zip(figure.subplots(1, len(plans), sharey=True, squeeze=False)[0], plans, strict=True):
            axes.axhline(100 * rows[0].accuracy, color=drawing.INK, linewidth=0.8, linestyle=":")
            for kind, colour in colours.items():
                line = [row for row in rows if (row.score, row.allocation, row.kind) == (*plan, kind)]
                keep = [100 * row.keep for row in line]
                axes.plot(keep, [100 * row.accuracy for row in line], color=colour, marker="o", label=kind)
                axes.plot(keep, [100 * row.recalibrated for row in line], color=colour, linestyle="--", linewidth=1)
            axes.set(title=", ".join(plan), xlabel="MACs kept, %")
        figure.axes[0].set_ylabel("accuracy, % (dashed: BN recalibrated)")
        figure.axes[0].legend(loc="lower right")
        file.write_bytes(drawing.render_png(figure))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone")
    parser.add_argument("weights")
    parser.add_argument("data")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--calibration-images", type=int, default=1000)
    parser.add_argument("--plans", nargs="+", default=PLANS, metavar="SCORE/ALLOCATION")
    parser.add_argument("--keep", nargs="+", type=float, default=(0.8, 0.7, 0.6, 0.5))
    return parser.parse_args()


def main() -> None:
    """Prints the table, row by row, and draws the figure."""
    arguments = parse()
    bench, rows = load(arguments), []
    print(
        "| score | plan | MACs kept | stand-in | accuracy | BN recalibrated |\n| --- | --- | ---: | --- | ---: | ---: |"
    )
    for row in bench.rows(arguments):
        rows.append(row)
        shares = f"{row.accuracy:.2%} | {row.recalibrated:.2%}"
        print(f"| {row.score} | {row.allocation} | {row.keep:.0%} | {row.kind} | {shares} |", flush=True)
    if arguments.figure:
        draw(rows, arguments.figure)


if __name__ == "__main__":
    main()
