"""A small vision transformer at half of its multiply-adds: MLP alone, with heads, with the embedding's width too.

    python benchmarks/vit_parts.py [--seeds N] [--epochs N]

Real digits (scikit-learn, 8 × 8, 1,347 to train, 450 to test); a ViT of timm, 4 blocks of width 48 with 4 heads, is
trained here. Every plan keeps 50 % of the multiply-adds by magnitude (global, isomorphic). Accuracy in per cent, the
mean over the seeds: right after surgery with each stand-in (fitted on the training images, no labels), and after an
epoch of AdamW at 1e-3. Refit and affine are fitted as stages of `fit` fit them, so that they bear the training that
follows (`noise`), and refit also as closely as it goes (`noise=0`).
"""

import argparse
import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lit_prune import cost, make_plan, replace_mechanisms, score
from lit_prune.train.stages import STAND_IN_SETTINGS

Batches = list[tuple[Tensor, Tensor]]
PARTS = {"MLP": ["mid"], "MLP + heads": ["mid", "heads"], "MLP + heads + width": ["mid", "heads", "width"]}
CLOSEST = replace(STAND_IN_SETTINGS, noise=0.0)
KINDS = {kind: (kind, STAND_IN_SETTINGS) for kind in ("delete", "constant", "affine", "refit")}
KINDS["refit, closest"] = ("refit", CLOSEST)


def digits(seed: int) -> tuple[Batches, Batches]:
    """Batches to train and to test."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cut = lambda rows: [(images[i], labels[i]) for i in rows.split(64)]  # noqa: E731
    return cut(order[:1347]), cut(order[1347:])


def train(model: nn.Module, batches: Batches, epochs: int, rate: float) -> None:
    """AdamW with a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    model.train()
    for _ in range(epochs):
        for place in torch.randperm(len(batches)).tolist():
            images, labels = batches[place]
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Per cent."""
    right = sum(int((model.eval()(images).argmax(1) == labels).sum()) for images, labels in batches)
    return 100 * right / sum(len(labels) for _, labels in batches)


def rows(seed: int, epochs: int) -> Iterator[tuple[str, str, float, float, float]]:
    """(parts, stand-in, share of the multiply-adds, accuracy, accuracy after one epoch)."""
    torch.manual_seed(seed)
    known, unknown = digits(seed)
    model = timm.models.VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=4, num_heads=4
    )
    train(model, known, epochs, 2e-3)
    dense, image = cost(model, known[0][0][:1]).macs, known[0][0][:1]
    yield "dense", "", 1.0, accuracy(model, unknown), float("nan")
    scores = score(model, "magnitude", known)
    for name, parts in PARTS.items():
        plan = make_plan(model, scores, image, "macs", 0.5, normalisation="isomorphic", only=parts)
        for stand_in, (kind, settings) in KINDS.items():
            small = replace_mechanisms(model, plan, known, kind=kind, settings=settings).model
            before, again = accuracy(small, unknown), copy.deepcopy(small)
            torch.manual_seed(seed)
            train(again, known, 1, 1e-3)
            yield name, stand_in, cost(small, image).macs / dense, before, accuracy(again, unknown)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for seed in range(arguments.seeds):
        for name, kind, *figures in rows(seed, arguments.epochs):
            found.setdefault((name, kind), []).append(tuple(figures))
    print("| cut | stand-in | MACs kept | after surgery | after one epoch |\n|" + " --- |" * 5)
    for (name, kind), figures in found.items():
        share, before, after = (sum(column) / len(figures) for column in zip(*figures, strict=True))
        print(f"| {name} | {kind} | {share:.2f} | {before:.1f} | {'' if after != after else f'{after:.1f}'} |")


if __name__ == "__main__":
    main()
