import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from lit_prune.errors import InputError
from lit_prune.lab.analyze.propagation import METRICS, propagation_matrix, route, routing_norms


def metric_table(channels: int, seed: int) -> pd.DataFrame:
    return pd.DataFrame(np.random.default_rng(seed).normal(size=(channels, 4)), columns=METRICS)


def test_convolution_norms_are_frobenius_norms_of_its_kernels():
    weight = nn.Conv2d(5, 3, 3).weight.detach()
    norms = routing_norms(weight, 5)
    for j in range(3):
        for i in range(5):
            assert float(norms[j, i]) == pytest.approx(float(weight[j, i].norm()), rel=1e-6)


def test_grouped_norms_are_those_of_the_same_dense_convolution():
    grouped, dense = nn.Conv2d(6, 4, 3, groups=2), torch.zeros(4, 6, 3, 3)
    dense[:2, :3], dense[2:, 3:] = grouped.weight[:2].detach(), grouped.weight[2:].detach()
    torch.testing.assert_close(routing_norms(grouped.weight, 6, groups=2), routing_norms(dense, 6))


def test_depthwise_convolution_routes_each_channel_to_itself():
    metrics = torch.randn(4, 2, dtype=torch.float64)
    norms = routing_norms(nn.Conv2d(4, 4, 3, groups=4).weight, 4, groups=4)
    torch.testing.assert_close(route(norms, metrics), metrics)


def test_linear_after_flatten_owns_a_block_of_columns_a_channel():
    convolution = nn.Conv2d(3, 7, (2, 4))
    linear = convolution.weight.flatten(1)  # the same map on a flattened 2×4 input
    torch.testing.assert_close(routing_norms(linear, 3), routing_norms(convolution.weight, 3))
    torch.testing.assert_close(routing_norms(linear, 24), linear.detach().abs().double())


def test_routed_metric_is_the_weighted_mean_and_leaves_nan_sources_out():
    norms = torch.tensor([[1.0, 3.0, 5.0], [0.0, 0.0, 2.0]], dtype=torch.float64)
    metrics = torch.tensor([[2.0], [4.0], [torch.nan]], dtype=torch.float64)
    routed = route(norms, metrics)
    assert float(routed[0]) == pytest.approx((2 + 12) / 4)
    assert routed[1].isnan()


def test_propagation_matrix_is_spearman_of_routed_against_destination():
    torch.manual_seed(0)
    norms = routing_norms(nn.Conv2d(6, 9, 3).weight, 6)
    source, destination = metric_table(6, 0), metric_table(9, 1)
    found = propagation_matrix(norms, source, destination)
    routed = norms.numpy() @ source.to_numpy() / norms.sum(1, keepdim=True).numpy()
    for i, name in enumerate(METRICS):
        for other in METRICS:
            assert found.loc[name, other] == pytest.approx(spearmanr(routed[:, i], destination[other]).statistic)


def test_identity_weights_propagate_perfectly_on_the_diagonal():
    table = metric_table(8, 0)
    found = propagation_matrix(torch.eye(8, dtype=torch.float64), table, table)
    np.testing.assert_allclose(np.diag(found), 1)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="sources"):
        routing_norms(torch.ones(2, 7), 3)
    with pytest.raises(InputError, match="groups"):
        routing_norms(torch.ones(4, 3, 1, 1), 5)
    with pytest.raises(InputError, match="norms"):
        propagation_matrix(torch.ones(2, 3), metric_table(2, 0), metric_table(3, 0))
