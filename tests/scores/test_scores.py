import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lit_prune.errors import InputError
from lit_prune.measurement.channel_table import measure
from lit_prune.measurement.inputs import input_weight_power
from lit_prune.measurement.labels import ClassSums, binned_information, conditional_order
from lit_prune.scores import SCORES, score
from lit_prune.scores.method import find_score

NAMES = [*SCORES, "ix_minus_redundancy(0.25)", "magnitude_plus_ix(2)", "conditional_information(reader)"]
WITHOUT_DATA = ("magnitude", "random", "fpgm")


def batches(count=50, classes=4):
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(count) % classes
    return [(images[:30], labels[:30]), (images[30:], labels[30:])]


def tensors():
    return tuple(torch.cat(parts) for parts in zip(*batches(), strict=True))


def outputs(model, name):
    """Raw output of a layer for all images, and the logits."""
    kept = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, i, o: kept.append(o))
    with torch.no_grad():
        logits = model(tensors()[0])
    handle.remove()
    return kept[0].double(), logits


def n(values):
    return (values - values.min()) / (values.max() - values.min())


@pytest.mark.parametrize("name", NAMES)
def test_every_score_is_finite_float64_and_leaves_the_model_alone(tiny_net, name):
    state = {key: value.clone() for key, value in tiny_net.state_dict().items()}
    tiny_net.train()
    found = score(tiny_net, name, batches())
    assert {"stem.0", "conv1", "conv2"} <= set(found)
    for layer, values in found.items():
        assert values.dtype == torch.float64
        assert values.shape == (len(tiny_net.get_submodule(layer).weight),)
        assert not values.requires_grad
        json.dumps(values.tolist(), allow_nan=False)
    assert tiny_net.training
    assert all(torch.equal(value, state[key]) for key, value in tiny_net.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_net.modules())


@pytest.mark.parametrize("name", NAMES)
def test_dead_channels_are_the_first_to_remove(tiny_net, name):
    with torch.no_grad():
        tiny_net.conv1.weight[5] = 0.0
        tiny_net.bn1.weight[5] = 50.0  # whatever else speaks for the channel
    table = measure(tiny_net, batches())
    for given in (None, table):
        values = score(tiny_net, name, batches(), table=given)["conv1"]
        assert int(values.argmin()) == 5
        assert float(values[5]) < float(values[torch.arange(8) != 5].min())


@pytest.mark.parametrize("name", NAMES)
def test_a_given_table_changes_no_score_and_iterators_are_not_lost(tiny_net, name):
    table = measure(tiny_net, batches())
    expected = score(tiny_net, name, batches())
    for found in (score(tiny_net, name, batches(), table=table), score(tiny_net, name, iter(batches()))):
        assert list(found) == list(expected)
        for layer, values in expected.items():
            torch.testing.assert_close(found[layer], values)


def test_weight_scores_are_the_norms_and_distances(tiny_net):
    weight = tiny_net.conv1.weight.detach().double().flatten(1)
    torch.testing.assert_close(score(tiny_net, "magnitude")["conv1"], weight.norm(dim=1))
    distances = torch.stack([(row - weight).norm(dim=1).sum() for row in weight])
    torch.testing.assert_close(score(tiny_net, "fpgm")["conv1"], distances)
    gamma = tiny_net.bn1.weight.detach().double().abs()
    torch.testing.assert_close(score(tiny_net, "network_slimming", batches())["conv1"], gamma)
    one = weight.abs().sum(1)
    expected = gamma / gamma.mean() + one / one.mean()
    torch.testing.assert_close(score(tiny_net, "proxy", batches())["conv1"], expected)
    assert "head" not in score(tiny_net, "network_slimming", batches())


def test_random_is_seeded(tiny_net):
    one, same, other = (score(tiny_net, "random", seed=seed)["conv1"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("frozen", [False, True])
def test_taylor_is_the_first_order_loss_change_of_each_image(tiny_net, frozen):
    tiny_net.requires_grad_(not frozen)
    images, labels = tensors()
    found = score(tiny_net, "taylor", batches())["conv1"]
    gates = torch.ones(len(images), 8, requires_grad=True)  # d loss / d gate at 1 is Σ_p a·∂L/∂a
    handle = tiny_net.conv1.register_forward_hook(lambda m, i, o: o * gates[:, :, None, None])
    loss = functional.cross_entropy(tiny_net(images), labels, reduction="sum")
    handle.remove()
    (gradient,) = torch.autograd.grad(loss, gates)
    torch.testing.assert_close(found, gradient.abs().mean(0).double(), rtol=1e-4, atol=1e-8)


def test_taylor_reads_the_raw_output_although_it_is_overwritten_in_place():
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(180, 4)]
    models = [nn.Sequential(convs[0], nn.ReLU(inplace=inplace), *convs[1:]) for inplace in (False, True)]
    one, other = (score(model, "taylor", batches())["0"] for model in models)
    torch.testing.assert_close(one, other)


def test_activation_rms_and_variance_are_those_of_the_stored_activations(tiny_net):
    raw, _ = outputs(tiny_net, "conv1")
    found = score(tiny_net, "activation_rms", batches())["conv1"]
    torch.testing.assert_close(found, raw.square().mean((0, 2, 3)).sqrt(), rtol=1e-5, atol=0)
    with torch.no_grad():
        after = torch.relu(tiny_net.bn1(raw.float())).double()
    expected = after.var((0, 2, 3), correction=0)
    torch.testing.assert_close(score(tiny_net, "variance", batches())["conv1"], expected, rtol=1e-4, atol=0)
    power = tiny_net.conv2.weight.detach().double().square().sum((0, 2, 3))
    torch.testing.assert_close(score(tiny_net, "cmr_logit", batches())["conv1"], expected * power, rtol=1e-4, atol=0)


def test_cmr_of_a_coupled_group_adds_its_consumers_and_is_given_under_each_producer(tiny_net):
    found = score(tiny_net, "cmr_logit", batches())
    assert torch.equal(found["stem.0"], found["conv2"])
    with torch.no_grad():
        trunk = tiny_net.stem(tensors()[0]).double()
    read = []
    handle = tiny_net.head.register_forward_pre_hook(lambda m, i: read.append(i[0].double()))
    outputs(tiny_net, "head")
    handle.remove()
    expected = trunk.var((0, 2, 3), correction=0) * input_weight_power(tiny_net.conv1)
    expected = expected + read[0].var(0, correction=0) * input_weight_power(tiny_net.head)
    torch.testing.assert_close(found["stem.0"], expected.detach(), rtol=1e-4, atol=0)


def test_cmr_is_unchanged_by_unit_scalings_and_variance_is_not(tiny_net):
    before = {name: score(tiny_net, name, batches())["conv1"] for name in ("cmr_logit", "variance")}
    scale = torch.tensor([0.01, 0.1, 1.0, 3.0, 10.0, 100.0, 0.5, 2.0])
    with torch.no_grad():
        tiny_net.bn1.weight *= scale
        tiny_net.bn1.bias *= scale
        tiny_net.conv2.weight /= scale[:, None, None]
    after = {name: score(tiny_net, name, batches())["conv1"] for name in before}
    torch.testing.assert_close(after["cmr_logit"], before["cmr_logit"], rtol=1e-4, atol=0)
    torch.testing.assert_close(after["variance"], before["variance"] * scale.double().square(), rtol=1e-4, atol=0)


def test_cmr_sums_the_columns_that_a_flattened_channel_becomes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4))  # 8x8 → 2x2
    found = score(model, "cmr_logit", batches())["0"]
    with torch.no_grad():
        flat = model[:3](tensors()[0]).double()
    terms = flat.var(0, correction=0) * model[3].weight.detach().double().square().sum(0)
    torch.testing.assert_close(found, terms.view(5, 4).sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_input_weight_power_of_grouped_convolutions(groups):
    conv = nn.Conv2d(4, 8, 3, groups=groups, bias=False)
    image = torch.zeros(4, 4, 3, 3)
    expected = []
    for channel in range(4):
        image.zero_()
        total = 0.0
        for position in range(9):
            image.zero_()
            image[0, channel].view(-1)[position] = 1.0
            total += float(conv(image[:1]).square().sum())
        expected.append(total)
    torch.testing.assert_close(input_weight_power(conv), torch.tensor(expected).double(), rtol=1e-4, atol=1e-6)


def test_composites_are_the_stated_sums_of_scaled_columns(tiny_net):
    table = measure(tiny_net, batches())
    part = table[table["layer"] == "conv1"]
    c = {column: n(torch.tensor(part[column].to_numpy())) for column in table.columns[3:-1]}
    expected = {
        "composite_ix": 2.0 * c["input_capture"] - 0.25 * c["peer_overlap"],
        "ix_minus_redundancy(0.7)": c["input_capture"] - 0.7 * c["peer_overlap"],
        "magnitude_plus_ix(3)": c["weight_norm"] + 3 * c["input_capture"],
        "composite_pid": c["task_information"] + 0.5 * c["target_excess"] - 0.3 * c["target_redundancy"],
        "pid_no_red": c["task_information"] + 0.5 * c["target_excess"],
    }
    shuffled = table.sample(frac=1.0, random_state=0)  # rows may come in any order
    for name, values in expected.items():
        torch.testing.assert_close(score(tiny_net, name, table=shuffled)["conv1"], values)


def test_label_scores_are_those_of_the_pooled_raw_outputs(tiny_net):
    raw, _ = outputs(tiny_net, "conv1")
    pooled, labels = raw.mean((2, 3)), tensors()[1]
    found = score(tiny_net, "label_information", batches())["conv1"]
    torch.testing.assert_close(found, binned_information(pooled, labels))
    order, _ = conditional_order(ClassSums.of(pooled, labels, 4))
    ranks = score(tiny_net, "conditional_information", batches())["conv1"]
    assert ranks.argsort(descending=True).tolist() == order.tolist()
    np.testing.assert_allclose(sorted(ranks.tolist()), np.arange(1, 9) / 8)


class Trunk(nn.Module):
    """Two residual layers, the map as four columns a channel to the head, which comes first in module order."""

    def __init__(self):
        super().__init__()
        self.head, self.stem = nn.Linear(4 * 6, 4), nn.Conv2d(3, 6, 3, padding=1)
        self.first, self.second = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))

    def trunk(self, images):
        values = torch.relu(self.stem(images))
        values = torch.relu(values + self.first(values))
        return functional.adaptive_avg_pool2d(torch.relu(values + self.second(values)), 2)

    def forward(self, images):
        return self.head(self.trunk(images).flatten(1))


def test_label_scores_of_a_trunk_are_those_of_what_its_last_reader_is_given():
    torch.manual_seed(0)
    net, labels = Trunk().eval(), tensors()[1]
    with torch.no_grad():
        read = net.trunk(tensors()[0]).mean((2, 3))
    order, _ = conditional_order(ClassSums.of(read, labels, 4))
    information = score(net, "label_information(reader)", batches())
    places = score(net, "conditional_information(reader)", batches())
    assert set(information) == set(places) == {"stem", "first", "second"}  # nothing reads the head
    for layer in places:
        torch.testing.assert_close(information[layer], binned_information(read, labels))
        assert places[layer].argsort(descending=True).tolist() == order.tolist()


def test_bad_names_and_missing_data_are_explained(tiny_net):
    with pytest.raises(InputError, match="read='readers' is none of output, reader"):
        score(tiny_net, "label_information(readers)", batches())
    with pytest.raises(InputError, match="'magnitud' is unknown; did you mean magnitude"):
        score(tiny_net, "magnitud")
    with pytest.raises(InputError, match="too many parameters; fpgm takes"):
        score(tiny_net, "fpgm(1)")
    with pytest.raises(InputError, match="not a number"):
        score(tiny_net, "magnitude_plus_ix(a)")
    for name in set(SCORES) - set(WITHOUT_DATA):
        with pytest.raises(InputError, match="batches: None"):
            score(tiny_net, name)
    for name in WITHOUT_DATA:
        assert score(tiny_net, name)
    with pytest.raises(InputError, match="take 'magnitude'"):
        score(nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()), "network_slimming", batches())


def test_parameters_are_read_from_the_name():
    assert find_score("ix_minus_redundancy")[1] == (0.5,)
    assert find_score(" ix_minus_redundancy ( 0.25 ) ")[1] == (0.25,)
    assert find_score("taylor") == (SCORES["taylor"], ())
    assert {entry.axis for entry in SCORES.values()} <= {"local", "target", "baseline", "mixed"}
