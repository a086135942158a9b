import pytest
import torch
from torch import nn

from lit_prune import compress
from lit_prune.replace.ladder import distortion_ladders
from lit_prune.replace.reconstruction import Elimination, elimination_costs, reader_moments, reconstruction_costs
from lit_prune.scores import score
from lit_prune.structure import trace_groups
from lit_prune.task import Unlabelled


def moments(units: int = 5, taps: int = 2, outputs: int = 3, metric: torch.Tensor | None = None):
    torch.manual_seed(0)
    mixing = torch.randn(units * taps, units * taps, dtype=torch.float64)
    covariance = mixing @ mixing.T
    weight = torch.randn(outputs, units * taps, dtype=torch.float64)
    metric = torch.eye(outputs, dtype=torch.float64) if metric is None else metric
    columns = torch.arange(units * taps).reshape(units, taps)
    return covariance, weight, metric, columns


def residual(covariance, weight, metric, kept) -> float:
    """E δᵀ metric δ of the best reconstruction of W u from the kept columns."""
    inner, cross = covariance[kept][:, kept], covariance[kept]
    best = weight @ cross.T @ torch.linalg.inv(inner) if len(kept) else weight[:, :0]
    error = weight @ covariance @ weight.T - best @ cross @ weight.T
    return float((metric * error).sum())


@pytest.mark.parametrize("weighted", [False, True])
def test_costs_are_the_rises_of_the_least_squares_error_in_greedy_order(weighted):
    metric = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 3.0]]).double() if weighted else None
    covariance, weight, metric, columns = moments(metric=metric)
    found = elimination_costs([Elimination.build(covariance, weight.clone(), metric, columns, 1e-14)], 5)
    left, before, expected = list(range(5)), 0.0, torch.zeros(5, dtype=torch.float64)
    while left:
        trials = {}
        for unit in left:
            kept = [c for other in left if other != unit for c in columns[other].tolist()]
            trials[unit] = residual(covariance, weight, metric, kept)
        unit = min(trials, key=trials.get)
        expected[unit] = max(trials[unit] - before, float(expected.max()))
        before = trials[unit]
        left.remove(unit)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_unit_that_the_others_determine_goes_first_and_costs_nothing():
    covariance, weight, metric, columns = moments(taps=1)
    mixing = torch.eye(5, dtype=torch.float64)
    mixing[3] = torch.tensor([0.5, -1.0, 0, 0, 2.0])  # unit 3 is a combination of 0, 1 and 4
    covariance = mixing @ covariance @ mixing.T
    costs = elimination_costs([Elimination.build(covariance, weight, metric, columns, 1e-12)], 5)
    least = costs.argsort()[:2]
    assert costs[least[0]] < 1e-6 * costs[least[1]]
    assert int(least[0]) in (0, 1, 3, 4)


def test_two_readers_add_up():
    covariance, weight, metric, columns = moments()
    halves = [weight[:1], weight[1:]]
    whole = elimination_costs([Elimination.build(covariance, weight.clone(), metric, columns, 1e-9)], 5)
    parts = [
        Elimination.build(covariance, half.clone(), torch.eye(len(half), dtype=torch.float64), columns, 1e-9)
        for half in halves
    ]
    torch.testing.assert_close(elimination_costs(parts, 5), whole)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.mix = nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        return self.head(torch.relu(self.mix(torch.relu(self.conv(images)))).flatten(2).sum(2))


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 3, 6, 6, generator=generator), torch.zeros(16).long()) for _ in range(2)]


def test_metric_of_the_classifier_is_the_identity_and_covariance_is_that_of_unfolded_patches(batches):
    torch.manual_seed(0)
    net = Head().eval()
    many = torch.cat([batches[0][0]] * 400)
    metric = reader_moments(net, ["head"], [many], Unlabelled())["head"].metric
    torch.testing.assert_close(metric, torch.eye(3).double(), rtol=0, atol=0.05)
    seen = []
    net.mix.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    covariance = reader_moments(net, ["mix"], batches, Unlabelled())["mix"].covariance
    patches = torch.cat([nn.functional.unfold(u, 3).transpose(1, 2).flatten(0, 1) for u in seen]).double()
    torch.testing.assert_close(covariance.inputs, torch.cov(patches.T, correction=0), rtol=1e-5, atol=1e-6)


def test_score_is_invariant_to_rescaled_units_and_divides_by_multiply_adds(batches):
    torch.manual_seed(0)
    net = Head().eval()
    example = batches[0][0]
    plain = reconstruction_costs(net, batches, example, per_mac=0)["conv"]
    per_mac = reconstruction_costs(net, batches, example)["conv"]
    torch.testing.assert_close(plain / per_mac, torch.full((6,), 3.0 * 9 * 36 + 4 * 9 * 16).double())
    ranks = score(net, "reconstruction(0)", batches)
    torch.testing.assert_close(ranks["conv"], plain)
    assert "head" not in ranks
    with torch.no_grad():
        scale = torch.tensor([0.5, 2.0, 1.0, 4.0, 1.0, 0.25])
        net.conv.weight.mul_(scale[:, None, None, None])
        net.conv.bias.mul_(scale)
        net.mix.weight.div_(scale[:, None, None])
    rescaled = reconstruction_costs(net, batches, example, per_mac=0)["conv"]
    assert torch.equal(rescaled.argsort(), plain.argsort())
    torch.testing.assert_close(rescaled, plain, rtol=1e-4, atol=0)


def test_few_images_do_not_make_a_wide_reader_look_replaceable():
    """With fewer images than features any unit is a combination of the others on these images, and on no others."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)).eval()
    few, many = torch.randn(40, 3, 6, 6), torch.randn(2000, 3, 6, 6)
    graph = trace_groups(net, few[:1])
    damage = []
    for images in (few, many):
        moments = reader_moments(net, ["4"], [images], "unlabelled")
        widths, errors = distortion_ladders(net, graph, {"0": range(64)}, [images], moments, "unlabelled")["0"]
        damage.append(errors[widths.index(40)])
    assert damage[1] / 2 < damage[0] < 2 * damage[1]


def test_the_order_is_the_same_however_many_removals_wait(monkeypatch):
    covariance, weight, metric, columns = moments(units=12, taps=2)
    shuffled = columns.flatten()[torch.randperm(24)].reshape(12, 2)[:9]  # three units' places belong to another group
    found = []
    for waiting in (1, 4, 100):
        monkeypatch.setattr("lit_prune.replace.reconstruction.WAITING", waiting)
        found.append(elimination_costs([Elimination.build(covariance, weight, metric, shuffled, 1e-6)], 9))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_a_group_whose_reader_takes_too_many_values_stays_whole_and_the_report_says_so(monkeypatch):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 2)]
    net, images = nn.Sequential(*layers).eval(), torch.randn(64, 3, 8, 8)
    monkeypatch.setattr(
        "lit_prune.replace.reconstruction.WIDEST", 100
    )  # the second layer reads 72 values, the last 128
    _, report = compress(net, [images[:32], images[32:]], keep=0.7)
    assert set(report["plan"]["keep_channels"]) == {"0"}
    assert "1 groups left whole, which the score says nothing of: 2" in str(report)
