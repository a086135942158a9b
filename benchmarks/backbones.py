"""Every backbone at its natural input: cost before and after a plan that keeps half of the MACs, and whether it works.

    python benchmarks/backbones.py [NAME ...]

For each: plan, surgery, forward, backward, save, load (bit-equal outputs) and replay of the plan from its JSON file.
`plan ms` is the planning after the graph is built.
"""

import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rows import Row, choose, main

from lit_prune import Plan, apply_plan, cost, load_compact, save_compact, score
from lit_prune.models import build_backbone
from lit_prune.structure import Budget, CostModel, plan_channels, trace_groups

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)
BACKBONES = {
    "resnet18": (IMAGENET, {}),
    "resnet18 (cifar stem)": (CIFAR, {"stem": "cifar"}),
    "resnet34": (IMAGENET, {}),
    "resnet50": (IMAGENET, {}),
    "vgg16_bn": (IMAGENET, {}),
    "mobilenet_v2": (IMAGENET, {}),
    "alexnet": (IMAGENET, {}),
    "convnext_tiny": (IMAGENET, {}),
    "vit_b_16": (IMAGENET, {}),
    "deit_tiny": (IMAGENET, {}),
    "timm/efficientnet_b0": (IMAGENET, {}),
    "cifar_resnet20": (CIFAR, {}),
    "cifar_resnet32": (CIFAR, {}),
    "cifar_resnet44": (CIFAR, {}),
    "cifar_resnet56": (CIFAR, {}),
    "cifar_convnet": (CIFAR, {}),
    "mlp": ((1, 28, 28), {"in_channels": 1}),
}


def examine(title: str, shape: tuple[int, int, int], options: dict) -> tuple[list[str], Row]:
    """Cells of one backbone and its row."""
    name, arguments = title.split(" ")[0], {"num_classes": 100, **options}
    torch.manual_seed(0)
    model = build_backbone(name, **arguments).eval()
    example = torch.zeros(1, *shape)
    clock = time.perf_counter()
    graph, dense = trace_groups(model, example), cost(model, example)
    cost_model = CostModel.build(model, graph, example)
    traced = time.perf_counter() - clock
    ranks = score(model, "magnitude")
    clock = time.perf_counter()
    plan = plan_channels(graph, cost_model, ranks, Budget("macs", 0.5, normalisation="layer_mean"))
    planned = time.perf_counter() - clock
    small = apply_plan(model, plan, example)
    compact = cost(small, example)
    works = check(model, small, plan, example, name, arguments)
    figures = [f"{dense.macs / 1e6:,.1f}", f"{compact.macs / 1e6:,.1f}", f"{compact.macs / dense.macs:.1%}"]
    figures += [f"{dense.params / 1e6:.2f}", f"{compact.params / 1e6:.2f}", f"{traced:.1f}", f"{planned * 1e3:.0f}"]
    cells = [title, "x".join(map(str, shape)), *figures, works]
    row = Row(
        f"{title}: MACs kept of a plan for half", compact.macs / dense.macs, unit="of dense", detail=f"works: {works}"
    )
    return cells, row


def check(model, small, plan: Plan, example: torch.Tensor, name: str, arguments: dict) -> str:
    """Forward, backward, save, load, replay; returns the words of what works."""
    images = torch.randn(2, *example.shape[1:])
    small.train()(images).square().mean().backward()
    trained = all(p.grad is not None for p in small.parameters())
    small.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        plan.save(Path(folder) / "plan.json")
        replayed = apply_plan(model, Plan.load(Path(folder) / "plan.json"), example).eval()
        shape = tuple(example.shape[1:])
        save_compact(Path(folder) / "c", small, backbone=name, arguments=arguments, input_shape=shape, plans=[plan])
        loaded = load_compact(Path(folder) / "c")
        equal = torch.equal(loaded(images), small(images))
        shapes = [p.shape for p in replayed.parameters()] == [p.shape for p in small.parameters()]
    met = plan.notes["met"] or f"budget missed: {plan.notes['reason']}"
    words = {"backward": trained, "save and load": equal, "replay": shapes}
    broken = [word for word, fine in words.items() if not fine]
    return "broken: " + ", ".join(broken) if broken else ("yes" if met is True else f"yes; {met}")


def rows(names: list[str]) -> list[Row]:
    """Prints the table for the named backbones, or all; returns what is kept of each."""
    table = Table("backbone", "input", title="Half of the MACs, by kernel norm relative to the layer's mean")
    for column in ("MACs M", "compact M", "kept", "params M", "compact M", "trace s", "plan ms"):
        table.add_column(column, justify="right")
    table.add_column("forward, backward, save, load, replay")
    found = []
    for title in choose(names, list(BACKBONES)):
        cells, row = examine(title, *BACKBONES[title])
        table.add_row(*cells)
        found.append(row)
    Console(width=150).print(table)
    return found


if __name__ == "__main__":
    main(rows, __doc__)
