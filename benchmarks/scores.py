"""Cost of scores: channel independence against the plain loop over singular values, and one pass for many scores.

    python benchmarks/scores.py [chip passes]

One thread, random weights, random images. `plain loop`: nuclear norm of the feature matrix of every image once for each
channel, with that row set to zero. `one pass`: sums and independence or saliency together, against a pass for each.
"""

import torch
from rows import Row, choose, in_turns, main, ratio_row
from torch import Tensor

from lit_prune.models import build_backbone
from lit_prune.scores import Evidence
from lit_prune.scores.independence import nuclear_drops

SHAPES = {
    "ResNet-56 stage 1": (16, 1024),
    "stage 3": (64, 64),
    "VGG-16 deep": (512, 16),
    "ResNet-18 stage 2": (128, 256),
}
"""Name to channels and positions."""


def plain_loop(features: Tensor) -> Tensor:
    """Drop of the nuclear norm of each matrix [B, N, P] without each row, one singular value decomposition each."""
    drops = torch.empty(features.shape[:2], dtype=torch.float64)
    for image, matrix in enumerate(features.double()):
        whole = torch.linalg.svdvals(matrix).sum()
        for row in range(len(matrix)):
            without = matrix.clone()
            without[row] = 0
            drops[image, row] = whole - torch.linalg.svdvals(without).sum()
    return drops


def chip() -> list[Row]:
    """Batched against the loop, for layers of usual shapes."""
    found = []
    for name, (channels, positions) in SHAPES.items():
        features = torch.randn(2, channels, positions, generator=torch.Generator().manual_seed(0))
        taken = in_turns({"loop": lambda f=features: plain_loop(f), "all": lambda f=features: nuclear_drops(f)}, 3)
        title = f"chip, {name} ({channels}×{positions}): plain loop / all rows at once"
        found.append(ratio_row(title, taken["loop"], taken["all"]))
    return found


def passes() -> list[Row]:
    """What sharing a pass saves on a CIFAR ResNet-20."""
    torch.manual_seed(0)
    model = build_backbone("cifar_resnet20", 10).eval()
    batches = [(torch.randn(128, 3, 32, 32), torch.arange(128) % 10)]

    def separately(*needs: str) -> None:
        for need in needs:
            Evidence(model, batches).gather([need])

    found = []
    for needs in (("sums", "saliency"), ("sums", "pooled", "input_variances", "independence")):
        works = {
            "separate": lambda needs=needs: separately(*needs),
            "one": lambda needs=needs: Evidence(model, batches).gather(needs),
        }
        taken = in_turns(works, 3)
        found.append(ratio_row(f"{' + '.join(needs)}: a pass each / one pass", taken["separate"], taken["one"]))
    return found


def rows(names: list[str]) -> list[Row]:
    """Rows of the result table."""
    torch.set_num_threads(1)
    cases = {"chip": chip, "passes": passes}
    return [row for name in choose(names, list(cases)) for row in cases[name]()]


if __name__ == "__main__":
    main(rows, __doc__)
