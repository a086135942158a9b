import pytest
import torch
from torch import nn

from lit_prune.lab.reduce.classifier_head import Head, HeadEvidence, compile_head, interchange_heads, read_features
from lit_prune.replace import Replacement, Swaps, interchange, replace_mechanisms
from lit_prune.structure import Plan

KEPT = (0, 2, 3, 5, 7, 8, 11)
EXAMPLE = torch.zeros(1, 5, dtype=torch.float64)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 4)).double().eval()
    nn.init.normal_(net[2].weight)
    return net


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(40, 5, generator=generator, dtype=torch.float64), torch.randint(4, (40,), generator=generator))
        for _ in range(5)
    ]


@pytest.mark.parametrize(("kind", "settings"), [
    ("delete", {}), ("constant", {}), ("constant", {"objective": "loss"}), ("constant", {"objective": "joint_loss"}),
    ("affine", {"parents": 3}), ("affine", {"parents": None}), ("affine", {"parents": 3, "objective": "loss"}),
    ("affine", {"parents": 3, "parent_rule": "weighted_pearson"}), ("refit", {"ridge": 1e-6}),
])  # fmt: skip
def test_a_compiled_head_is_what_replacement_in_the_network_gives(net, batches, kind, settings):
    settings = Replacement(**settings)
    plan = Plan(keep_channels={"0": KEPT}, sizes={"0": 12})
    whole = replace_mechanisms(net, plan, batches, kind, EXAMPLE, settings=settings)
    features = read_features(net, "2", batches)
    head = compile_head(HeadEvidence(Head.of(net, "2"), features), KEPT, kind, settings)
    logits = torch.cat([whole.model(images) for images, _ in batches])
    torch.testing.assert_close(head.logits(features.values), logits, rtol=1e-8, atol=1e-9)


def test_interchange_on_features_is_the_interchange_of_the_networks(net, batches):
    plan = Plan(keep_channels={"0": KEPT}, sizes={"0": 12})
    swaps = Swaps(pairs=300, seed=3)
    reduced = replace_mechanisms(net, plan, batches, "constant", EXAMPLE)
    wanted = interchange(net, reduced, batches, EXAMPLE, swaps=swaps)
    features = read_features(net, "2", batches)
    low = Head.of(net, "2")
    high = compile_head(HeadEvidence(low, features), KEPT, "constant", Replacement())
    found = interchange_heads(low, high, features, swaps)
    torch.testing.assert_close(found.low, wanted.low, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.high, wanted.high, rtol=0, atol=1e-9)
    assert found.certificate.bound <= found.certificate.empirical <= found.iia


def test_reducing_in_two_steps_with_means_is_reducing_at_once(net, batches):
    features = read_features(net, "2", batches)
    start = HeadEvidence(Head.of(net, "2"), features)
    once = compile_head(start, KEPT, "constant", Replacement())
    half = compile_head(start, (0, 1, 2, 3, 5, 7, 8, 10, 11), "constant", Replacement())
    twice = compile_head(HeadEvidence(half, features), KEPT, "constant", Replacement())
    assert twice.kept == once.kept
    torch.testing.assert_close(twice.weight, once.weight)
    torch.testing.assert_close(twice.bias, once.bias)


@pytest.mark.parametrize("rule", ["pearson", "weighted_pearson", "random"])
def test_parent_rules_choose_kept_units_and_the_seed_decides_random_ones(net, batches, rule):
    from lit_prune.replace.flow import Reader
    from lit_prune.replace.stand_ins import choose_parents

    evidence = HeadEvidence(Head.of(net, "2"), read_features(net, "2", batches))
    reader = Reader("2", (1, 4, 6, 9, 10), KEPT, (0, 1, 2, 3), (0, 1, 2, 3), (), "")
    weight = evidence.head.weight
    chosen = [
        choose_parents(evidence.moments, reader, weight, Replacement(parents=3, parent_rule=rule, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(chosen[0], chosen[1]) and chosen[0].shape == (5, 3) and int(chosen[0].max()) < len(KEPT)
    assert torch.equal(chosen[0], chosen[2]) == (rule != "random")
    scaled = weight * torch.linspace(0.1, 9, 12, dtype=torch.float64)
    again = choose_parents(evidence.moments, reader, scaled, Replacement(parents=3, parent_rule=rule))
    assert torch.equal(again, chosen[0])  # no rule looks at the scale of outgoing weights
