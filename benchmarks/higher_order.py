"""Speed of the higher-order information of one layer: hulls, graphs, triplets, groupings, BROJA, KSG.

    python benchmarks/higher_order.py

Against the forward pass of one layer (conv 128×128×3×3 on 64 images of 8×8), which any machine can time; one thread,
median of 5 runs after one to warm up, in turns. The channels are a seeded factor model of 2,000 images.
"""

from collections.abc import Callable

import torch
from rows import Row, choose, half_range, in_turns, main
from torch import Tensor, nn

from lit_prune.lab.analyze.broja import decompose, joint_counts
from lit_prune.lab.analyze.samples import ksg_information
from lit_prune.lab.analyze.triplets import triplet_excess
from lit_prune.lab.trajectory.gradients import gradient_sums
from lit_prune.scores.graphs import excess_graph, greedy_modularity, redundancy_graph
from lit_prune.scores.groupings import group_channels, permutation_null
from lit_prune.scores.hulls import greedy_hulls

CHANNELS, IMAGES, PAIRS = 512, 2000, 512
FORWARD = "forward"


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
        FORWARD: (lambda: layer(inputs), 1),
    }


def rows(names: list[str]) -> list[Row]:
    """Rows of the result table; an item is a pair of channels, a channel or the whole layer, as the name says."""
    torch.set_num_threads(1)
    works = jobs()
    known = [name for name in works if name != FORWARD]
    wanted = choose(names, known)
    taken = in_turns({name: works[name][0] for name in (FORWARD, *wanted)})
    found = [_row(name, works[name][1], taken) for name in wanted]
    gaps = [float(decompose(counts).gap.max()) for counts in _counted()]
    return [*found, Row("largest BROJA duality gap, 4 and 5 bins", max(gaps), 0.0, "nats")]


def _row(name: str, items: int, taken: dict[str, list[float]]) -> Row:
    ratios = sorted(one / other / items for one, other in zip(taken[name], taken[FORWARD], strict=True))
    middle = sorted(taken[name])[len(ratios) // 2]
    detail = f"{1000 * middle:.1f} ms" if items == 1 else f"{items / middle:,.0f} /s"
    title = name if items == 1 else f"{name}, one of {items}"
    return Row(f"{title} / forward", ratios[len(ratios) // 2], half_range(ratios), detail=detail)


def _counted() -> list[Tensor]:
    """Joint counts of 64 pairs in 4 and in 5 bins."""
    target, values = factor_model()
    return [joint_counts(target, values, torch.arange(128).view(64, 2), bins) for bins in (4, 5)]


if __name__ == "__main__":
    main(rows, __doc__)
