"""Heads that lose width give what the network gives with these positions silenced, by the scale that they had."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lit_prune import score
from lit_prune.errors import InputError
from lit_prune.replace import replace_mechanisms
from lit_prune.structure import CostModel, Group, Plan, apply_plan, cost, make_plan, trace_groups
from lit_prune.structure.attention_slices import Part, owners_of
from tests.structure.test_heads import attention_network, check_equal_in_both_modes, projection_of

BOTH = (
    "torchvision_vit",
    "torchvision_swin",
    "torch_encoder",
    "deit",
    "timm_swin",
    "pvt",
    "twins",
    "beit",
    "class_token",
    "by_hand",
    "levit",
    "levit_maps",
    "levit_between",
    "timm_maxvit",
    "timm_maxvit_maps",
    "torchvision_maxvit",
    "talking_heads",
)
VALUES = ("torchvision_swin_v2", "registers_and_norms", "timm_swin_v2", "eva")


def _widths(model: nn.Module, images: Tensor) -> list[Group]:
    return [group for group in trace_groups(model, images).prunable if group.role == "head_width"]


def _plan(groups: list[Group]) -> Plan:
    keep = {group.name: tuple(range(max(1, group.size - 2))) for group in groups}
    return Plan((), keep, {group.name: group.size for group in groups})


def _silenced(model: nn.Module, plan: Plan, interleaved: bool) -> nn.Module:
    """The dense network whose projections read nothing of these values, and whose queries are zero at these places."""
    silent = copy.deepcopy(model)
    for name in plan.keep_channels:
        attention = (
            silent.get_submodule(name.rpartition(".")[0])
            if name.count(".") > 1 or hasattr(silent, name.split(".")[0])
            else silent
        )
        kind, lost = name.rpartition(".")[2], torch.tensor(plan.removed(name))
        projection = projection_of(attention)
        heads = getattr(attention, "num_heads", projection.weight.shape[1] // plan.sizes[name])
        place = torch.arange(heads * plan.sizes[name])
        place = place // heads if interleaved else place % plan.sizes[name]
        gone = torch.isin(place, lost)
        with torch.no_grad():
            if kind == "values":
                projection.weight[:, gone] = 0
                continue
            if hasattr(attention, "in_proj_weight"):
                tensors = [attention.in_proj_weight, attention.in_proj_bias]
            else:
                queries = next(getattr(attention, key) for key in ("q", "qkv", "to_qkv") if hasattr(attention, key))
                tensors = list(queries.parameters())
                tensors += [attention.q_bias] if hasattr(attention, "q_bias") else []
            if getattr(attention, "head_first", hasattr(attention, "key_attn_dim")):  # in each head one after the other
                rows = torch.arange(len(tensors[0]))
                gone = torch.isin(rows % (len(rows) // heads), lost)
            for tensor in tensors:
                tensor[: len(gone)][gone] = 0
    return silent


@pytest.mark.parametrize("name", BOTH + VALUES)
def test_network_with_narrower_heads_equals_the_one_with_these_positions_silenced(name: str) -> None:
    model, images = attention_network(name)
    groups = _widths(model, images)
    kinds = {group.name.rpartition(".")[2] for group in groups}
    assert kinds == ({"values", "query_key"} if name in BOTH else {"values"})
    plan = Plan.from_dict(_plan(groups).to_dict())
    small, silent = apply_plan(model, plan, images), _silenced(model, plan, name == "by_hand")
    check_equal_in_both_modes(small, silent, images)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    again = _plan(_widths(small.eval(), images))  # narrower heads are traced and cut like others
    assert torch.isfinite(apply_plan(small, again, images)(images)).all()


@pytest.mark.parametrize(
    "name", ["torchvision_vit", "deit", "timm_swin", "pvt", "torchvision_swin_v2", "levit", "talking_heads"]
)
@pytest.mark.parametrize("role", ["head_width", "heads"])
def test_the_cost_of_narrower_heads_is_that_of_the_network(name: str, role: str) -> None:
    model, images = attention_network(name)
    for _ in range(2):  # also where queries and values differ already
        graph = trace_groups(model, images)
        costs = CostModel.build(model, graph, images)
        groups = [group for group in graph.prunable if group.role == role and group.size > 2]
        keep = {group.name: tuple(range(1 + place % 2, group.size)) for place, group in enumerate(groups)}
        small = apply_plan(model, Plan((), keep, {group.name: group.size for group in groups}), images)
        counted, after = cost(small, images), costs.widths(keep)
        assert (costs.macs(after), costs.params(after)) == (counted.macs, counted.params)
        model, role = small, "head_width"


def test_numbers_that_state_widths_follow_and_the_scale_stays() -> None:
    model, images = attention_network("deit")
    small = apply_plan(model, _plan(_widths(model, images)), images)
    old, new = model.blocks[0].attn, small.blocks[0].attn
    assert (new.num_heads, new.head_dim, new.value_dim, new.attn_dim) == (4, 4, 4, 16)
    assert new.scale == old.scale
    heads = [group for group in trace_groups(model, images).prunable if group.role == "heads"]
    fewer = apply_plan(model, Plan((), {g.name: (0, 1) for g in heads}, {g.name: 4 for g in heads}), images)
    assert (fewer.blocks[0].attn.num_heads, fewer.blocks[0].attn.attn_dim) == (2, 12)


@pytest.mark.parametrize("name", ["deit", "torchvision_vit"])
def test_stand_ins_for_values_bring_the_output_nearer(name: str) -> None:
    model, _ = attention_network(name)
    images = torch.randn(40, 3, 32, 32)
    plan = _plan([group for group in _widths(model, images) if group.name.endswith("values")])
    distance = {}
    for kind in ("delete", "constant", "refit"):
        reduced = replace_mechanisms(model, plan, [(images, None)], kind, images)
        distance[kind] = float((reduced.model(images) - model(images)).square().mean().detach())
    assert distance["refit"] < distance["constant"] < distance["delete"]


def test_widths_of_heads_are_scored_planned_and_kept_apart_from_whole_heads() -> None:
    model, images = attention_network("deit")
    batches = [(images, torch.tensor([0, 1]))]
    dense = cost(model, images).macs
    for name in ("magnitude", "taylor"):
        plan = make_plan(model, score(model, name, batches), images, "macs", 0.9, only="head_width")
        assert cost(apply_plan(model, plan, images), images).macs <= 0.9 * dense
        assert all(".attn." in group for group in plan.keep_channels)
    usual = make_plan(model, score(model, "magnitude", batches), images, "macs", 0.6)
    assert not any(group.endswith((".values", ".query_key")) for group in usual.keep_channels)
    with pytest.raises(InputError, match="whole heads of 'blocks.0.attn' or narrows them"):
        make_plan(model, score(model, "magnitude", batches), images, only=["heads", "head_width"])


@pytest.mark.parametrize("seed", range(4))
def test_the_width_of_values_goes_whatever_the_rounding_of_the_keys_bias(seed: int) -> None:
    """Softmax does not see that bias: its gradient is rounding alone, which may look like anybody's."""
    torch.manual_seed(seed)
    model = VisionTransformer(32, 8, 2, 4, 24, 32, num_classes=3).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    values = [g for g in trace_groups(model, torch.randn(1, 3, 32, 32)).groups if g.name.endswith(".values")]
    assert [group.protected for group in values] == ["", ""]


def test_what_mixes_positions_of_queries_and_keys_keeps_them_with_the_reason() -> None:
    for name in VALUES:
        model, images = attention_network(name)
        found = [group for group in trace_groups(model, images).groups if group.name.endswith("query_key")]
        assert found and all("norm or rotation" in group.protected for group in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_units_are_told_apart_in_every_precision(dtype: torch.dtype) -> None:
    """More of them than two codes tell apart in half precision: the head of 512 channels of an image decoder."""
    unit = torch.arange(5000).flip(0)
    weight = nn.Parameter(torch.ones(5000, dtype=dtype))
    ((name, owner),) = owners_of([Part("weight", weight)], [(2 * weight, 0, unit)], 5000)
    assert name == "weight" and torch.equal(owner.long(), unit)
