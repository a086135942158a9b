"""Peak memory of images held resident and of tracing, each in a process of its own.

    python benchmarks/memory.py [resident resnet18 mobilenet_v2]

On the CPU the largest resident set of the process, less that of the same process without the work; on a CUDA device the
largest amount of memory allocated. `resident`: the 50,000 training images of CIFAR-100 as uint8, loaded and one batch
augmented. Networks: a forward pass of 128 images of 32×32 pixels without gradients, and the traced pass with all output
moments of all layers.
"""

import multiprocessing
import resource
from collections.abc import Callable

import torch
from rows import Row, choose, main
from torch import nn

from lit_prune.data.augmentation import Normalisation, PadCropFlip
from lit_prune.data.resident import ResidentLoader
from lit_prune.data.sampling import EpochSampler
from lit_prune.data.sources import MemoryImages
from lit_prune.measurement.channel_table import collect_sums
from lit_prune.models import build_backbone

IMAGES, BATCH, MEBIBYTE = 50_000, 128, 2**20
NETWORKS = ("resnet18", "mobilenet_v2")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network and a batch of images on the device."""
    model = build_backbone(name, num_classes=100, stem="cifar").eval().to(DEVICE)
    return model, torch.randn(BATCH, 3, 32, 32, device=DEVICE)


def load(name: str) -> None:
    """The network alone."""
    network(name)


@torch.no_grad()
def forward(name: str) -> None:
    """A forward pass."""
    model, images = network(name)
    model(images)


def trace(name: str) -> None:
    """A traced pass over two batches."""
    model, images = network(name)
    labels = torch.arange(BATCH, device=DEVICE) % 100
    collect_sums(model, [(images, labels)] * 2)


def nothing(_: str) -> None:
    """A process that only starts."""


def hold(_: str) -> None:
    """Resident images, and one batch of them augmented."""
    images = MemoryImages(torch.zeros(IMAGES, 3, 32, 32, dtype=torch.uint8), torch.zeros(IMAGES, dtype=torch.long))
    sampler = EpochSampler(torch.arange(IMAGES), BATCH, shuffle=True)
    loader = ResidentLoader(images.to(DEVICE), sampler, Normalisation((0.5,) * 3, (0.2,) * 3), PadCropFlip(IMAGES, 0))
    next(iter(loader))


def _report(work: Callable[[str], None], name: str, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    work(name)
    allocated = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    queue.put(allocated or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def peak(work: Callable[[str], None], name: str = "") -> float:
    """MiB at the highest point of a process that does the work."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_report, args=(work, name, queue))
    process.start()
    found = queue.get(timeout=300)
    process.join()
    return found / MEBIBYTE


def resident_rows() -> list[Row]:
    """Peak of resident images."""
    held, started = peak(hold), peak(nothing) if DEVICE.type == "cpu" else 0.0
    pixels = IMAGES * 3 * 32 * 32 / MEBIBYTE
    return [Row("CIFAR-100 training images, resident", held - started, unit="MiB", detail=f"pixels {pixels:.1f} MiB")]


def network_rows(name: str) -> list[Row]:
    """Peaks of a forward and of a traced pass."""
    base = peak(load, name) if DEVICE.type == "cpu" else 0.0
    plain, traced = peak(forward, name) - base, peak(trace, name) - base
    detail = f"forward alone {plain:.0f} MiB, × {traced / plain:.2f}"
    return [Row(f"{name}: traced pass, {BATCH} images", traced, unit="MiB", detail=detail)]


def rows(names: list[str]) -> list[Row]:
    """Rows of the result table."""
    chosen = choose(names, ("resident", *NETWORKS))
    return [row for name in chosen for row in (resident_rows() if name == "resident" else network_rows(name))]


if __name__ == "__main__":
    main(rows, __doc__)
