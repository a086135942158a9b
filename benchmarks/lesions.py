"""Lesions with a shared prefix against one full forward pass a lesion.

    python benchmarks/lesions.py [LAYER ...]

ResNet-20 on 32×32 images, one thread, random weights and images. 16 lesions of each of five layers spread over the
depth. `loop`: a hook that zeroes the channel, one forward pass a lesion, in batches of
256, and in batches of 16, the fastest for the loop itself; `together`: `variant_losses` as the verb runs it. Seconds
are per 1,000 lesion-images.
"""

import torch
import torch.nn.functional as F
from rows import Row, choose, in_turns, main, ratio_row

from lit_prune.lab.lesion.variants import Variants, variant_losses
from lit_prune.models import build_backbone

REPEATS = 3
LESIONS, IMAGES = 16, 256
LAYERS = ("layer1.0.conv1", "layer1.2.conv2", "layer2.1.conv1", "layer3.0.conv1", "layer3.2.conv1")


@torch.no_grad()
def loop(
    model: torch.nn.Module, layer: str, channels: range, batches: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Losses [channels, images] by one full forward pass a channel and batch, a hook setting the channel to 0."""
    lesioned = []
    for channel in channels:
        hook = model.get_submodule(layer).register_forward_hook(
            lambda _, __, out, c=channel: out.index_fill(1, torch.tensor([c]), 0)
        )
        lesioned.append(
            torch.cat([F.cross_entropy(model(images), labels, reduction="none") for images, labels in batches])
        )
        hook.remove()
    return torch.stack(lesioned)


def measure_layer(model: torch.nn.Module, layer: str, images: torch.Tensor) -> dict[str, list[float]]:
    """Seconds per 1,000 lesion-images of the three ways, by turn; a loop of four lesions stands for all of them."""
    labels = torch.arange(len(images)) % 10
    width = model.get_submodule(layer).weight.shape[0]
    all_lesions = Variants.lesions(range(LESIONS), width)
    small = list(zip(images.split(16), labels.split(16), strict=True))
    taken = in_turns(
        {
            "loop": lambda: loop(model, layer, range(4), [(images, labels)]),
            "small": lambda: loop(model, layer, range(4), small),
            "together": lambda: variant_losses(model, layer, all_lesions, [(images, labels)]),
        },
        REPEATS,
    )
    counts = {"loop": 4, "small": 4, "together": LESIONS}
    scale = {name: 1000 / count / len(images) for name, count in counts.items()}
    return {name: [scale[name] * value for value in values] for name, values in taken.items()}


def rows(names: list[str]) -> list[Row]:
    """Rows of the result table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_backbone("cifar_resnet20", num_classes=10).eval()
    images = torch.randn(IMAGES, 3, 32, 32)
    found = []
    for layer in choose(names, LAYERS):
        taken = measure_layer(model, layer, images)
        found.append(ratio_row(f"{layer}: loop, batches of 256 / together", taken["loop"], taken["together"]))
        found.append(ratio_row(f"{layer}: loop, batches of 16 / together", taken["small"], taken["together"]))
    return found


if __name__ == "__main__":
    main(rows, __doc__)
