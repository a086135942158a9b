"""Cost of the channel table beside the plain forward pass over the same batches.

    python benchmarks/measure.py [CASE ...] [--images N]

Median of 5 after one to warm up, random weights, random images. `forward` is evaluation mode without gradients;
`measure` is `lit_prune.measure` whole: forward, sums, and the table made from them, with all scalar columns. The two
take turns batch by batch, a copy of the network in between, so that a machine that slows down slows both. The table
and what leads to it cost the same whatever the number of images, so the ratio falls as that grows: 5,000 are what an
analysis takes, and fewer, where a network is slow, are what a benchmark can wait for. Freed memory is kept, as the
command line keeps it: otherwise page faults, at random, make up to a third of a forward pass. Networks are measured
on one thread and on all cores, the rest on one thread. `analyze` is the whole verb with the extras that look at the
structure of a layer. `unfolded` is what the definition says literally: Σ_X from unfolded patches, then w·Σ_X·w.
`excess` is the target axis of one layer from its correlations.
"""

import argparse
import copy
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from rows import REPEATS, Row, choose, half_range, in_turns, main, ratio_row
from torch import Tensor, nn
from torch.nn import functional

from lit_prune.lab.analyze.analysis import analyze
from lit_prune.lab.analyze.request import AnalyzeRequest
from lit_prune.measurement.channel_table import measure
from lit_prune.measurement.layers import removing
from lit_prune.measurement.protocol import DEFAULT_PROTOCOL, Protocol
from lit_prune.measurement.target_axis import find_partners, target_excess
from lit_prune.models import build_backbone
from lit_prune.processes import keep_freed_memory

CHANNELS = 512


@dataclass(frozen=True)
class Case:
    """A network to measure.

    Attributes:
        backbone: its name in the registry.
        arguments: of its builder.
        size: height and width of an image.
        batch: images in a batch.
        images: how many in all, unless `--images` says.
        positions: the protocols to show.
    """

    backbone: str
    arguments: dict[str, str] = field(default_factory=lambda: {"stem": "cifar"})
    size: int = 32
    batch: int = 512  # what a DataModule takes for calibration, unless memory forbids it
    images: int = 1024
    positions: tuple[int | str, ...] = ("all",)


CASES = {
    "resnet20": Case("cifar_resnet20", {}, images=5120),
    "resnet18": Case("resnet18", images=1024),
    "vgg16": Case("vgg16_bn", images=5120),
    "mobilenetv2": Case("mobilenet_v2", images=5120, positions=("all", 16)),
    "resnet50": Case("resnet50", {}, 224, 32, 480),
}


def figures(name: str, images: int | None) -> list[Row]:
    """Rows of one network."""
    case = CASES[name]
    model, batches = prepared(case, images or case.images)
    found = []
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        title = f"{name}, {len(batches) * case.batch}×{case.size}×{case.size}, threads: {threads}"
        for positions in case.positions:
            protocol = Protocol(positions=positions)
            taken = [batch_by_batch(model, batches, protocol) for _ in range(1 + REPEATS)][1:]
            found += [ratio_row(f"{title}: measure, {positions} positions / forward", *zip(*taken, strict=True))]
    return found


def batch_by_batch(model: nn.Module, batches: list[tuple[Tensor, Tensor]], protocol: Protocol) -> tuple[float, float]:
    """Seconds of `measure` and of the plain pass over the same batches, each just before it is measured."""
    plain, taken = copy.deepcopy(model), 0.0

    def feed() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal taken
        for batch in batches:
            start = time.perf_counter()
            forward(plain, [batch])
            taken += time.perf_counter() - start
            yield batch

    start = time.perf_counter()
    measure(model, feed(), protocol=protocol)
    return time.perf_counter() - start - taken, taken


def prepared(case: Case, images: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The network, and the same random batch as often as it takes."""
    torch.manual_seed(0)
    model: nn.Module = build_backbone(case.backbone, num_classes=100, **case.arguments).eval()
    batch = torch.randn(case.batch, 3, case.size, case.size), torch.arange(case.batch) % 100
    return model, [batch] * max(1, images // case.batch)


@torch.no_grad()
def forward(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """The plain pass."""
    for images, _ in batches:
        model(images)


def unfolded(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Signal power of every convolution from the covariance of its unfolded patches."""
    sums: dict[str, list[Tensor]] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}

    def adder(name: str):
        def hook(conv: nn.Conv2d, inputs: tuple, output: Tensor) -> None:
            patches = functional.unfold(inputs[0], conv.kernel_size, conv.dilation, conv.padding, conv.stride)
            flat = patches.transpose(1, 2).flatten(0, 1)  # [S, C·taps]
            first, second, count = sums.setdefault(name, [flat.new_zeros(()) for _ in range(3)])
            sums[name] = [first + flat.sum(0), second + flat.T @ flat, count + len(flat)]

        return hook

    with removing([module.register_forward_hook(adder(name)) for name, module in layers.items()]):
        forward(model, batches)
    power = {}
    for name, (first, second, count) in sums.items():
        weight, mean = layers[name].weight.detach().flatten(1), first / count
        power[name] = ((weight @ (second / count - torch.outer(mean, mean))) * weight).sum(1)
    return power


def unfolding(_: int | None) -> list[Row]:
    """Row of the literal definition against `measure`, ResNet-18."""
    model, batches = prepared(replace(CASES["resnet18"], batch=128), 128)
    taken = in_turns({"unfolded": lambda: unfolded(model, batches), "measure": lambda: measure(model, batches)})
    return [ratio_row("resnet18, 128×32×32: unfolded / measure", taken["unfolded"], taken["measure"])]


def excess(_: int | None) -> list[Row]:
    """Row of partners and target excess of one layer's channels."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, CHANNELS + 1, generator=generator) @ torch.randn(
        CHANNELS + 1, CHANNELS + 1, generator=generator
    )
    matrix = torch.corrcoef(values.T.double())
    task, between = matrix[0, 1:], matrix[1:, 1:]

    def work() -> Tensor:
        return target_excess(task, between, find_partners(task, between, DEFAULT_PROTOCOL))

    taken = [1000 * second for second in in_turns({"": work})[""]]
    middle = sorted(taken)[len(taken) // 2]
    return [Row(f"target excess, all of {CHANNELS} channels", middle, half_range(taken), "ms")]


def analyzed(images: int | None) -> list[Row]:
    """Row of graphs, hulls, triplets and groupings of ResNet-18 on top of the channel table, in one turn."""
    model, batches = prepared(CASES["resnet18"], images or CASES["resnet18"].images)
    request = AnalyzeRequest(extras=("graphs", "hulls", "triplets", "groupings"))
    works = {"analyze": lambda: analyze(model, batches, request), "measure": lambda: measure(model, batches)}
    taken = in_turns(works, repeats=1, warmup=0)
    beyond = taken["analyze"][0] - taken["measure"][0]
    detail = f"{taken['analyze'][0]:.4g} s, measure {taken['measure'][0]:.4g} s"
    return [Row(f"resnet18, {len(batches) * len(batches[0][0])}×32×32: analyze - measure", beyond, 0, "s", detail)]


OTHERS = {"unfolded": unfolding, "excess": excess, "analyze": analyzed}


def rows(names: list[str], images: int | None = None) -> list[Row]:
    """Rows of the result table."""
    keep_freed_memory()
    found = []
    for name in choose(names, [*CASES, *OTHERS]):
        torch.set_num_threads(1)
        found += OTHERS[name](images) if name in OTHERS else figures(name, images)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--images", type=int)
    options, sys.argv[1:] = parser.parse_known_args()
    main(lambda names: rows(names, options.images), __doc__)
