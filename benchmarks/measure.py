"""Cost of the channel table: one pass that records all output moments against the plain forward pass.

    python benchmarks/measure.py [resnet18 vgg16 mobilenetv2 resnet50]

One thread, median of 5 after one to warm up, random weights, random images. `forward` is evaluation mode without
gradients; `measure` is `lit_prune.measure` whole: forward, sums, and the table made from them; `record` is the pass
alone, what more images cost.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lit_prune import measure
from lit_prune.backbones import build_backbone
from lit_prune.measure import collect_sums

REPEATS = 5
CASES = {
    "resnet18": ("resnet18", {"stem": "cifar"}, 32, 64),
    "vgg16": ("vgg16_bn", {"stem": "cifar"}, 32, 64),
    "mobilenetv2": ("mobilenet_v2", {"stem": "cifar"}, 32, 64),
    "resnet50": ("resnet50", {}, 224, 8),
}
"""Name to backbone, arguments, image size, batch."""


def seconds(work: Callable[[], object]) -> float:
    """Median time of one call."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def row(name: str) -> list[str]:
    """Measured figures of one case as cells."""
    backbone, arguments, size, batch = CASES[name]
    torch.manual_seed(0)
    model: nn.Module = build_backbone(backbone, num_classes=100, **arguments).eval()
    images, labels = torch.randn(batch, 3, size, size), torch.arange(batch) % 100
    with torch.no_grad():
        forward = seconds(lambda: model(images))
    recorded = seconds(lambda: collect_sums(model, [(images, labels)]))
    whole = seconds(lambda: measure(model, [(images, labels)]))
    cells = [f"{forward:.3f}", f"{recorded:.3f}", f"{recorded / forward:.2f}", f"{whole:.3f}", f"{whole / forward:.2f}"]
    return [f"{name}, {batch}×{size}×{size}", *cells]


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or list(CASES)
    unknown = [name for name in wanted if name not in CASES]
    if unknown:
        sys.exit(f"unknown case {unknown[0]!r}; give some of {', '.join(CASES)}")
    columns = ("network, images", "forward, s", "record, s", "ratio", "measure, s", "ratio")
    table = Table(*columns, title=f"measure against forward, one thread, median of {REPEATS}")
    for name in wanted:
        table.add_row(*row(name))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
