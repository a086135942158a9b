import math
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_prune.errors import InputError
from lit_prune.measurement.channel_table import layer_table, measure
from lit_prune.measurement.protocol import Protocol

COLUMNS = [
    "layer",
    "depth",
    "channel",
    "weight_norm",
    "signal_power",
    "rayleigh_quotient",
    "input_capture",
    "peer_overlap",
    "task_information",
    "target_redundancy",
    "target_excess",
    "dead",
]


def batches(count=60, size=8, classes=4):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(count, 3, size, size, generator=generator)
    return [(images[k : k + 25], torch.arange(count)[k : k + 25] % classes) for k in range(0, count, 25)]


def layer(table, name):
    return table[table["layer"] == name].reset_index(drop=True)


def plain_columns(model, module, data):
    """The definitions written out in numpy float64, from stored activations."""
    kept, logits = [], []
    handle = module.register_forward_hook(lambda m, i, o: kept.append(o.detach().double().numpy()))
    with torch.no_grad():
        logits = torch.cat([model(images) for images, _ in data]).double().numpy()
    handle.remove()
    labels = torch.cat([labels for _, labels in data]).numpy()
    y = np.concatenate(kept)
    true = logits[np.arange(len(labels)), labels]
    logits[np.arange(len(labels)), labels] = -np.inf
    margin = true - logits.max(1)
    flat = y.transpose(0, 2, 3, 1).reshape(-1, y.shape[1])
    pooled = y.mean((2, 3))
    g = lambda r: -0.5 * np.log(1 - np.clip(r, -1 + 1e-6, 1 - 1e-6) ** 2)  # noqa: E731
    s = flat.var(0)
    overlap = g(np.corrcoef(flat.T) - np.eye(len(s))).sum(1) / (len(s) - 1)
    a = np.corrcoef(np.c_[margin, pooled].T)[0, 1:]
    r = np.corrcoef(pooled.T)
    redundancy, excess = [], []
    for i in range(len(s)):
        partners = [j for j in np.argsort(-g(a)) if j != i][:10]
        redundancy.append(np.mean([min(g(a[i]), g(a[j])) for j in partners]))
        squared = [(a[i] ** 2 + a[j] ** 2 - 2 * a[i] * a[j] * r[i, j]) / (1 - r[i, j] ** 2) for j in partners]
        joint = [-0.5 * np.log(1 - value) for value in squared]
        excess.append(np.mean([v - max(g(a[i]), g(a[j])) for v, j in zip(joint, partners, strict=True)]))
    return {
        "signal_power": s,
        "input_capture": 0.5 * np.log(1 + s / np.median(s)),
        "peer_overlap": overlap,
        "task_information": g(a),
        "target_redundancy": redundancy,
        "target_excess": excess,
    }


def test_table_equals_the_definitions_written_out(tiny_net):
    table = measure(tiny_net, batches())
    assert list(table.columns) == COLUMNS
    assert table["layer"].unique().tolist() == ["stem.0", "conv1", "conv2", "head"]
    assert table.groupby("layer", sort=False)["depth"].first().tolist() == [0, 1, 2, 3]
    assert (table.dtypes[COLUMNS[3:-1]] == "float64").all()
    for name in ("stem.0", "conv1", "conv2"):
        part = layer(table, name)
        module = tiny_net.get_submodule(name)
        for column, values in plain_columns(tiny_net, module, batches()).items():
            np.testing.assert_allclose(part[column], values, rtol=1e-4, atol=1e-8, err_msg=f"{name} {column}")
        norm = module.weight.detach().double().flatten(1).norm(dim=1).numpy()
        np.testing.assert_allclose(part["weight_norm"], norm)
        np.testing.assert_allclose(part["rayleigh_quotient"], part["signal_power"] / norm**2)


def test_real_images_give_the_same_table_whatever_the_batch_size(tiny_net, cifar10_test):
    images = torch.from_numpy(cifar10_test[0][:96]).permute(0, 3, 1, 2).float() / 255
    data = TensorDataset(images, torch.from_numpy(cifar10_test[1][:96]) % 4)
    one, other = (measure(tiny_net, DataLoader(data, batch_size=size)) for size in (96, 17))
    for column in COLUMNS[3:-1]:
        np.testing.assert_allclose(one[column], other[column], rtol=1e-4, atol=1e-7, err_msg=column)


def test_scaling_a_channel_moves_its_signal_alone(tiny_net):
    before = layer(measure(tiny_net, batches()), "conv1")
    with torch.no_grad():
        tiny_net.conv1.weight[2] *= 3.0
        tiny_net.bn1.running_mean[2] *= 3.0  # the norm undoes the scale, so that the rest of the network is as before
        tiny_net.bn1.running_var[2] = 9 * (tiny_net.bn1.running_var[2] + tiny_net.bn1.eps) - tiny_net.bn1.eps
    after = layer(measure(tiny_net, batches()), "conv1")
    others = before["channel"] != 2
    assert after["signal_power"][2] == pytest.approx(9 * before["signal_power"][2], rel=1e-5)
    assert after["rayleigh_quotient"][2] == pytest.approx(before["rayleigh_quotient"][2], rel=1e-5)
    np.testing.assert_allclose(after["signal_power"][others], before["signal_power"][others], rtol=1e-6)
    ranks = [frame["input_capture"][others].rank().tolist() for frame in (before, after)]
    assert ranks[0] == ranks[1]
    for column in ("peer_overlap", "task_information", "target_redundancy", "target_excess"):
        np.testing.assert_allclose(after[column], before[column], rtol=1e-3, atol=1e-7)


def test_an_affine_map_of_the_target_changes_nothing(tiny_net):
    before = measure(tiny_net, batches(), layers=["conv?"])
    with torch.no_grad():
        tiny_net.head.weight *= 4.0
        tiny_net.head.bias *= 4.0
    after = measure(tiny_net, batches(), layers=["conv?"])
    pd.testing.assert_frame_equal(before, after, rtol=1e-5, atol=1e-9)


def test_permuting_channels_permutes_the_rows(tiny_net):
    before = layer(measure(tiny_net, batches()), "conv1")
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    with torch.no_grad():
        tiny_net.conv1.weight.copy_(tiny_net.conv1.weight[order].clone())
        tiny_net.conv2.weight.copy_(tiny_net.conv2.weight[:, order].clone())
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(tiny_net.bn1, name)
            tensor.copy_(tensor[order].clone())
    after = layer(measure(tiny_net, batches()), "conv1")
    for column in COLUMNS[3:-1]:
        np.testing.assert_allclose(after[column], before[column][order.numpy()], rtol=1e-3, atol=1e-7)


def test_a_target_that_is_a_channel_plus_noise_has_the_gaussian_information():
    class Readout(nn.Module):
        """Logits [Ȳ_0 + noise, 0]; the noise is an input channel that no measured layer sees."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 1, bias=False)
            nn.init.zeros_(self.conv.weight)
            self.conv.weight.data[0, 0] = 1.0
            self.conv.weight.data[1, 1] = 2.0
            self.conv.weight.data[2, 0] = -5.0  # the first one's twin

        def forward(self, x):
            value = self.conv(x[:, :2])[:, 0].mean((1, 2)) + x[:, 2].mean((1, 2))
            return torch.stack([value, torch.zeros_like(value)], 1)

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(20000, 3, 1, 1, generator=generator)
    images = images - images.mean(0)
    flat = images.flatten(1).double()
    images = (flat @ torch.linalg.inv(torch.linalg.cholesky(flat.T @ flat / len(flat))).T)[:, :, None, None].float()
    table = measure(Readout(), [(images, torch.zeros(20000).long())])
    expected = -0.5 * math.log(1 - 0.5)  # ρ² = var/(var + noise) = 1/2
    np.testing.assert_allclose(table["task_information"], [expected, 0.0, expected], atol=1e-5)
    twin = -0.5 * math.log(1 - (1 - 1e-6) ** 2)
    np.testing.assert_allclose(table["peer_overlap"], [twin / 2, 0.0, twin / 2], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(table["target_excess"], 0.0, atol=1e-5)
    np.testing.assert_allclose(table["target_redundancy"], [expected / 2, 0.0, expected / 2], atol=1e-5)


def test_dead_channels_are_marked_and_leave_the_others_as_they_were(tiny_net):
    with torch.no_grad():
        tiny_net.conv1.weight[1] = 0.0
    table = layer(measure(tiny_net, batches()), "conv1")
    assert table["dead"].tolist() == [False, True] + [False] * 6
    for column in ("peer_overlap", "task_information", "target_redundancy", "target_excess", "rayleigh_quotient"):
        assert table[column].isna().tolist() == table["dead"].tolist()
    assert table["input_capture"][1] == 0.0
    live = [0, *range(2, 8)]
    smaller = nn.Conv2d(6, 7, 3, padding=1, bias=False)
    smaller.weight.data = tiny_net.conv1.weight.data[live]

    class Without(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.conv = tiny_net, smaller

        def forward(self, x):
            self.conv(self.net.stem(x))
            return self.net(x)

    alone = layer(measure(Without(), batches(), layers="conv"), "conv")
    for column in COLUMNS[4:-1]:
        np.testing.assert_allclose(table[column][live], alone[column], rtol=1e-5, atol=1e-9, err_msg=column)


def test_a_layer_with_one_live_channel_has_information_and_no_peers(tiny_net):
    with torch.no_grad():
        tiny_net.conv1.weight[1:] = 0.0
    table = layer(measure(tiny_net, batches()), "conv1")
    assert table["task_information"].notna().tolist() == [True] + [False] * 7
    assert table["input_capture"][0] == pytest.approx(0.5 * math.log(2))
    assert table[["peer_overlap", "target_redundancy", "target_excess"]].isna().all(axis=None)


def test_a_layer_with_one_channel_has_a_row_without_peers():
    torch.manual_seed(0)
    narrow = nn.Sequential(nn.Conv2d(3, 1, 3), nn.ReLU(), nn.Conv2d(1, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    table = measure(nn.Sequential(narrow, nn.Linear(5, 4)), batches())
    assert table.groupby("layer", sort=False).size().tolist() == [1, 5, 4]
    row = table.iloc[0]
    assert row["input_capture"] == pytest.approx(0.5 * math.log(2)) and not row["dead"]
    assert row["task_information"] > 0
    assert row[["peer_overlap", "target_redundancy", "target_excess"]].isna().all()
    assert math.isnan(layer_table(table)["coupling"][0])


def test_a_constant_target_is_undefined_not_noise(tiny_net):
    with torch.no_grad():
        tiny_net.head.weight.zero_()
        tiny_net.head.bias.copy_(torch.tensor([3.1, 0.7, 0.1, 0.2]))
    data = [(images, torch.zeros_like(labels)) for images, labels in batches()]
    table = measure(tiny_net, data, layers=["conv1"])
    assert table[["task_information", "target_redundancy", "target_excess"]].isna().all(axis=None)


def test_one_vs_rest_is_the_mean_over_the_classes_present(tiny_net):
    data = [(images, labels % 3) for images, labels in batches()]  # class 3 is absent
    found = layer(measure(tiny_net, data, target="one_vs_rest"), "conv1")
    kept = []
    handle = tiny_net.conv1.register_forward_hook(lambda m, i, o: kept.append(o.detach().double().mean((2, 3))))
    with torch.no_grad():
        for images, _ in data:
            tiny_net(images)
    handle.remove()
    pooled, labels = torch.cat(kept).numpy(), torch.cat([labels for _, labels in data]).numpy()
    rho = np.array([[np.corrcoef(labels == k, pooled[:, c])[0, 1] for c in range(8)] for k in range(3)])
    np.testing.assert_allclose(found["task_information"], (-0.5 * np.log(1 - rho**2)).mean(0), rtol=1e-4)


def test_matched_pooling_repeats_the_target_over_positions(tiny_net):
    found = layer(measure(tiny_net, batches(), protocol=Protocol(target_pooling="match")), "conv1")
    kept, margins = [], []
    handle = tiny_net.conv1.register_forward_hook(lambda m, i, o: kept.append(o.detach().double().flatten(2)))
    with torch.no_grad():
        for images, labels in batches():
            logits = tiny_net(images).double()
            true = logits.gather(1, labels[:, None])
            margins.append(true - logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True))
    handle.remove()
    y, t = torch.cat(kept), torch.cat(margins)  # [B, N, P], [B, 1]
    repeated = t.expand(-1, y.shape[2]).flatten()
    rho = torch.corrcoef(torch.cat([repeated[None], y.transpose(0, 1).flatten(1)]))[0, 1:].numpy()
    np.testing.assert_allclose(found["task_information"], -0.5 * np.log(1 - rho**2), rtol=1e-4)
    pooled = layer(measure(tiny_net, batches()), "conv1")
    assert (found["task_information"] < pooled["task_information"]).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hook_point", "after"),
        ("positions", 0),
        ("target_pooling", "max"),
        ("overlap_mean", "n"),
        ("partner_rule", "best"),
        ("partners", 0),
    ],
)
def test_an_unknown_protocol_value_is_an_error_not_ignored(field, value):
    with pytest.raises(InputError, match=field):
        Protocol(**{field: value})


def test_protocol_fields_are_plain_values():
    fields = asdict(Protocol(positions=16))
    assert fields["positions"] == 16
    assert all(isinstance(value, str | int) for value in fields.values())
    assert Protocol(**fields) == Protocol(positions=16)


def test_bad_data_is_named(tiny_net):
    data = torch.randn(3, 3, 8, 8)
    with pytest.raises(InputError, match="3 images are too few; give at least 4"):
        measure(tiny_net, [(data, torch.zeros(3).long())])
    with pytest.raises(InputError, match="labels from 0 to 4, but 0 to 3"):
        measure(tiny_net, [(data, torch.tensor([0, 4, 1]))])
    with pytest.raises(InputError, match="there is no batch"):
        measure(tiny_net, [])
    with pytest.raises(InputError, match="which is none of"):
        measure(tiny_net.stem, [(data, torch.zeros(3).long())])
    tiny_net.spare = torch.nn.Linear(3, 5)
    with pytest.raises(InputError, match="none of the chosen ones runs"):
        measure(tiny_net, [(data.repeat(2, 1, 1, 1), torch.zeros(6).long())], layers="spare")
    with pytest.raises(InputError, match="first batch holds no images"):
        measure(tiny_net, [(data[:0], torch.zeros(0).long())])


def test_layer_table_has_the_rank_correlation_over_live_channels():
    table = pd.DataFrame({column: np.arange(5.0) for column in COLUMNS[3:-1]})
    table["task_information"] = [0.0, 1.0, 10.0, 100.0, -5.0]
    table["dead"] = [False] * 4 + [True]
    table.insert(0, "layer", "conv")
    table.insert(1, "depth", 0)
    row = layer_table(table).iloc[0]
    assert row["coupling"] == pytest.approx(1.0)
    assert (row["channels"], row["dead"]) == (5, 1)
    assert row["mean_input_capture"] == pytest.approx(1.5)
    assert math.isnan(layer_table(table.assign(input_capture=1.0))["coupling"][0])
