"""Cluster-aware orders keep their promises for every prefix, and the scores follow them in whole coupled groups."""

import numpy as np
import pytest
import torch
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

from lit_prune.measurement.channel_table import measure
from lit_prune.scores import Evidence, find_score, score
from lit_prune.scores.clusters import kmeans_clusters, spectral_clusters
from lit_prune.scores.groupings import group_channels
from lit_prune.scores.units import even_order, follow, guarded_order


def drawn(channels=37, clusters=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(channels, generator=generator, dtype=torch.float64)
    return values, torch.randint(clusters, (channels,), generator=generator)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(40, 3, 8, 8, generator=generator), torch.arange(40) % 4)]


def order_of(scores):
    """Channels, first removed first."""
    return scores.argsort(stable=True)


@pytest.mark.cpu
@pytest.mark.parametrize("seed", range(3))
def test_even_order_takes_the_same_fraction_from_every_cluster_at_every_prefix(seed):
    values, clusters = drawn(seed=seed)
    order = even_order(values, clusters)
    assert sorted(order.tolist()) == list(range(37))
    sizes = torch.bincount(clusters)
    taken = torch.nn.functional.one_hot(clusters[order]).cumsum(0)  # after each removal
    exact = torch.arange(1, 38)[:, None] / 37 * sizes
    assert float((taken - exact).abs().max()) <= 0.5 + len(sizes) / 2 * float(sizes.max()) / 37
    half = taken[17]
    assert ((half / sizes) - 0.5).abs().max() < 1 / sizes.min()
    for cluster in range(4):
        inside = values[order[clusters[order] == cluster]]
        assert bool((inside.diff() >= 0).all())


@pytest.mark.cpu
@pytest.mark.parametrize("seed", range(3))
def test_guarded_order_protects_the_best_cluster_and_empties_none_early(seed):
    values, clusters = drawn(seed=seed)
    order = guarded_order(values, clusters, 0.3)
    left = torch.bincount(clusters)
    highest = max(range(4), key=lambda c: float(values[clusters == c].mean()))
    best = values[clusters == highest].sort(descending=True).values[: int(0.3 * int(left[highest]) + 0.5)]
    for position, channel in enumerate(order.tolist()):
        cluster = int(clusters[channel])
        if left[cluster] == 1:
            assert bool((left <= 1).all())  # only when the others are down to one
        if float(values[channel]) in best.tolist() and left[cluster] > 1:
            others = [c for c in range(4) if c != highest]
            assert all(left[c] == 1 for c in others), position  # the protected ones outlast the ordinary ones
        left[cluster] -= 1


@pytest.mark.cpu
def test_without_protection_or_clusters_both_orders_are_the_values():
    values, _ = drawn(seed=0)
    one = torch.zeros(37, dtype=torch.int64)
    for order in (even_order(values, one), guarded_order(values, one, 0.0), guarded_order(values, one, 0.3)):
        assert torch.equal(order, values.argsort())


def test_follow_keeps_the_values_and_takes_the_order():
    values, _ = drawn()
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    dealt = follow(values, order)
    assert torch.equal(dealt.sort().values, values.sort().values)
    assert torch.equal(order_of(dealt), order)


@pytest.mark.cpu
def test_spectral_clusters_find_blocks_and_agree_with_scikit_learn():
    generator = np.random.default_rng(0)
    truth = np.repeat(np.arange(4), 8)
    affinity = np.where(truth[:, None] == truth, 1.0, 0.05) * generator.uniform(0.5, 1, (32, 32))
    affinity = torch.from_numpy(affinity + affinity.T)
    found = spectral_clusters(affinity, seed=0)
    assert adjusted_rand_score(truth, found) == 1.0
    peer = SpectralClustering(4, affinity="precomputed", random_state=0).fit_predict(affinity.numpy())
    assert adjusted_rand_score(peer, found) == 1.0
    assert torch.equal(found, spectral_clusters(affinity, seed=0))
    assert len(spectral_clusters(torch.zeros(3, 3), seed=0)) == 3
    assert spectral_clusters(torch.ones(1, 1), seed=0).tolist() == [0]


def n(values):
    return (values - values.min()) / (values.max() - values.min())


def columns(model, data, layer):
    table = measure(model, data)
    part = table[table["layer"] == layer]
    return {name: torch.tensor(part[name].to_numpy()) for name in part.columns[3:-1]}


def cap_parts(model, data):
    """n(I_X) + 0.5·n(Syn) - 0.3·n(R̄_X), k-means labels and n(taylor) of `conv1`, which couples with nothing."""
    c = columns(model, data, "conv1")
    values = n(c["input_capture"]) + 0.5 * n(c["target_excess"]) - 0.3 * n(c["peer_overlap"])
    features = torch.stack([c["input_capture"], c["peer_overlap"]], 1).numpy()
    clusters = torch.from_numpy(group_channels(features, 0, 4)).long()
    return values, clusters, n(score(model, "taylor", data)["conv1"])


@pytest.mark.cpu
def test_cap_deals_its_weighted_sum_in_guarded_order(tiny_net, data):
    values, clusters, _ = cap_parts(tiny_net, data)
    expected = follow(values, guarded_order(values, clusters, 0.3))
    torch.testing.assert_close(score(tiny_net, "cap", data)["conv1"], expected)


def test_cap_qgw_is_the_quantile_in_the_guarded_order_of_the_geometric_mean(tiny_net, data):
    values, clusters, gradient = cap_parts(tiny_net, data)
    order = guarded_order((gradient * n(values)).sqrt(), clusters, 0.3)
    found = score(tiny_net, "cap_qgw", data)["conv1"]
    torch.testing.assert_close(found[order], (torch.arange(8) + 0.5).double() / 8)


@pytest.mark.cpu
def test_cap_a_is_taylor_at_low_sparsity_and_cap_at_high(tiny_net, data):
    values, clusters, gradient = cap_parts(tiny_net, data)
    for sparsity in (0.3, 0.7):
        torch.testing.assert_close(score(tiny_net, f"cap_a({sparsity})", data)["conv1"], gradient)
    middle = 0.5 * gradient + 0.5 * n(values)
    expected = follow(middle, guarded_order(middle, clusters, 0.15))
    torch.testing.assert_close(score(tiny_net, "cap_a(0.8)", data)["conv1"], expected)
    expected = follow(n(values), guarded_order(n(values), clusters, 0.3))
    torch.testing.assert_close(score(tiny_net, "cap_a(0.95)", data)["conv1"], expected)


@pytest.mark.parametrize("name", ["spectral_rs", "spectral_pid_rs"])
def test_spectral_scores_keep_their_values_and_take_from_every_cluster(tiny_net, data, name):
    c = columns(tiny_net, data, "conv1")
    base = {"spectral_rs": c["input_capture"], "spectral_pid_rs": score(tiny_net, "composite_pid", data)["conv1"]}[name]
    found = score(tiny_net, name, data)["conv1"]
    torch.testing.assert_close(found.sort().values, base.sort().values)
    assert torch.equal(found, score(tiny_net, name, data)["conv1"])


def test_spectral_rs_takes_one_of_each_pair_of_duplicates_first(tiny_net, data):
    """Four pairs of equal channels are four clusters: the first half to go is one of each pair."""
    with torch.no_grad():
        tiny_net.conv1.weight[4:] = tiny_net.conv1.weight[:4] * torch.tensor([2.0, 3.0, 0.5, 1.5])[:, None, None, None]
    order = order_of(score(tiny_net, "spectral_rs", data)["conv1"])
    assert sorted((order[:4] % 4).tolist()) == [0, 1, 2, 3]
    captures = columns(tiny_net, data, "conv1")["input_capture"]
    pairs = captures.view(2, 4)
    assert {int(channel) for channel in order[:4]} == {int(pairs[:, i].argmin()) * 4 + i for i in range(4)}


@pytest.mark.parametrize("name", ["cap", "cap_qgw", "cap_a", "spectral_rs", "spectral_pid_rs", "hybrid"])
def test_coupled_layers_share_one_order(tiny_net, data, name):
    found = score(tiny_net, name, data)  # the residual add couples stem.0 and conv2
    torch.testing.assert_close(found["stem.0"], found["conv2"])


@pytest.mark.cpu
def test_clusters_shrink_with_the_distinct_channels():
    features = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert len(kmeans_clusters(features, 0).unique()) == 2


def test_clusterings_are_seeded(tiny_net, data):
    one, same = (find_score("cap").ranks(Evidence(tiny_net, data, seed=3)) for _ in range(2))
    assert all(torch.equal(one[layer], same[layer]) for layer in one)
