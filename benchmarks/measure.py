"""Cost of the channel table: one pass that records all output moments against the plain forward pass.

    python benchmarks/measure.py [resnet18 vgg16 mobilenetv2 resnet50]

One thread, median of 5 after one to warm up, random weights, random images. `forward` is evaluation mode without
gradients; `measure` is `lit_prune.measure` whole: forward, sums, and the table made from them; `record` is the pass
alone, what more images cost.
"""

import torch
from rows import REPEATS, Row, choose, in_turns, main, ratio_row
from torch import nn

from lit_prune import measure
from lit_prune.backbones import build_backbone
from lit_prune.measure import collect_sums

CASES = {
    "resnet18": ("resnet18", {"stem": "cifar"}, 32, 64),
    "vgg16": ("vgg16_bn", {"stem": "cifar"}, 32, 64),
    "mobilenetv2": ("mobilenet_v2", {"stem": "cifar"}, 32, 64),
    "resnet50": ("resnet50", {}, 224, 8),
}
"""Name to backbone, arguments, image size, batch."""


def figures(name: str) -> list[Row]:
    """Rows of one case."""
    backbone, arguments, size, batch = CASES[name]
    torch.manual_seed(0)
    model: nn.Module = build_backbone(backbone, num_classes=100, **arguments).eval()
    batches = [(torch.randn(batch, 3, size, size), torch.arange(batch) % 100)]

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return model(batches[0][0])

    works = {"record": lambda: collect_sums(model, batches), "measure": lambda: measure(model, batches)}
    taken = in_turns({"forward": forward, **works}, REPEATS)
    title = f"{name}, {batch}×{size}×{size}"
    return [ratio_row(f"{title}: {work} / forward", taken[work], taken["forward"]) for work in works]


def rows(names: list[str]) -> list[Row]:
    """Rows of the result table."""
    torch.set_num_threads(1)
    return [row for name in choose(names, list(CASES)) for row in figures(name)]


if __name__ == "__main__":
    main(rows, __doc__)
