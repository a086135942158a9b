import pytest
import timm
import torch

from lit_prune import apply_plan, cost
from lit_prune.compression import Recipe
from lit_prune.errors import InputError
from lit_prune.models import Block, build_backbone
from lit_prune.structure import trace_groups
from lit_prune.structure.budgets import Quantity
from lit_prune.train.stage_plans import Probe, cut, dense_costs, plan_stage, removable_in_order
from lit_prune.train.stages import BlockStage, ChannelStage


def block(name: str, protected: str = "") -> Block:
    return Block(name, name.split(".")[0], (name,), protected)


BLOCKS = (block("s1.0"), block("s1.1"), block("s2.0", "changes shape"), block("s2.1"), block("s3.0"), block("s3.1"))


def test_blocks_go_in_ascending_information_skipping_protected_ones_and_the_last_of_a_stage():
    information = {"s1.0": 0.3, "s1.1": 0.1, "s2.0": 0.0, "s2.1": 0.5, "s3.0": 0.2, "s3.1": 0.4}
    assert removable_in_order(BLOCKS, information) == ["s1.1", "s3.0", "s2.1"]


def test_information_decides_between_the_blocks_of_a_stage():
    information = {"s1.0": 0.1, "s1.1": 0.3, "s2.0": 0.0, "s2.1": 0.5, "s3.0": 0.4, "s3.1": 0.2}
    assert removable_in_order(BLOCKS, information) == ["s1.0", "s3.1", "s2.1"]


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    model = build_backbone("cifar_resnet20", 4).eval()
    example = torch.zeros(1, 3, 16, 16)
    batches = [(torch.randn(32, 3, 16, 16), torch.arange(32) % 4)]
    return model, batches, example, dense_costs(model, example)


@pytest.mark.parametrize(("ratio", "count"), [(0.1, 0), (0.15, 1), (0.4, 2), (0.6, 4)])
def test_ratio_removes_the_floor_of_its_share_of_the_free_blocks(resnet, ratio, count):
    model, batches, example, dense = resnet  # 7 free blocks: 9 less the two that change shape
    stage = BlockStage(remove_ratio=ratio)
    if not count:
        with pytest.raises(InputError, match="removes nothing: 9 blocks, 7 free"):
            plan_stage(model, stage, batches, dense, Probe(example))
        return
    plan = plan_stage(model, stage, batches, dense, Probe(example))
    assert len(plan.drop_blocks) == count and not {"layer2.0", "layer3.0"} & set(plan.drop_blocks)
    information = plan.notes["information"]
    kept = [name for name in information if name not in plan.drop_blocks and name not in plan.notes["protected"]]
    survivors_of_thin_stages = {name for name in kept if sum(k.startswith(name[:6]) for k in information) == 1}
    assert max(information[name] for name in plan.drop_blocks) <= min(
        information[name] for name in kept if name not in survivors_of_thin_stages
    )


def test_blocks_by_budget_stops_at_the_first_that_fits(resnet):
    model, batches, example, dense = resnet
    plan = plan_stage(model, BlockStage(keep=0.7), batches, dense, Probe(example))
    fewer = type(plan)(drop_blocks=plan.drop_blocks[:-1], keep_channels={}, sizes={}, notes={})
    assert cost(apply_plan(model, plan, example), example).macs <= 0.7 * dense["macs"]
    assert cost(apply_plan(model, fewer, example), example).macs > 0.7 * dense["macs"]


def test_hand_written_keep_configuration(resnet):
    model, batches, example, dense = resnet
    stage = BlockStage(keep_blocks={"layer1": [0], "layer2": [0, 2], "layer3": [0]})
    dropped = plan_stage(model, stage, batches, dense, Probe(example)).drop_blocks
    assert set(dropped) == {"layer1.1", "layer1.2", "layer2.1", "layer3.1", "layer3.2"}


@pytest.mark.parametrize("kind", ["planes", "mid", "channels"])
def test_channel_budgets_are_shares_of_the_dense_network(resnet, kind):
    model, batches, example, dense = resnet
    smaller = apply_plan(model, plan_stage(model, BlockStage(remove_count=2), batches, dense, Probe(example)), example)
    plan = plan_stage(smaller, ChannelStage(0.5, part=kind), batches, dense, Probe(example))
    macs = cost(apply_plan(smaller, plan, example), example).macs
    assert 0.47 * dense["macs"] < macs <= 0.5 * dense["macs"]
    inside = {name.endswith("conv1") and name != "conv1" for name, kept in plan.keep_channels.items() if kept}
    assert inside == {"planes": {False}, "mid": {True}, "channels": {True, False}}[kind]


def test_a_budget_already_met_is_an_error_that_says_what_the_network_costs(resnet):
    model, batches, example, dense = resnet
    smaller = apply_plan(
        model, plan_stage(model, ChannelStage(0.5, part="mid"), batches, dense, Probe(example)), example
    )
    with pytest.raises(InputError, match=r"removes nothing: the network already costs (49|50)\.\d% of the dense macs"):
        plan_stage(smaller, ChannelStage(0.8, part="mid"), batches, dense, Probe(example))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (BlockStage, {}, "give exactly one of"),
        (BlockStage, {"remove_ratio": 0.5, "keep": 0.5}, "give exactly one of"),
        (BlockStage, {"remove_ratio": 1.0}, r"remove_ratio must lie in \(0, 1\)"),
        (BlockStage, {"remove_count": -2}, "remove_count must be at least 1, got -2"),
        (BlockStage, {"remove_count": 1, "budget": "params"}, "budget=params has no effect without keep"),
        (ChannelStage, {"keep": 0.0}, r"keep must lie in \(0, 1\], at least 0.001, got keep=0.0"),
        (ChannelStage, {"keep": "half"}, "keep is 'half' .str.; give a number"),
        (ChannelStage, {"keep": 0.5, "epoch": -1}, "epoch must be >= 0"),
        (ChannelStage, {"keep": 0.5, "part": "trunk"}, "part is 'trunk' .str.; give channels, "),
        (ChannelStage, {"keep": 0.5, "budget": "mac"}, "budget='mac' is unknown"),
        (ChannelStage, {"keep": 0.5, "score": "taylr"}, "score: 'taylr' is unknown; did you mean taylor"),
        (ChannelStage, {"keep": 0.5, "allocation": "even"}, "allocation is 'even' .str.; give global, "),
        (
            ChannelStage,
            {"keep": 0.5, "normalisation": "rank"},
            "normalisation=rank has no effect with allocation=measured",
        ),
        (ChannelStage, {"keep": 0.5, "replace": "means"}, "kind='means' is unknown"),
        (ChannelStage, {"keep": 0.5, "cap": 1.5}, "cap=1.5 within"),
        (ChannelStage, {"keep": 0.5, "round_to": 0}, "round_to=0 must be at least 1"),
    ],
)
def test_settings_of_stages_are_checked_when_they_are_made(kind, options, message):
    with pytest.raises(InputError, match=message):
        kind(**options)


def test_the_defaults_of_a_channel_stage_are_the_strongest_recipe():
    stage, strongest = ChannelStage(0.5), Recipe()
    assert (stage.score, stage.allocation, stage.replace) == (strongest.score, strongest.allocation, strongest.kind)
    assert stage.request(0.5) == strongest.budget("macs", 0.5)


def test_a_handful_of_samples_is_enough_for_the_default_stage(resnet):
    model, _, example, dense = resnet
    few = [(torch.randn(4, 3, 16, 16), torch.arange(4))]
    plan = plan_stage(model, ChannelStage(0.6), few, dense, Probe(example))
    reduced, plan = cut(model, plan, ChannelStage(0.6), few, example)
    assert reduced(few[0][0]).isfinite().all() and cost(reduced, example).macs <= 0.6 * dense["macs"]


@pytest.mark.parametrize("part", ["heads", "width"])
def test_a_stage_takes_heads_or_the_width_of_a_transformer_alone(part):
    model = timm.models.VisionTransformer(16, 4, num_classes=3, embed_dim=24, depth=2, num_heads=4, mlp_ratio=2).eval()
    images = torch.randn(4, 3, 16, 16)
    stage = ChannelStage(0.9, part=part, score="magnitude", allocation="uniform", replace="delete")
    batches = [(images, torch.arange(4) % 3)]
    plan = plan_stage(model, stage, batches, dense_costs(model, images), Probe(images))
    roles = {group.name: group.role for group in trace_groups(model, images).groups}
    assert {roles[name] for name in plan.keep_channels} == {part}


class Calls(Quantity):
    """Measured: multiply-adds, and three quarters of a dense pass that no cut takes away."""

    measured, unit = True, "s"

    def of(self, model, example_input):
        return cost(model, example_input).macs

    def compare(self, models, example_input):
        found = [self.of(model, example_input) for model in models]
        return [value + 3 * found[0] for value in found]


def test_a_measured_budget_that_no_cut_can_reach_is_said_at_the_cut(resnet):
    model, batches, example, _ = resnet
    budget = f"{__name__}:Calls"
    stage = ChannelStage(keep=0.5, budget=budget, score="magnitude", allocation="global")
    with pytest.warns(UserWarning, match="stage channels misses its budget: .* asked for, 7[5-9].*% left; the best of"):
        plan = plan_stage(model, stage, batches, dense_costs(model, example, [budget]), Probe(example))
    assert not plan.notes["met"] and plan.notes["achieved"] > 0.75
