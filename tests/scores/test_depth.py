"""Blocks as one more width of the group inside them: priced exactly, those that add nothing go first."""

import pytest
import torch

from lit_prune.compression import Recipe, compress
from lit_prune.errors import InputError
from lit_prune.models import build_backbone
from lit_prune.replace import Replacement
from lit_prune.scores import Evidence, plan_method
from lit_prune.scores.planning import droppable_groups
from lit_prune.structure import Budget, CostModel, apply_plan, cost, make_plan

PARTS = ("mid", "blocks")


@pytest.fixture(scope="module")
def case():
    """ResNet-20 of which two blocks add next to nothing, and its images."""
    torch.manual_seed(0)
    model = build_backbone("cifar_resnet20", 4).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2.0)
        for name in ("layer1.1", "layer3.2"):
            model.get_submodule(name).bn2.weight *= 1e-4
    return model, [(torch.randn(48, 3, 12, 12), torch.arange(48) % 4) for _ in range(2)]


@pytest.fixture(scope="module")
def known(case):
    """Evidence and cost model."""
    evidence = Evidence(*case)
    return evidence, CostModel.build(case[0], evidence.graph, evidence.example)


def test_blocks_that_hold_one_group_and_change_no_shape_may_go(case):
    model, batches = case
    evidence = Evidence(model, batches)
    found = droppable_groups(model, evidence.graph, evidence.example)
    free = {f"layer{stage}.{place}" for stage in (1, 2, 3) for place in range(3)} - {"layer2.0", "layer3.0"}
    assert set(found.values()) == free
    assert all(group.startswith(f"{block}.") for group, block in found.items())


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_blocks_that_add_nothing_go_first_and_the_budget_counts_them_exactly(case, known, kind):
    model, batches = case
    evidence, cost_model = known
    plan = plan_method(evidence, "magnitude", evidence.graph, cost_model, Budget(kind, 0.6, "measured", only=PARTS))
    assert {"layer1.1", "layer3.2"} <= set(plan.drop_blocks)
    small = apply_plan(model, plan, batches[0][0][:1])
    counted = [getattr(cost(network, batches[0][0][:1]), kind) for network in (small, model)]
    # What norms of the trunk hold goes with the block too, and is not counted: the budget is kept all the more.
    assert counted[0] / counted[1] <= plan.notes["achieved"] <= 0.6
    assert counted[0] / counted[1] == pytest.approx(plan.notes["achieved"], abs=0 if kind == "macs" else 2e-3)


def test_a_stage_keeps_a_block(case, known):
    model, batches = case
    evidence, cost_model = known
    request = Budget(keep=0.05, allocation="measured", only=PARTS)
    plan = plan_method(evidence, "magnitude", evidence.graph, cost_model, request)
    assert not {"layer1.0", "layer1.1", "layer1.2"} <= set(plan.drop_blocks)
    apply_plan(model, plan, batches[0][0][:1])


def test_compress_drops_blocks_and_answers_alike(case):
    model, batches = case
    recipe = Recipe(score="magnitude", only=PARTS, replacement=Replacement(towards="weights", unsupported="delete"))
    compact, report = compress(model, batches[:1], keep=0.78, recipe=recipe)
    assert report["plan"]["drop_blocks"] and set(report["plan"]["drop_blocks"]) <= {"layer1.1", "layer3.2"}
    assert report["compact"]["macs"] <= 0.78 * report["dense"]["macs"] and report["distortion"] < 0.02


def test_scores_of_channels_alone_drop_no_block(case):
    model, batches = case
    ranks = {"layer1.0.conv1": torch.rand(16)}
    with pytest.raises(InputError, match="'blocks' go by allocation='measured' alone, not by 'global'"):
        make_plan(model, ranks, batches[0][0], only=PARTS)
