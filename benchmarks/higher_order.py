"""Speed of the higher-order information of one layer: hulls, graphs, triplets, groupings, BROJA, KSG.

    python benchmarks/higher_order.py

Median of 5 runs after one to warm up, on one thread and on all. The channels are a seeded factor model of 2,000 images.
"""

import os
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lit_prune.information.broja import decompose, joint_counts
from lit_prune.information.gradients import gradient_sums
from lit_prune.information.graphs import excess_graph, greedy_modularity, redundancy_graph
from lit_prune.information.groupings import group_channels, permutation_null
from lit_prune.information.hulls import greedy_hulls
from lit_prune.information.ksg import ksg_information
from lit_prune.information.triplets import triplet_excess

CHANNELS, IMAGES, PAIRS, REPEATS = 512, 2000, 512, 5


def factor_model() -> tuple[Tensor, Tensor]:
    """T [images] and pooled outputs [images, channels] that share 40 factors."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(IMAGES, 40, generator=generator)
    loadings = 0.4 * torch.randn(40, CHANNELS, generator=generator)
    values = factors @ loadings + torch.randn(IMAGES, CHANNELS, generator=generator)
    return factors[:, 0] + torch.randn(IMAGES, generator=generator), values


def jobs() -> dict[str, tuple[Callable[[], object], int]]:
    """Named work, with the number of items done by one call."""
    target, values = factor_model()
    matrix = torch.corrcoef(torch.cat([target[:, None], values], 1).T.double())
    task, between = matrix[0, 1:], matrix[1:, 1:]
    pairs = torch.randint(CHANNELS, (PAIRS, 2), generator=torch.Generator().manual_seed(0))
    four, five = (joint_counts(target, values, pairs, bins) for bins in (4, 5))
    features, member = values[:2].T.double().numpy(), (values[:2] > 0).long().numpy()
    layer = nn.Conv2d(128, 128, 3, padding=1)
    inputs = torch.randn(64, 128, 8, 8)
    outputs = layer(inputs).detach()
    return {
        f"hulls, {CHANNELS} channels": (lambda: greedy_hulls(between), 1),
        f"R graph and its modularity, {CHANNELS} channels": (lambda: greedy_modularity(redundancy_graph(between)), 1),
        f"S graph and its modularity, {CHANNELS} channels": (lambda: greedy_modularity(excess_graph(task, between)), 1),
        "triplets, 1,500": (lambda: triplet_excess(task, between), 1),
        f"k-means, {CHANNELS} channels": (lambda: group_channels(features), 1),
        "rand index, 200 shuffles": (lambda: permutation_null(member[0], member[1]), 1),
        "joint counts, 4 bins": (lambda: joint_counts(target, values, pairs), PAIRS),
        "BROJA, 4 bins": (lambda: decompose(four), PAIRS),
        "BROJA, 5 bins": (lambda: decompose(five), PAIRS),
        "KSG": (lambda: ksg_information(target, values[:, :4]), 4),
        "gradient sums, conv 128×128×3×3 on 64×8×8": (lambda: gradient_sums(layer, inputs, outputs, target[:64]), 1),
        "forward of that layer": (lambda: layer(inputs), 1),
    }


def seconds(work: Callable[[], object]) -> float:
    """Median time of one call."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Prints the table."""
    threads = sorted({1, os.cpu_count() or 1})
    table = Table(
        "work", *(f"{count} thread{'s' * (count > 1)}" for count in threads), title="higher-order information"
    )
    work = jobs()
    found: dict[str, list[str]] = {name: [] for name in work}
    for count in threads:
        torch.set_num_threads(count)
        for name, (call, items) in work.items():
            taken = seconds(call)
            found[name].append(f"{1000 * taken:.1f} ms" if items == 1 else f"{items / taken:,.0f} /s")
    for name, cells in found.items():
        table.add_row(name, *cells)
    Console(width=110).print(table)
    gaps = [float(decompose(work_gap).gap.max()) for work_gap in _counted()]
    print(f"largest BROJA duality gap, 4 and 5 bins: {gaps[0]:.1e} and {gaps[1]:.1e} nats")


def _counted() -> list[Tensor]:
    """Joint counts of 64 pairs in 4 and in 5 bins."""
    target, values = factor_model()
    return [joint_counts(target, values, torch.arange(128).view(64, 2), bins) for bins in (4, 5)]


if __name__ == "__main__":
    main()
