"""Seconds to trace and plan, beside Torch-Pruning's graph and cut, on four networks of torchvision.

    python benchmarks/tracing.py [--repeats N]

CPU seconds of one thread, in turns, the best of `--repeats`; images of 224 × 224, random weights, half of the
multiply-adds.
`trace` finds and checks the groups (`trace_groups`), `plan` counts the costs and shares out a uniform budget,
`Torch-Pruning` builds its graph and takes 30 % of the channels by magnitude, the classifier left out.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from architectures import guarded, random_ranks
from torch import Tensor, nn

from lit_prune.structure import Budget, CostModel, plan_channels, trace_groups

LIMIT = 30
"""Longest CPU time for Torch-Pruning on one network; on Swin it does not come to an end."""
NETWORKS = ("resnet50", "convnext_tiny", "vit_b_16", "swin_t")


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def ours(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """Seconds to trace, and to plan."""
    begin = time.process_time()
    graph = trace_groups(model, images)
    traced = time.process_time()
    costs = CostModel.build(model, graph, images)
    plan_channels(graph, costs, random_ranks(model), Budget("macs", 0.5, "uniform"))
    return traced - begin, time.process_time() - traced


def theirs(model: nn.Module, images: Tensor) -> None:
    """Graph and cut."""
    import torch_pruning as tp

    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    attentions = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    importance = tp.importance.MagnitudeImportance()
    pruner = tp.pruner.BasePruner(
        model, images, importance, pruning_ratio=0.3, ignored_layers=heads, num_heads=attentions
    )
    pruner.step()


def _theirs(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Seconds of Torch-Pruning."""
    return {"seconds": seconds(lambda: theirs(model, images))}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    images = torch.randn(1, 3, 224, 224)
    ours(torchvision.models.resnet18(), images)  # imports
    theirs(torchvision.models.resnet18(), images)
    print("| network | forward | trace | plan | Torch-Pruning | ratio |\n|" + " --- |" * 6)
    for name in NETWORKS:
        model = getattr(torchvision.models, name)().eval()
        with torch.no_grad():
            forward = min(seconds(lambda model=model: model(images)) for _ in range(repeats))
        mine: list[tuple[float, float]] = []
        other: list[Any] = []
        for _ in range(repeats):
            fresh = getattr(torchvision.models, name)().eval()  # a known one is not traced again
            mine.append(ours(fresh, images))
            if all(isinstance(taken, float) for taken in other):
                other += guarded(_theirs, LIMIT, fresh, images).values()
        trace, plan = min(mine, key=sum)
        cells = "longer or an error | –"
        if all(isinstance(taken, float) for taken in other):
            cells = f"{min(other):.2f} s | {(trace + plan) / min(other):.1f}"
        print(f"| {name} | {forward:.2f} s | {trace:.2f} s | {plan:.2f} s | {cells} |", flush=True)


if __name__ == "__main__":
    main()
