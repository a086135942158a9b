"""The width of an embedding, cut: the same architecture built narrower, with the kept weights."""

import json

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from lit_prune import make_plan
from lit_prune.errors import InputError
from lit_prune.structure import Budget, CostModel, Plan, apply_plan, plan_channels, trace_groups
from lit_prune.structure.surgery import transfer_tensors


def _vit(width: int, **options) -> nn.Module:
    arguments = {"img_size": 16, "patch_size": 4, "depth": 2, "num_classes": 5, "mlp_ratio": 24 / width}
    return timm.models.VisionTransformer(embed_dim=width, num_heads=2, attn_drop_rate=0.0, **arguments, **options)


def _convnext(width: int) -> nn.Module:
    model = ConvNeXt([CNBlockConfig(width, 16, 2), CNBlockConfig(16, None, 1)], num_classes=5)
    return model


def _timm_convnext(width: int) -> nn.Module:
    return timm.models.ConvNeXt(depths=(2, 1, 1, 1), dims=(width, 16, 8, 8), num_classes=5)


CASES = {
    "vit": (lambda: _vit(24), 16),
    "deit with registers": (lambda: _vit(24, reg_tokens=2, init_values=0.1, qk_norm=True), 16),
    "vit averaged": (lambda: _vit(24, global_pool="avg", class_token=False), 16),
    "torchvision vit": (lambda: VisionTransformer(16, 4, 2, 2, 24, 32, num_classes=5), 16),
    "cait": (
        lambda: timm.models.Cait(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2, num_classes=5),
        16,
    ),
    "swin": (lambda: SwinTransformer([4, 4], 12, [2], [2], [4, 4], num_classes=5), 32),
    "swin v2": (
        lambda: SwinTransformer(
            *([4, 4], 12, [2], [2], [4, 4]),
            num_classes=5,
            block=SwinTransformerBlockV2,
            downsample_layer=PatchMergingV2,
        ),
        32,
    ),
    "convnext": (lambda: _convnext(12), 32),
    "timm convnext": (lambda: _timm_convnext(12), 32),
    "timm convnext v2": (lambda: timm.models.ConvNeXt(depths=(2, 1, 1, 1), dims=(12, 16, 8, 8), use_grn=True), 32),
}


def _seeded(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, size = CASES[name]
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, torch.randn(2, 3, size, size)


def _plan(model: nn.Module, images: Tensor, **options) -> Plan:
    graph = trace_groups(model, images)
    ranks = {name: torch.rand(m.weight.shape[0]) for name, m in model.named_modules() if hasattr(m, "weight")}
    costs = CostModel.build(model, graph, images)
    return plan_channels(
        graph, costs, ranks, Budget("channels", allocation="uniform", **{"keep": 0.6, "only": "width"} | options)
    )


@pytest.mark.parametrize("name", CASES)
def test_the_width_that_norms_read_is_a_group_of_its_own_role(name: str) -> None:
    model, images = _seeded(name)
    groups = [group for group in trace_groups(model, images).prunable if group.role == "width"]
    assert len(groups) == {"convnext": 2, "timm convnext": 4, "timm convnext v2": 9}.get(name, 1)


@pytest.mark.parametrize("name", CASES)
def test_a_narrower_network_computes_what_its_own_formulas_say(name: str) -> None:
    """Every layer is as narrow as its weights say, and the dense formulas over the kept channels give the outputs."""
    model, images = _seeded(name)
    plan = Plan.from_dict(json.loads(json.dumps(_plan(model, images).to_dict())))
    small = apply_plan(model, plan, images)
    with torch.no_grad():
        output = small(images)
    assert output.shape == model(images).shape and output.isfinite().all()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    small.train()(images).sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in small.parameters())
    parameters = dict(model.named_parameters())
    moved = transfer_tensors(model, plan, images, parameters)
    assert all(torch.equal(moved[key], value) for key, value in small.named_parameters())


@pytest.mark.parametrize("build", [_timm_convnext, _convnext], ids=["timm", "torchvision"])
def test_convnext_equals_the_architecture_built_at_the_smaller_width(build) -> None:
    torch.manual_seed(0)
    model, images = build(12).eval(), torch.randn(2, 3, 32, 32)
    graph = trace_groups(model, images)
    first = next(group for group in graph.prunable if group.role == "width")
    mids = [group for group in graph.prunable if group.role == "mid" and group.size == 48]
    ranks = {name: torch.rand(m.weight.shape[0]) for name, m in model.named_modules() if hasattr(m, "weight")}
    names = [first.name, *(group.name for group in mids)]
    budget = Budget("channels", 8 / 12, "uniform", only=names)
    small = apply_plan(model, plan_channels(graph, CostModel.build(model, graph, images), ranks, budget), images)
    narrow = build(8).eval()
    narrow.load_state_dict(small.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(small(images), narrow(images))


def test_a_vision_transformer_equals_the_one_built_at_the_smaller_width() -> None:
    """Width and heads together: the head's width stays, and so one of two heads goes with half of the channels."""
    torch.manual_seed(0)
    model, images = _vit(24).eval(), torch.randn(2, 3, 16, 16)
    small = apply_plan(model, _plan(model, images, keep=0.5, only=("width", "heads")), images)
    narrow = timm.models.VisionTransformer(
        img_size=16, patch_size=4, depth=2, num_classes=5, embed_dim=12, num_heads=1, mlp_ratio=2.0
    ).eval()
    narrow.load_state_dict(small.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(small(images), narrow(images))


def test_width_goes_only_where_it_is_asked_for() -> None:
    model, images = _seeded("vit")
    scores = {name: torch.rand(m.weight.shape[0]) for name, m in model.named_modules() if hasattr(m, "weight")}
    width = next(group.name for group in trace_groups(model, images).prunable if group.role == "width")
    assert width not in make_plan(model, scores, images, "channels", 0.5).keep_channels
    assert width in make_plan(model, scores, images, "channels", 0.5, only=["width", "mid"]).keep_channels
    with pytest.raises(InputError, match="no group is called"):
        make_plan(model, scores, images, "channels", 0.5, only=["wide"])


def test_a_network_of_widths_alone_says_how_they_are_asked_for() -> None:
    model, images = _seeded("timm convnext v2")
    scores = {name: torch.rand(len(m.weight)) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    with pytest.raises(InputError, match="only='width'"):
        make_plan(model, scores, images, "macs", 0.5)
    assert make_plan(model, scores, images, "macs", 0.9, only="width").keep_channels
