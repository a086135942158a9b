"""Speed of mechanism replacement: scoring, affine compilation, swaps, refit of a wide convolution.

    python benchmarks/mechanisms.py [head refit]

Milliseconds on one thread, random weights and values. `head`: 512 units in front of a head. `refit`: a convolution on
512 channels of which half stay. Goals: affine compilation of 256 of 512 units with 16 parents under 0.3 s, 2,000 swaps
on precomputed features under 20 ms.
"""

import statistics

import torch
from rows import REPEATS, Row, Work, choose, half_range, in_turns, main
from torch import nn

from lit_prune.lab.reduce.classifier_head import (
    Features,
    Head,
    HeadEvidence,
    compile_head,
    interchange_heads,
    read_features,
)
from lit_prune.models import build_backbone
from lit_prune.replace import Replacement, Swaps, replace_mechanisms
from lit_prune.structure import Plan

IMAGES, UNITS, KEPT = 2000, 512, tuple(range(0, 512, 2))


def timed_row(name: str, work: Work, repeats: int = REPEATS) -> Row:
    """Row of the milliseconds of one call."""
    taken = [1000 * value for value in in_turns({"": work}, repeats)[""]]
    return Row(name, statistics.median(taken), half_range(taken), "ms")


def head_rows() -> list[Row]:
    """Stages of the reduction of 512 units in front of 10 classes."""
    torch.manual_seed(0)
    model = build_backbone("mlp", 10, in_channels=1, hidden=[UNITS, UNITS]).eval()
    batches = [(torch.randn(500, 1, 28, 28), torch.randint(10, (500,))) for _ in range(IMAGES // 500)]
    features = read_features(model, "layers.4", batches)
    head = Head.of(model, "layers.4")
    found = [timed_row("score: one pass over 2,000 images, cmr_logit", lambda: _score(model, batches))]
    scores = lambda: fresh(head, features).softmax.curvature().scores()  # noqa: E731
    found.append(timed_row("score: cmr_const from features", scores))
    for name, kind, settings in (
        ("constant", "constant", Replacement()),
        ("constant, joint loss", "constant", Replacement(objective="joint_loss")),
        ("affine r = 16", "affine", Replacement(parents=16)),
        ("affine r = 16, weighted by curvature", "affine", Replacement(parents=16, objective="loss")),
        ("affine, all parents", "affine", Replacement(parents=None)),
        ("refit", "refit", Replacement()),
    ):
        work = lambda kind=kind, settings=settings: compile_head(fresh(head, features), KEPT, kind, settings)  # noqa: E731
        found.append(timed_row(f"compile 256 of 512: {name}", work))
    low, high = head, compile_head(fresh(head, features), KEPT, "constant", Replacement())
    swap = lambda: interchange_heads(low, high, features, Swaps())  # noqa: E731
    found += [timed_row("verify: 2,000 swaps on features", swap)]
    found += [timed_row("verify: IIA, KL and certificate", swap().report)]
    plan = Plan(keep_channels={"layers.2": KEPT}, sizes={"layers.2": UNITS})
    example = torch.zeros(1, 1, 28, 28)
    whole = lambda: replace_mechanisms(model, plan, batches, "affine", example)  # noqa: E731
    return [*found, timed_row("replace_mechanisms, affine r = 16, whole (tracing, surgery, errors)", whole, 1)]


def fresh(head: Head, features: Features) -> HeadEvidence:
    """Evidence with nothing computed yet."""
    return HeadEvidence(head, features)


def _score(model: nn.Module, batches: list) -> torch.Tensor:
    features = read_features(model, "layers.4", batches)
    evidence = HeadEvidence(Head.of(model, "layers.4"), features)
    return evidence.moments.variances() * evidence.head.weight.square().sum(0)


def refit_rows() -> list[Row]:
    """A 3x3 convolution on 512 channels of which half stay: 4,608 columns, 64 positions an image."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 512, 3, padding=1, bias=False), nn.BatchNorm2d(512), nn.ReLU()]
    body += [nn.Conv2d(512, 512, 3, padding=1, bias=False), nn.BatchNorm2d(512), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)).eval()
    batches = [(torch.randn(64, 3, 8, 8), torch.zeros(64)) for _ in range(12)]
    plan = Plan(keep_channels={"0": KEPT}, sizes={"0": 512})
    work = lambda: replace_mechanisms(model, plan, batches, "refit", torch.zeros(1, 3, 8, 8))  # noqa: E731
    (taken,) = in_turns({"": work}, repeats=1, warmup=0)[""]
    return [Row("refit: 512-channel 3×3 reader, 256 kept, 768 images of 8×8", taken, unit="s")]


PARTS = {"head": head_rows, "refit": refit_rows}


def rows(names: list[str]) -> list[Row]:
    """Rows of the result table."""
    torch.set_num_threads(1)
    return [row for name in choose(names, list(PARTS)) for row in PARTS[name]()]


if __name__ == "__main__":
    main(rows, __doc__)
