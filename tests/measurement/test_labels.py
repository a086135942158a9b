from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics import mutual_info_score

from lit_prune.errors import InputError
from lit_prune.measurement.labels import (
    ClassSums,
    binned_information,
    block_information,
    conditional_order,
    quantile_bins,
)


def sample(count=300, channels=6, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    signal = torch.randn(classes, channels, generator=generator)
    return signal[labels] + torch.randn(count, channels, generator=generator), labels


def test_information_equals_scikit_learn_channel_by_channel_with_ties_too():
    values, labels = sample()
    values[:, 2] = values[:, 2].round()
    values[:, 3] = values[:, 3].clamp_min(0)  # half the values tie at zero, as after a ReLU
    bins = quantile_bins(values, 10)
    found = binned_information(values, labels, 10)
    expected = [mutual_info_score(labels.numpy(), bins[:, c].numpy()) for c in range(6)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_bins_hold_equal_numbers_and_equal_values_share_one():
    values = torch.randperm(200).double()[:, None]
    assert torch.bincount(quantile_bins(values, 10).flatten()).tolist() == [20] * 10
    tied = torch.tensor([0.0] * 130 + list(range(1, 71)))[:, None]
    bins = quantile_bins(tied, 10).flatten()
    assert len(set(bins[:130].tolist())) == 1
    assert (bins[131:] >= bins[130:-1]).all()


def test_information_does_not_depend_on_label_names_or_monotone_maps_or_sample_order():
    values, labels = sample()
    found = binned_information(values, labels)
    torch.testing.assert_close(binned_information(values, 7 * (3 - labels) + 100), found)
    torch.testing.assert_close(binned_information(values.exp(), labels), found)
    order = torch.randperm(len(labels))
    torch.testing.assert_close(binned_information(values[order], labels[order]), found)


def test_constant_independent_and_deterministic_channels():
    labels = torch.arange(4000) % 4
    noise = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    values = torch.stack([torch.full((4000,), 3.3), noise, labels.float() + 0.1 * noise], dim=1)
    constant, independent, deterministic = binned_information(values, labels, bins=4).tolist()
    assert constant == 0.0
    assert independent < 3 * 3 * 3 / (2 * 4000)  # thrice the bias of the plug-in estimate
    assert deterministic == pytest.approx(torch.tensor(4.0).log().item(), abs=1e-6)


def test_label_noise_lowers_information_to_the_channel_capacity_formula():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20000) % 2
    flipped = torch.rand(20000, generator=generator) < 0.1
    values = (labels ^ flipped).float()[:, None] + 0.01 * torch.rand(20000, 1, generator=generator)
    expected = torch.log(torch.tensor(2.0)) + 0.1 * torch.log(torch.tensor(0.1)) + 0.9 * torch.log(torch.tensor(0.9))
    assert float(binned_information(values, labels, bins=2)) == pytest.approx(float(expected), abs=0.01)


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        (torch.zeros(5, 2), torch.zeros(5).long(), "5 samples for 10 bins"),
        (torch.zeros(20, 2), torch.zeros(19).long(), r"give \[n, C\]"),
        (torch.full((20, 2), torch.nan), torch.zeros(20).long(), "NaN"),
    ],
)
def test_bad_values_are_refused(values, labels, message):
    with pytest.raises(InputError, match=message):
        binned_information(values, labels)


def test_block_information_is_the_channel_mean_of_the_last_members_pooled_output(tiny_net):
    images = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 4
    blocks = [SimpleNamespace(name="b", members=("conv1", "bn1")), SimpleNamespace(name="a", members=("stem",))]
    batches = [(images[:35], labels[:35]), (images[35:], labels[35:])]
    found = block_information(tiny_net, blocks, batches, limit=50)
    with torch.no_grad():
        trunk = tiny_net.stem(images)
        inner = tiny_net.bn1(tiny_net.conv1(trunk)).mean((2, 3))
    assert list(found) == ["b", "a"]
    assert found["b"] == pytest.approx(float(binned_information(inner[:50], labels[:50]).mean()), abs=1e-9)
    assert found["a"] == pytest.approx(float(binned_information(trunk.mean((2, 3))[:50], labels[:50]).mean()), abs=1e-9)


def brute_gain(total, within, kept, channel):
    both = [*kept, channel]

    def logdet(matrix, index):
        return torch.logdet(matrix[index][:, index]) if index else torch.tensor(0.0).double()

    gains = [logdet(matrix, both) - logdet(matrix, kept) for matrix in (total, within)]
    return float(0.5 * (gains[0] - gains[1]))


def test_order_and_gains_equal_brute_force_determinants():
    values, labels = sample(400, 7)
    sums = ClassSums.of(values, labels, 4)
    order, gains = conditional_order(sums)
    total, within = sums.covariances()
    noise = torch.diag(1e-6 * total.diagonal())
    kept = []
    for channel, gain in zip(order.tolist(), gains.tolist(), strict=True):
        candidates = {c: brute_gain(total + noise, within + noise, kept, c) for c in range(7) if c not in kept}
        assert gain == pytest.approx(candidates[channel], abs=1e-9)
        assert candidates[channel] == pytest.approx(max(candidates.values()), abs=1e-12)
        kept.append(channel)


def test_covariances_are_those_of_numpy_within_and_in_total():
    values, labels = sample(200, 3)
    total, within = ClassSums.of(values, labels, 9).covariances()  # classes 4 to 8 are absent
    values = values.double()
    centred = values - torch.stack([values[labels == k].mean(0) for k in range(4)])[labels]
    torch.testing.assert_close(total, torch.cov(values.T, correction=0))
    torch.testing.assert_close(within, centred.T @ centred / 200)


def test_a_twin_gains_nothing_and_a_constant_comes_last():
    values, labels = sample(500, 3)
    values = torch.cat([values, -2 * values[:, :1], torch.full((500, 1), 4.0)], dim=1)
    order, gains = conditional_order(ClassSums.of(values, labels, 4))
    assert order[-1] == 4
    assert gains[-1] == 0
    later = max(order.tolist().index(0), order.tolist().index(3))
    assert later == 3
    assert 0 <= float(gains[later]) < 1e-4
    assert (gains[:3] > 1e-3).all()


def test_class_sums_add():
    values, labels = sample(300, 5)
    whole = ClassSums.of(values, labels, 4)
    parts = ClassSums.of(values[:120], labels[:120], 4) + ClassSums.of(values[120:], labels[120:], 4)
    for one, other in zip(conditional_order(whole), conditional_order(parts), strict=True):
        torch.testing.assert_close(one, other)
