"""Cost of the channel table of two trained networks on their own images, beside the plain forward pass.

    python benchmarks/trained.py [CASE ...]

EfficientNet-Lite0 on ImageNet photographs, ESPNet on CamVid street scenes, as their owners have them
(`../shared/tools/real_networks.py` and `../shared/data` beside this folder; without them a case is left out, which is
said). As in `measure.py`: `measure` whole, in turns with the plain pass batch by batch, median of 5 after one to warm
up, one thread. The table costs the same whatever the number of images; these are few, so the ratio is on the high side.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import batch_by_batch
from PIL import Image
from rows import REPEATS, Row, choose, main, ratio_row
from task_cases import REAL, real_networks
from torch import Tensor, nn

from lit_prune.measurement.protocol import DEFAULT_PROTOCOL
from lit_prune.processes import keep_freed_memory

DATA = REAL.parents[1] / "data"
Batches = list[tuple[Tensor, Tensor]]


def read(file: Path) -> np.ndarray:
    """An image, uint8 RGB [H, W, 3]."""
    return np.asarray(Image.open(file).convert("RGB"))


def photographs(count: int = 128, batch: int = 32, side: int = 224) -> Batches:
    """ImageNet photographs, centre crop, mean = std = 0.5, with their classes."""
    images, labels = [], []
    for file in sorted((DATA / "imagenet-1k-photos").glob("*/*.jpg"))[:count]:
        image = read(file)
        top, left = ((size - side) // 2 for size in image.shape[:2])
        values = image[top : top + side, left : left + side].astype("float32") / 127.5 - 1
        images.append(torch.from_numpy(values).permute(2, 0, 1))
        labels.append(int(file.stem))
    stacked = torch.stack(images), torch.tensor(labels)
    return list(zip(*(part.split(batch) for part in stacked), strict=True))


def street_scenes(count: int = 24, batch: int = 4) -> Batches:
    """CamVid test images at full size with their label maps."""
    files = sorted((DATA / "camvid" / "test" / "images").glob("*.webp"))[:count]
    images = torch.stack([real_networks().camvid_input(read(file)) for file in files])
    maps = [np.asarray(Image.open(file.parents[1] / "labels" / f"{file.stem}.png")).astype("int64") for file in files]
    return list(zip(images.split(batch), torch.from_numpy(np.stack(maps)).split(batch), strict=True))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batches]]] = {
    "efficientnet_lite0": (lambda: real_networks().efficientnet_lite0(), photographs),
    "espnet": (lambda: real_networks().espnet_camvid(), street_scenes),
}


def rows(names: list[str]) -> list[Row]:
    """Rows of the result table."""
    keep_freed_memory()
    torch.set_num_threads(1)
    found = []
    for name in choose(names, CASES):
        if not (REAL.exists() and DATA.is_dir()):
            print(f"{name}: left out, there is no {REAL} or no {DATA}")
            continue
        build, load = CASES[name]
        model, batches = build(), load()
        taken = [batch_by_batch(model, batches, DEFAULT_PROTOCOL) for _ in range(1 + REPEATS)][1:]
        images = sum(len(images) for images, _ in batches)
        size = "×".join(str(side) for side in batches[0][0].shape[2:])
        found.append(ratio_row(f"{name}, {images}×{size}: measure / forward", *zip(*taken, strict=True)))
    return found


if __name__ == "__main__":
    main(rows, __doc__)
