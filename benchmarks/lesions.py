"""Lesions with a shared prefix against one full forward pass a lesion.

    python benchmarks/lesions.py

ResNet-20 on 32×32 images, one thread, random weights and images. 16 lesions of each of five layers spread over the
depth, and of all of them in one sum. `loop`: a hook that zeroes the channel, one forward pass a lesion, in batches of
256, and in batches of 16, the fastest for the loop itself; `together`: `variant_losses` as the verb runs it. Seconds
are per 1,000 lesion-images, the median of 3 after one to warm up, in turns.
"""

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from lit_prune.backbones import build_backbone
from lit_prune.interventions import Variants, losses_one_by_one, variant_losses

REPEATS = 3
LESIONS, IMAGES = 16, 256
LAYERS = ("layer1.0.conv1", "layer1.2.conv2", "layer2.1.conv1", "layer3.0.conv1", "layer3.2.conv1")


def timed(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(REPEATS + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def measure_layer(model: torch.nn.Module, layer: str, images: torch.Tensor) -> dict[str, float]:
    """Seconds per 1,000 lesion-images of the three ways; a loop of four lesions stands for all of them."""
    labels = torch.arange(len(images)) % 10
    width = model.get_submodule(layer).weight.shape[0]
    all_lesions, few = Variants.lesions(range(LESIONS), width), Variants.lesions(range(4), width)
    small = list(zip(images.split(16), labels.split(16), strict=True))
    seconds = timed(
        {
            "loop": lambda: losses_one_by_one(model, layer, few, [(images, labels)]),
            "small": lambda: losses_one_by_one(model, layer, few, small),
            "together": lambda: variant_losses(model, layer, all_lesions, [(images, labels)]),
        }
    )
    counts = {"loop": 4, "small": 4, "together": LESIONS}
    return {name: 1000 * value / counts[name] / len(images) for name, value in seconds.items()}


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_backbone("cifar_resnet20", num_classes=10).eval()
    images = torch.randn(IMAGES, 3, 32, 32)
    columns = ("layer", "loop, 256", "loop, 16", "together", "ratio to 256", "ratio to 16")
    table = Table(*columns, title="seconds per 1,000 lesion-images")
    rows = {layer: measure_layer(model, layer, images) for layer in LAYERS}
    rows["all five"] = {name: sum(row[name] for row in rows.values()) for name in ("loop", "small", "together")}
    for layer, row in rows.items():
        cells = [f"{row[name]:.2f}" for name in ("loop", "small", "together")]
        table.add_row(layer, *cells, *(f"{row[name] / row['together']:.1f}" for name in ("loop", "small")))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
