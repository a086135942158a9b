"""`compress` at the size of ImageNet: plain forward passes, processor time and memory of the whole job.

    python benchmarks/large_images.py SAMPLES --out FILE.jsonl [--network resnet50] [--images 60] [--keep 0.5]

ResNet-50 of torchvision with random weights (BatchNorm's statistics taken from the images), photographs of 224×224
pixels of the folder of samples, the second half of them mirrored where there are not enough. Passes: how many images
went through the first layer, each job's own networks together, over how many there are; beside it the processor time
over that of plain forward passes of the same images in the same batches. MB: the most that the process held, and what
it held before the job (images and libraries).
"""

import argparse
import json
import resource
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
import torchvision
from compression import peak
from compression_cases import HALF, normalised, photographs
from torch import Tensor, nn

from lit_prune import recalibrate_batchnorm
from lit_prune.compression import Recipe, compress
from lit_prune.replace import Replacement
from lit_prune.structure import cost
from lit_prune.version import commit

BATCH, SIDE = 20, 224
ALONE = Replacement(towards="weights", together=0, unsupported="delete")


def read(samples: Path, count: int) -> list[tuple[Tensor, Tensor]]:
    """Photographs and, where they do not reach, their mirror images; labels that nothing reads."""
    files = sorted((samples / "data/imagenet-1k-photos").glob("*/*.jpg"), key=lambda file: int(file.stem))
    images = normalised(photographs(files[:count], 256, SIDE), HALF)
    if count > len(images):
        images = torch.cat([images, images[: count - len(images)].flip(-1)])
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(BATCH)]


class Passes:
    """Counts the images that reach any convolution of three input channels: networks and their copies."""

    def __init__(self) -> None:
        self.images = 0
        nn.modules.module.register_module_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        """One call of any layer."""
        if isinstance(module, nn.Conv2d) and module.in_channels == 3 and output.device.type != "meta":
            self.images += len(output)


def watch_memory(every: float, says: list[tuple[float, int]]) -> None:
    """Takes down (seconds, MB held) for as long as the process lives."""

    def look() -> None:
        start = time.perf_counter()
        while True:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            says.append((time.perf_counter() - start, pages * resource.getpagesize() >> 20))
            time.sleep(every)

    threading.Thread(target=look, daemon=True).start()


def main() -> None:
    """One job, one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--together", type=int, default=0, help="passes of steps through each block")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    batches = read(arguments.samples, arguments.images)
    model = torchvision.models.get_model(arguments.network).eval()
    recalibrate_batchnorm(model, batches, limit=5)
    few = batches[: max(1, 60 // BATCH)]
    with torch.no_grad():
        model(few[0][0])
        start = time.process_time()
        for images, _ in few:
            model(images)
    plain = (time.process_time() - start) / sum(len(images) for images, _ in few) * arguments.images
    before = peak()
    passes, memory = Passes(), []
    watch_memory(10, memory)
    start, wall = time.process_time(), time.perf_counter()
    recipe = Recipe(replacement=replace(ALONE, together=arguments.together))
    small, report = compress(model, batches, arguments.keep, recipe=recipe)
    processor = time.process_time() - start
    example = batches[0][0][:1]
    row = {
        "network": arguments.network,
        "images": arguments.images,
        "keep": cost(small, example).macs / cost(model, example).macs,
        "together": arguments.together,
        "passes": passes.images / arguments.images,
        "processor_seconds": processor,
        "seconds": time.perf_counter() - wall,
        "plain_pass_seconds": plain,
        "processor_passes": processor / plain,
        "steps": report["seconds"],
        "process_mb": peak(),
        "before_mb": before,
        "agreement": report["agreement"],
        "threads": torch.get_num_threads(),
        "commit": (commit() or "")[:7],
        "memory": memory[:: max(1, len(memory) // 60)],
    }
    with arguments.out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print({name: value for name, value in row.items() if name != "memory"})


if __name__ == "__main__":
    main()
