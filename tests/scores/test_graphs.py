import math

import networkx
import numpy as np
import pytest
import torch

from lit_prune.errors import InputError
from lit_prune.measurement.local_axis import gaussian_information
from lit_prune.scores.graphs import excess_graph, greedy_modularity, heaviest_edges, redundancy_graph

pytestmark = pytest.mark.cpu  # sums and labels have come from the device when this is asked


def random_graph(nodes: int, blocks: int, seed: int) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    member = generator.integers(blocks, size=nodes)
    weights = generator.random((nodes, nodes)) * (1 + 2 * np.equal.outer(member, member))
    return torch.from_numpy(np.triu(weights, 1) + np.triu(weights, 1).T)


@pytest.mark.parametrize(("nodes", "ratio"), [(12, 1.0), (30, 0.3), (60, 0.1), (80, 0.02)])
@pytest.mark.parametrize("seed", [0, 1])
def test_partition_and_modularity_are_those_of_networkx(nodes, ratio, seed):
    weights = random_graph(nodes, 3, seed)
    found = greedy_modularity(weights, ratio)
    graph = networkx.from_numpy_array(heaviest_edges(weights, ratio).numpy())
    expected = networkx.community.greedy_modularity_communities(graph, weight="weight")
    ours = [frozenset(np.flatnonzero(found.communities.numpy() == c)) for c in range(int(found.communities.max()) + 1)]
    assert set(ours) == set(expected)
    assert [len(c) for c in ours] == sorted((len(c) for c in ours), reverse=True)
    quality = networkx.community.modularity(graph, expected, weight="weight")
    assert found.modularity == pytest.approx(quality, abs=1e-12)


def test_planted_communities_are_found():
    member = torch.arange(512) % 4
    noise = random_graph(512, 1, 0)
    weights = noise * 0.01 + (member[:, None] == member).double()
    found = greedy_modularity(weights, ratio=0.24)
    assert [found.communities[member == c].unique().numel() for c in range(4)] == [1, 1, 1, 1]
    assert found.modularity == pytest.approx(0.75, abs=0.01)


def test_equal_cliques_have_modularity_one_minus_one_over_their_number():
    weights = torch.block_diag(*[torch.ones(5, 5)] * 4)
    found = greedy_modularity(weights, ratio=1.0)
    assert found.modularity == pytest.approx(1 - 1 / 4)
    assert len(set(found.communities[:5].tolist())) == 1


def test_a_graph_without_edges_has_no_modularity():
    assert math.isnan(greedy_modularity(torch.zeros(4, 4)).modularity)
    assert math.isnan(greedy_modularity(torch.full((4, 4), torch.nan)).modularity)


def test_a_tenth_of_the_positive_edges_is_kept_and_they_are_the_heaviest():
    weights = random_graph(20, 2, 0)
    weights[0] = weights[:, 0] = -1
    weights[1] = weights[:, 1] = torch.nan
    kept = heaviest_edges(weights, 0.1)
    positive = weights[2:, 2:].triu(1)[weights[2:, 2:].triu(1) > 0]
    chosen = kept.triu(1)[kept.triu(1) > 0]
    assert len(chosen) == math.ceil(0.1 * 18 * 17 / 2)
    torch.testing.assert_close(chosen.sort().values, positive.sort().values[-len(chosen) :])
    assert torch.equal(kept, kept.T)


def test_redundancy_edges_are_gaussian_information():
    weights = redundancy_graph(torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64))
    expected = -0.5 * math.log(1 - 0.36)
    assert weights.flatten().tolist() == pytest.approx([0, expected, expected, 0])


def test_excess_edges_are_the_regression_gain_over_the_better_channel():
    samples = np.random.default_rng(0).normal(size=(500, 4)) @ np.random.default_rng(1).normal(size=(4, 4))
    matrix = np.corrcoef(samples.T)
    weights = excess_graph(torch.from_numpy(matrix[0, 1:]), torch.from_numpy(matrix[1:, 1:]))
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        rho = matrix[0, [i + 1, j + 1]]
        squared = rho @ np.linalg.solve(matrix[np.ix_([i + 1, j + 1], [i + 1, j + 1])], rho)
        best = float(gaussian_information(torch.from_numpy(rho)).max())
        assert float(weights[i, j]) == pytest.approx(-0.5 * math.log(1 - squared) - best, abs=1e-9)


def test_bad_graphs_are_refused():
    with pytest.raises(InputError, match="square"):
        greedy_modularity(torch.ones(2, 3))
    with pytest.raises(InputError, match="ratio"):
        greedy_modularity(torch.ones(2, 2), ratio=0.0)
