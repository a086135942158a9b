"""Every method name and budget gives a plan; methods made of others cut as they say."""

import json

import numpy as np
import pytest
import torch

from lit_prune.errors import InputError
from lit_prune.models import build_backbone
from lit_prune.scores import SCORES, Evidence, find_score, plan_method, score
from lit_prune.scores.planning import channel_sparsity
from lit_prune.structure import Budget, CostModel, group_scores, make_plan
from lit_prune.task import Custom


@pytest.fixture(scope="module")
def case():
    """Evidence, graph and cost model of a small residual network."""
    torch.manual_seed(0)
    model = build_backbone("cifar_resnet20", 4).eval()
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(24, 3, 12, 12, generator=generator), torch.arange(24) % 4) for _ in range(2)]
    evidence = Evidence(model, batches)
    return evidence, evidence.graph, CostModel.build(model, evidence.graph, evidence.example)


def widths(graph, plan):
    return {group.name: group.size - len(plan.removed(group.name)) for group in graph.prunable}


@pytest.mark.parametrize("method", SCORES)
def test_every_method_meets_a_budget(case, method):
    plan = plan_method(*case[:1], method, *case[1:], Budget(keep=0.5, normalisation="rank"))
    assert plan.notes["met"] and plan.notes["method"] == method


@pytest.mark.parametrize("method", SCORES)
def test_the_notes_say_with_which_scores_units_went_and_stayed(case, method):
    evidence, graph, cost_model = case
    plan = plan_method(evidence, method, graph, cost_model, Budget(keep=0.5))
    ranges = json.loads(json.dumps(plan.notes["scores"], allow_nan=False))
    assert set(ranges) == set(plan.removals)
    for group, found in ranges.items():
        removed, kept = found["removed"], found["kept"]
        assert removed == sorted(removed) and kept == sorted(kept)
        assert removed[2] <= kept[0], group


@pytest.mark.parametrize("method", ["magnitude", "composite_ix", "fpgm"])
def test_a_plain_score_plans_as_make_plan_does(case, method):
    evidence, graph, cost_model = case
    ranks = score(evidence.model, method, evidence.batches)
    expected = make_plan(evidence.model, ranks, evidence.example, keep=0.6)
    assert plan_method(evidence, method, graph, cost_model, Budget(keep=0.6)).keep_channels == expected.keep_channels


@pytest.mark.parametrize("normalisation", ["none", "layer_mean", "rank"])
def test_hybrid_takes_widths_from_one_score_and_units_from_the_other(case, normalisation):
    evidence, graph, cost_model = case
    request = Budget(keep=0.5, normalisation=normalisation, round_to=2)
    budgets = plan_method(evidence, "taylor", graph, cost_model, request)
    plan = plan_method(evidence, "hybrid(taylor, magnitude_plus_ix(2))", graph, cost_model, request)
    assert widths(graph, plan) == widths(graph, budgets)
    ranks, _ = group_scores(graph, find_score("magnitude_plus_ix(2)").ranks(evidence), Budget())
    for group, kept in plan.keep_channels.items():
        assert set(kept) == set(np.argsort(-ranks[group], kind="stable")[: len(kept)].tolist())


def test_hybrid_of_a_score_with_itself_is_that_score(case):
    evidence, graph, cost_model = case
    plans = [plan_method(evidence, m, graph, cost_model, Budget()) for m in ("taylor", "hybrid(taylor,taylor)")]
    assert plans[0].keep_channels == plans[1].keep_channels


def test_what_was_measured_is_not_measured_again(case, monkeypatch):
    evidence, graph, cost_model = case
    first = plan_method(evidence, "hybrid", graph, cost_model, Budget())
    monkeypatch.setattr(type(evidence.model), "forward", None)
    assert plan_method(evidence, "hybrid", graph, cost_model, Budget()) == first
    plan_method(evidence, "composite_pid", graph, cost_model, Budget(keep=0.3))


def test_sparsity_is_the_share_of_channels_that_goes(case):
    _, graph, cost_model = case
    assert channel_sparsity(graph, cost_model, Budget("channels", 0.3)) == pytest.approx(0.7)
    half = channel_sparsity(graph, cost_model, Budget("macs", 0.25, cap=1.0))
    assert 0.45 < half < 0.55  # multiply-adds fall with the square of the width
    names = [group.name for group in graph.prunable]
    given = Budget("macs", dict.fromkeys(names, 0.5), "layerwise")
    assert channel_sparsity(graph, cost_model, given) == pytest.approx(0.5)


def test_names_of_methods_are_read_through_their_parentheses():
    method = find_score(" hybrid ( ix_minus_redundancy(0.25) , fpgm ) ")
    assert [inner.score for inner in method.parameters] == [SCORES["ix_minus_redundancy"], SCORES["fpgm"]]
    assert method.parameters[0].parameters == (0.25,)
    with pytest.raises(InputError, match="'tailor' is unknown; did you mean taylor"):
        find_score("hybrid(tailor)")
    with pytest.raises(InputError, match=r"too many parameters; hybrid takes \(budgets, order\)"):
        find_score("hybrid(taylor,fpgm,random)")


class Pair(torch.nn.Module):
    """Reads two tensors."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.head = (torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, one, other):
        return self.head(torch.relu(self.one(one)) + torch.relu(self.other(other)))


def test_what_is_measured_with_one_tensor_is_refused_for_a_network_of_two():
    task = Custom(run=lambda model, batch: model(*batch), inputs=lambda batch: (tuple(batch), {}))
    evidence = Evidence(Pair(), [(torch.rand(8, 4), torch.rand(8, 4))], task=task)
    cost_model = CostModel.build(evidence.model, evidence.graph, evidence.example)
    with pytest.raises(InputError, match="reads more than one tensor"):
        plan_method(evidence, "magnitude", evidence.graph, cost_model, Budget("latency", 0.5))
