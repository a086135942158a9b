"""Peer fits against least squares on the rows themselves."""

import numpy as np
import pytest
import torch
from torch import nn

from lit_prune.errors import InputError
from lit_prune.lab.lesion.lesions import fit_peers
from lit_prune.measurement.activations import record


def sums_of(values: torch.Tensor):
    """Moments of given channel values [n, N, P]."""
    layer = nn.Conv2d(values.shape[1], values.shape[1], 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(values.shape[1]).view_as(layer.weight))
    net = nn.Sequential(layer)
    with record(net) as recording:
        net(values[..., None])
    return recording.sums.layers["0"]


@pytest.fixture
def values():
    torch.manual_seed(0)
    mixed = torch.randn(60, 5, 4).double().transpose(1, 2) @ torch.randn(5, 12).double()
    return (mixed + 0.3 * torch.randn(60, 4, 12).double() + torch.arange(12)).transpose(1, 2)


def test_fit_is_ridge_regression_on_the_most_correlated_peers(values):
    ridge, rows = 1e-2, values.transpose(1, 2).reshape(-1, 12).numpy()
    fit = fit_peers(sums_of(values), peers=4, ridge=ridge)
    standard = (rows - rows.mean(0)) / rows.std(0)
    correlations = np.abs(np.corrcoef(rows.T))
    for channel in range(12):
        order = np.argsort(-correlations[channel])
        chosen = order[order != channel][:4]
        assert set(fit.weights[channel].nonzero().flatten().tolist()) == set(chosen.tolist())
        tall = np.vstack([standard[:, chosen], np.sqrt(ridge * len(rows)) * np.eye(4)])
        beta = np.linalg.lstsq(tall, np.append(standard[:, channel], np.zeros(4)), rcond=None)[0]
        found = fit.weights[channel, chosen].numpy() * rows.std(0)[chosen] / rows.std(0)[channel]
        np.testing.assert_allclose(found, beta, rtol=1e-8)
        residual = rows[:, channel] - rows @ fit.weights[channel].numpy() - float(fit.bias[channel])
        assert residual.mean() == pytest.approx(0, abs=1e-9)
        assert float(fit.r2[channel]) == pytest.approx(1 - residual.var() / rows[:, channel].var(), abs=1e-9)


def test_a_duplicate_up_to_scale_and_sign_is_explained_whole(values):
    values[:, 3] = 5 - 2 * values[:, 7]
    fit = fit_peers(sums_of(values), peers=8)
    assert float(fit.r2[3]) == pytest.approx(1, abs=1e-6) and float(fit.r2[7]) == pytest.approx(1, abs=1e-6)
    rebuilt = values[0].T @ fit.weights[3] + fit.bias[3]
    torch.testing.assert_close(rebuilt, values[0, 3], rtol=1e-4, atol=1e-4)


def test_dead_channels_are_nobodys_peer_and_have_their_mean(values):
    values[:, 2] = 4.0
    fit = fit_peers(sums_of(values), peers=11)
    assert torch.isnan(fit.r2[2]) and float(fit.bias[2]) == pytest.approx(4) and not fit.weights[2].any()
    assert not fit.weights[:, 2].any() and torch.isfinite(fit.r2).sum() == 11
    alone = values.clone()
    alone[:, 1:] = 1.0
    only = fit_peers(sums_of(alone))
    assert torch.isnan(only.r2).all() and float(only.bias[0]) == pytest.approx(float(alone[:, 0].mean()))


def test_fewer_images_than_coefficients_are_refused(values):
    with pytest.raises(InputError, match="limit: 9 calibration images are too few for 8 peers"):
        fit_peers(sums_of(values[:9]), peers=8)
