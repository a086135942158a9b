import copy

import pytest
import torch
from torch import nn

from lit_prune.errors import InputError
from lit_prune.replace import Reduced, Swaps, certify, interchange, paired_bootstrap, replace_mechanisms
from lit_prune.structure import Plan


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, images):
        return self.head(torch.relu(self.body(images)))


EXAMPLE = torch.zeros(1, 5)
PLAN = Plan(keep_channels={"body": (0, 2, 3, 5, 7, 8, 11)}, sizes={"body": 12})


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Classifier().eval()
    nn.init.normal_(net.head.weight)
    return net


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(40, 5, generator=generator), torch.zeros(40).long()) for _ in range(3)]


def test_a_reduction_that_loses_nothing_agrees_on_every_swap(net, batches):
    with torch.no_grad():
        net.head.weight[:, PLAN.removed("body")] = 0
    reduced = replace_mechanisms(net, PLAN, batches, "constant", EXAMPLE)
    found = interchange(net, reduced, batches, EXAMPLE, swaps=Swaps(pairs=300))
    assert found.layer == "head" and found.iia == 1 and found.kl < 1e-10
    assert found.certificate.bound > 0.99 and found.low.shape == (300, 4)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_swapped_logits_are_those_of_the_mixed_activations(net, batches, probability):
    reduced = replace_mechanisms(net, PLAN, batches, "constant", EXAMPLE)
    swaps = Swaps(pairs=50, probability=probability, batch_size=50, seed=3)
    found = interchange(net, reduced, batches, EXAMPLE, swaps=swaps)
    images = torch.cat([batch for batch, _ in batches])
    generator = torch.Generator().manual_seed(3)
    base = torch.randint(120, (50,), generator=generator)
    source = (base + torch.randint(1, 120, (50,), generator=generator)) % 120
    mask = torch.rand(50, 7, generator=generator) < probability
    values = torch.relu(net.body(images))
    kept = list(PLAN.keep_channels["body"])
    mixed = values[base].clone()
    mixed[:, kept] = torch.where(mask, values[source][:, kept], values[base][:, kept])
    torch.testing.assert_close(found.low, net.head(mixed), rtol=0, atol=1e-5)
    replaced = mixed.clone()
    removed = PLAN.removed("body")
    replaced[:, removed] = values[:, removed].mean(0)
    torch.testing.assert_close(found.high, net.head(replaced), rtol=0, atol=1e-5)
    assert (base != source).all()


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_certificates_never_exceed_the_measured_agreement(noise, seed):
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(400, 6, generator=generator) * 2
    high = low + noise * torch.randn(400, 6, generator=generator)
    high[::50] = low[::50]
    found = certify(low, high)
    iia = float((low.argmax(1) == high.argmax(1)).double().mean())
    assert 0 <= found.bound <= found.empirical <= iia
    margins = low.topk(2, 1).values.double().diff(dim=1).neg().flatten()
    for epsilon in torch.linspace(0.01, 5, 400).double():  # no ε of a grid does better
        below = float((margins <= 2 * epsilon).double().mean())
        assert 1 - below - found.distortion / float(epsilon) ** 2 <= found.bound + 1e-12
        far = float(((high - low).abs().amax(1).double() > epsilon).double().mean())
        assert 1 - below - far <= found.empirical + 1e-12
    if noise == 0.01:
        assert found.bound > 0.8


def test_certificate_of_constant_margins_is_the_closed_form():
    low = torch.tensor([[3.0, 0.0, 0.0]]).repeat(10, 1)
    high = low.clone()
    high[0, 0] -= 1.0
    found = certify(low, high)
    assert found.distortion == pytest.approx(0.1)
    assert found.bound == pytest.approx(1 - 4 * 0.1 / 9)  # 1 - 4·D₂/γ²
    assert found.epsilon == pytest.approx(1.5)


def test_random_reduction_disagrees_and_says_nothing_certain(net, batches):
    other = copy.deepcopy(net)
    nn.init.normal_(other.head.weight, std=3.0)
    whole = Plan(keep_channels={"body": tuple(range(12))}, sizes={"body": 12})
    found = interchange(net, Reduced(other, {}, whole), batches, EXAMPLE, "head", swaps=Swaps(pairs=200))
    assert found.iia < 0.7 and found.certificate.bound == 0
    report = found.report()
    assert report["pairs"] == 200 and report["certificate"]["empirical"] <= report["iia"]


def test_a_layer_that_cannot_be_swapped_is_named(net, batches):
    reduced = replace_mechanisms(net, PLAN, batches, "delete", EXAMPLE)
    with pytest.raises(InputError, match="layer='tail'"):
        interchange(net, reduced, batches, EXAMPLE, "tail")
    with pytest.raises(InputError, match="at least two"):
        interchange(net, reduced, [(torch.randn(1, 5), None)], EXAMPLE)


def test_paired_bootstrap_covers_a_shift_and_contains_zero_for_none():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(200, generator=generator) * 10
    noise = torch.randn(200, generator=generator) * 0.1
    mean, lower, upper = paired_bootstrap(shared + 0.5 + noise, shared)
    assert lower < mean < upper and lower > 0.45 and upper < 0.55
    _, lower, upper = paired_bootstrap(shared + noise, shared)
    assert lower < 0.02 and upper > -0.02
    with pytest.raises(InputError, match="equally many"):
        paired_bootstrap([1.0], [1.0, 2.0])
