"""Speed of mechanism replacement: scoring, affine compilation, swaps, refit of a wide convolution.

    python benchmarks/mechanisms.py

One thread, median of 5 after one to warm up, random weights and values. Goals: affine compilation of 256 of 512 units
with 16 parents under 0.3 s, 2,000 swaps on precomputed features under 20 ms.
"""

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lit_prune.backbones import build_backbone
from lit_prune.mechanisms import Replacement, Swaps, replace_mechanisms
from lit_prune.mechanisms.head import Features, Head, HeadEvidence, compile_head, interchange_heads, read_features
from lit_prune.mechanisms.stand_ins import input_moments
from lit_prune.structure import Plan

REPEATS = 5
IMAGES, UNITS, KEPT = 2000, 512, tuple(range(0, 512, 2))


def seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median time of one call."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def head_rows() -> list[tuple[str, float]]:
    """Stages of the reduction of 512 units in front of 10 classes."""
    torch.manual_seed(0)
    model = build_backbone("mlp", 10, in_channels=1, hidden=[UNITS, UNITS]).eval()
    batches = [(torch.randn(500, 1, 28, 28), torch.randint(10, (500,))) for _ in range(IMAGES // 500)]
    features = read_features(model, "layers.4", batches)
    head = Head.of(model, "layers.4")
    rows = [("score: one pass over 2,000 images, cmr_logit", seconds(lambda: _score(model, batches)))]
    rows.append(("score: cmr_const from features", seconds(lambda: fresh(head, features).softmax.curvature().scores())))
    for name, kind, settings in (
        ("constant", "constant", Replacement()),
        ("constant, joint loss", "constant", Replacement(objective="joint_loss")),
        ("affine r = 16", "affine", Replacement(parents=16)),
        ("affine r = 16, weighted by curvature", "affine", Replacement(parents=16, objective="loss")),
        ("affine, all parents", "affine", Replacement(parents=None)),
        ("refit", "refit", Replacement()),
    ):
        work = lambda kind=kind, settings=settings: compile_head(fresh(head, features), KEPT, kind, settings)  # noqa: E731
        rows.append((f"compile 256 of 512: {name}", seconds(work)))
    low, high = head, compile_head(fresh(head, features), KEPT, "constant", Replacement())
    rows.append(("verify: 2,000 swaps on features", seconds(lambda: interchange_heads(low, high, features, Swaps()))))
    found = interchange_heads(low, high, features, Swaps())
    rows.append(("verify: IIA, KL and certificate", seconds(found.report)))
    plan = Plan(keep_channels={"layers.2": KEPT}, sizes={"layers.2": UNITS})
    example = torch.zeros(1, 1, 28, 28)
    whole = seconds(lambda: replace_mechanisms(model, plan, batches, example, "affine"), 1)
    return [*rows, ("replace_mechanisms, affine r = 16, whole (tracing, surgery, errors)", whole)]


def fresh(head: Head, features: Features) -> HeadEvidence:
    """Evidence with nothing computed yet."""
    return HeadEvidence(head, features)


def _score(model: nn.Module, batches: list) -> torch.Tensor:
    features = read_features(model, "layers.4", batches)
    evidence = HeadEvidence(Head.of(model, "layers.4"), features)
    return input_moments(evidence.sums)[1].diagonal() * evidence.head.weight.square().sum(0)


def refit_row() -> tuple[str, float]:
    """A 3x3 convolution on 512 channels of which half stay: 4,608 columns, 64 positions an image."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 512, 3, padding=1, bias=False), nn.BatchNorm2d(512), nn.ReLU()]
    body += [nn.Conv2d(512, 512, 3, padding=1, bias=False), nn.BatchNorm2d(512), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)).eval()
    batches = [(torch.randn(64, 3, 8, 8), torch.zeros(64)) for _ in range(12)]
    plan = Plan(keep_channels={"0": KEPT}, sizes={"0": 512})
    work = lambda: replace_mechanisms(model, plan, batches, torch.zeros(1, 3, 8, 8), "refit")  # noqa: E731
    start = time.perf_counter()
    work()
    return "refit: 512-channel 3×3 reader, 256 kept, 768 images of 8×8", time.perf_counter() - start


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    table = Table("stage", "seconds", title=f"mechanism replacement, one thread, median of {REPEATS}")
    for name, value in (*head_rows(), refit_row()):
        table.add_row(name, f"{value:.4f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
