"""EfficientNet-Lite0 to a share of its MACs in one call, from photographs without labels; nothing is trained.

    python examples/compress_without_labels.py --samples ../shared --keep 0.8

`--samples` holds `data/imagenet-1k-photos`, trained weights and `tools/real_networks.py`, which builds the network.
Every second photograph calibrates, the others tell how often the small network answers as the dense one does.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import center_crop, resize

from lit_prune import Recipe, compress, load_compact, save_compact


def photographs(folder: Path, side: int, count: int) -> torch.Tensor:
    """Images [B, 3, side, side] with mean = std = 0.5, one of each class."""
    images = []
    for file in sorted(folder.glob("*/*.jpg"))[:count]:
        image = center_crop(resize(Image.open(file).convert("RGB"), side * 8 // 7), side)
        images.append(torch.from_numpy(np.asarray(image, dtype="float32") / 127.5 - 1).permute(2, 0, 1))
    return torch.stack(images)


@torch.no_grad()
def answers(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The top class of every image."""
    return torch.cat([network(part).argmax(1) for part in images.split(32)])


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, default="../shared")
    parser.add_argument("--folder", type=Path, default="runs/efficientnet_lite0")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--allocation", default="measured", help="how the budget is shared out; global is faster")
    given = parser.parse_args(arguments)
    sys.path.insert(0, str(given.samples / "tools"))
    from real_networks import efficientnet_lite0

    torch.manual_seed(0)
    network = efficientnet_lite0()
    images = photographs(given.samples / "data" / "imagenet-1k-photos", given.side, given.images)
    calibration, others = images[::2], images[1::2]
    small, report = compress(
        network,
        calibration.split(32),
        keep=given.keep,
        task="classification",  # of images alone; agreement is then that of the top class
        recipe=Recipe(allocation=given.allocation),
    )
    save_compact(given.folder, small)
    small = load_compact(given.folder, model=efficientnet_lite0())
    found = {
        "macs": report["compact"]["macs"] / report["dense"]["macs"],
        "params": report["compact"]["params"] / report["dense"]["params"],
        "agreement": float((answers(network, others) == answers(small, others)).float().mean()),
        "calibration agreement": report["agreement"],
    }
    print(f"of the dense network's: MACs {found['macs']:.1%}, parameters {found['params']:.1%}")
    print(f"same top class as the dense network: {found['agreement']:.1%} of {len(others)} other photographs")
    return found


if __name__ == "__main__":
    main()
