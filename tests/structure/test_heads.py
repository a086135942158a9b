"""Heads that are cut leave the network in which the projection no longer sees them, in evaluation and in training."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from timm.layers import RelPosBias, RelPosMlp
from timm.models import levit, maxxvit
from torch import Tensor, nn
from torchvision import models
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from lit_prune.errors import InputError
from lit_prune.structure import CostModel, Plan, apply_plan, cost, make_plan, trace_groups
from lit_prune.structure.opened import open_copy


def _vit(**settings) -> nn.Module:
    return timm.models.VisionTransformer(32, 8, embed_dim=24, depth=2, num_heads=4, num_classes=3, **settings)


def _swin(**settings) -> nn.Module:
    return models.SwinTransformer([4, 4], 16, [1, 2], [2, 4], [4, 4], num_classes=3, **settings)


class Encoder(nn.Module):
    """torch's own encoder layers, with a mask and with batches second."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0) for _ in range(2))
        self.head = nn.Linear(24, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).permute(2, 0, 1)
        mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool, device=images.device).triu(1)
        for layer in self.layers:
            tokens = layer(tokens, mask)
        return self.head(tokens.mean(0))


class PerHead(nn.Module):
    """Attention written by hand: separate layers, heads last in the projections, a temperature and a gate each."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads = 3
        self.patches = nn.Conv2d(3, 12, 8, 8)
        self.q, self.k, self.v, self.gate = (nn.Linear(12, 12) for _ in range(4))
        self.temperature = nn.Parameter(torch.rand(3, 1, 1) + 0.5)
        self.proj = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        q, k, v, g = (
            layer(tokens).unflatten(-1, (-1, self.n_heads)).permute(0, 3, 1, 2)
            for layer in (self.q, self.k, self.v, self.gate)
        )
        mixed = torch.softmax(q @ k.transpose(-2, -1) * self.temperature, -1) @ v * g.sigmoid()
        return self.head(self.proj(mixed.permute(0, 2, 3, 1).flatten(2)).mean(1))


class ClassToken(nn.Module):
    """The class attention of CaiT and XCiT."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, 8)
        self.attn = timm.models.cait.ClassAttn(24, 4, qkv_bias=True)
        self.head = nn.Linear(24, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.attn(self.patches(images).flatten(2).transpose(1, 2)).flatten(1))


class Around(nn.Module):
    """An attention of some library between patches and a head."""

    def __init__(self, attention: nn.Module, reads: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.patches, self.attn, self.reads = nn.Conv2d(3, 24, 8, 8), attention, reads
        self.head = nn.Linear(self.eval().attended(torch.zeros(1, 3, 32, 32)).shape[1], 3)

    def attended(self, images: Tensor) -> Tensor:
        return self.attn(self.reads(self.patches(images))).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.attended(images))


def _maps(values: Tensor) -> Tensor:
    return values


def _tokens(values: Tensor) -> Tensor:
    return values.flatten(2).transpose(1, 2)


def _window(values: Tensor) -> Tensor:
    return _tokens(values)[:, None]


def _last(values: Tensor) -> Tensor:
    return values.movedim(1, -1)


_LEVIT = {"key_dim": 6, "num_heads": 4, "attn_ratio": 2.0, "resolution": 4}

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision_vit": lambda: models.VisionTransformer(32, 8, 2, 4, 24, 32, num_classes=3),
    "torchvision_swin": _swin,
    "torchvision_swin_v2": lambda: _swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
    "torch_encoder": Encoder,
    "deit": _vit,
    "registers_and_norms": lambda: _vit(qk_norm=True, reg_tokens=2, init_values=0.5),
    "timm_swin": lambda: timm.models.SwinTransformer(
        32, embed_dim=16, depths=(1, 2), num_heads=(2, 4), window_size=4, num_classes=3
    ),
    "timm_swin_v2": lambda: timm.models.SwinTransformerV2(
        32, embed_dim=16, depths=(1, 2), num_heads=(2, 4), window_size=4, num_classes=3
    ),
    "pvt": lambda: timm.models.PyramidVisionTransformerV2(
        num_classes=3,
        **{"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 4), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)},
    ),
    "twins": lambda: timm.models.Twins(
        *(32, 4, 3, 3),
        **{"depths": (2, 2), "embed_dims": (16, 32), "num_heads": (2, 4), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)},
        wss=(3, 2),
    ),
    "beit": lambda: timm.models.Beit(
        32, 8, embed_dim=24, depth=2, num_heads=4, num_classes=3, qkv_bias=True, use_rel_pos_bias=True
    ),
    "eva": lambda: timm.models.Eva(
        32, 8, embed_dim=24, depth=2, num_heads=3, num_classes=3, qkv_bias=True, use_rot_pos_emb=True
    ),
    "class_token": ClassToken,
    "by_hand": PerHead,
    "levit": lambda: Around(levit.Attention(24, **_LEVIT), _tokens),
    "levit_maps": lambda: Around(levit.Attention(24, **_LEVIT, use_conv=True), _maps),
    "levit_between": lambda: Around(levit.AttentionDownsample(24, 20, **_LEVIT), _tokens),
    "timm_maxvit": lambda: Around(
        maxxvit.AttentionCl(24, dim_head=6, rel_pos_cls=partial(RelPosBias, window_size=(4, 4))), _last
    ),
    "timm_maxvit_maps": lambda: Around(
        maxxvit.Attention2d(24, dim_head=6, rel_pos_cls=partial(RelPosMlp, window_size=(4, 4)), head_first=False), _maps
    ),
    "torchvision_maxvit": lambda: Around(RelativePositionalMultiHeadAttention(24, 6, 16), _window),
    "talking_heads": lambda: Around(timm.models.cait.TalkingHeadAttn(24, 4, qkv_bias=True), _tokens),
}


def attention_network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model, torch.randn(2, 3, 32, 32)


def projection_of(attention: nn.Module) -> nn.Module | None:
    """The layer that reads the heads, if the module is an attention."""
    found = next((getattr(attention, name) for name in ("out_proj", "merge", "proj") if hasattr(attention, name)), None)
    return found[-1].linear if isinstance(found, nn.Sequential) else found


def _silenced(model: nn.Module, plan: Plan, interleaved: bool) -> nn.Module:
    """The dense network whose projections have zeros in the columns of the heads that go."""
    silent = copy.deepcopy(model)
    for name in plan.keep_channels:
        attention = silent if name == "attention" else silent.get_submodule(name)
        projection = projection_of(attention)
        columns = torch.arange(projection.weight.shape[1])
        heads = columns % plan.sizes[name] if interleaved else columns // (len(columns) // plan.sizes[name])
        with torch.no_grad():
            projection.weight[:, torch.isin(heads, torch.tensor(plan.removed(name)))] = 0
    return silent


def _plan(model: nn.Module, images: Tensor) -> Plan:
    heads = [group for group in trace_groups(model, images).prunable if group.role == "heads"]
    keep = {group.name: tuple(range(1, group.size, 2)) for group in heads}
    return Plan((), keep, {group.name: group.size for group in heads})


def check_equal_in_both_modes(small: nn.Module, silent: nn.Module, images: Tensor) -> None:
    """The outputs in evaluation and in training, after which `small` has its gradients."""
    for training in (False, True):
        torch.manual_seed(1)
        actual = small.train(training)(images)
        torch.manual_seed(1)
        expected = silent.train(training)(images)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    actual.square().mean().backward()


@pytest.mark.parametrize("name", NETWORKS)
def test_network_without_heads_equals_the_one_with_these_heads_silenced(name: str) -> None:
    model, images = attention_network(name)
    plan = Plan.from_dict(_plan(model, images).to_dict())
    attentions = [m for m in model.modules() if hasattr(m, "num_heads") or hasattr(m, "n_heads")]
    inner = [m for m in attentions if projection_of(m) is not None]
    assert len(plan.keep_channels) == len(inner)
    small, silent = apply_plan(model, plan, images), _silenced(model, plan, name == "by_hand")
    check_equal_in_both_modes(small, silent, images)
    assert all(p.grad is None or p.grad.isfinite().all() for p in small.parameters())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


OPENED = tuple(name for name in NETWORKS if name != "by_hand")


@pytest.mark.parametrize("name", OPENED)
def test_opened_attention_computes_the_same_in_both_modes(name: str) -> None:
    model, images = attention_network(name)
    opened = open_copy(model)
    assert opened.state_dict().keys() == model.state_dict().keys()
    for training in (False, True):
        torch.manual_seed(1)
        expected = model.train(training)(images)
        torch.manual_seed(1)
        torch.testing.assert_close(opened.train(training)(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 6}])
def test_opened_multihead_attention_follows_every_option(options: dict) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **options).eval()
    opened = open_copy(layer)
    query, key, value = torch.randn(3, 4, 8), torch.randn(3, 5, options.get("kdim", 8)), torch.randn(3, 5, 8)
    padding = torch.arange(5) > torch.tensor([[2], [3], [4]])
    for masks in ({}, {"attn_mask": torch.randn(4, 5)}, {"attn_mask": torch.randn(6, 4, 5)}):
        for extra in ({"key_padding_mask": padding}, {"average_attn_weights": False}):
            expected = layer(query, key, value, **masks, **extra)
            torch.testing.assert_close(opened(query, key, value, **masks, **extra), expected)


@pytest.mark.parametrize("name", ["deit", "torchvision_vit", "timm_swin"])
def test_a_budget_is_shared_by_heads_and_widths_and_met(name: str) -> None:
    model, images = attention_network(name)
    graph = trace_groups(model, images)
    heads = {g.name: torch.arange(g.size).double() for g in graph.prunable if g.role == "heads"}
    widths = {
        g.producers[0]: torch.rand(graph.widths[g.producers[0], "out"]) for g in graph.prunable if g.role == "mid"
    }
    plan = make_plan(model, widths | heads, images, keep=0.6, allocation="uniform")
    assert heads.keys() <= plan.keep_channels.keys()
    for name in heads:
        kept, size = plan.keep_channels[name], plan.sizes[name]
        assert kept == tuple(range(size - len(kept), size))
    small = apply_plan(model, plan, images)
    costs = CostModel.build(model, graph, images)
    after, counted = costs.widths(plan.keep_channels), cost(small, images)
    assert costs.macs(after) == counted.macs
    assert costs.params(after) == counted.params


def test_what_mixes_heads_is_protected_with_its_reason() -> None:
    model, images = attention_network("by_hand")
    model.proj = nn.Sequential(nn.LayerNorm(12), model.proj)
    found = next(group for group in trace_groups(model, images).groups if group.role == "heads")
    assert "mixed" in found.protected
    with pytest.raises(InputError, match="protected .*mixed"):
        make_plan(model, {}, images, only=[found.name])


def test_a_forward_with_a_fixed_number_of_heads_is_protected() -> None:
    model, images = attention_network("by_hand")
    model.forward = lambda x, whole=model.forward: setattr(model, "n_heads", 3) or whole(x)
    found = next(group for group in trace_groups(model, images).groups if group.role == "heads")
    assert found.protected


def test_isomorphic_scores_take_the_same_share_of_heads_and_of_widths() -> None:
    model, images = attention_network("deit")
    groups = [group for group in trace_groups(model, images).prunable if group.role in ("heads", "mid")]
    assert len({group.kind for group in groups}) == 2
    scores = {g.name: torch.rand(g.size) for g in groups if g.role == "heads"}
    scores |= {g.producers[0]: 1e6 * torch.rand(g.size) for g in groups if g.role == "mid"}
    plan = make_plan(model, scores, images, "channels", 0.5, normalisation="isomorphic")
    for role in ("heads", "mid"):
        names = [group.name for group in groups if group.role == role]
        total = sum(group.size for group in groups if group.role == role)
        gone = sum(len(plan.removed(name)) for name in names)
        assert abs(gone / total - 0.5) <= 1 / total


class Summed(nn.Module):
    """Attention as products by name of the axes, in either order of heads and places."""

    def __init__(self, places_first: bool) -> None:
        super().__init__()
        self.h, self.places_first = 3, places_first
        self.patches, self.qkv = nn.Conv2d(3, 12, 8, 8), nn.Linear(12, 36)
        self.proj, self.head = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.h, -1)).unbind(2)
        if self.places_first:
            weights = torch.einsum("bihd,bjhd->bhij", q, k).div(2).softmax(-1)
            mixed = torch.einsum("bhij, bjhd -> bihd", weights, v)
        else:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            weights = torch.einsum("bhid,bhjd->bhij", [q, k]).div(2).softmax(-1)
            mixed = torch.einsum("bhjd,bhij->bhid", v, weights).transpose(1, 2)
        return self.head(self.proj(mixed.flatten(2)).mean(1))


@pytest.mark.parametrize("places_first", [True, False])
def test_heads_of_attention_by_einsum_go_and_leave_the_silenced_network(places_first: bool) -> None:
    torch.manual_seed(0)
    model, images = Summed(places_first).eval(), torch.randn(2, 3, 32, 32)
    graph = trace_groups(model, images)
    (heads,) = (group for group in graph.prunable if group.role == "heads")
    small = apply_plan(model, Plan((), {heads.name: (0, 2)}, {heads.name: 3}), images)
    assert small.h == 2 and small.qkv.out_features == 24
    silent = copy.deepcopy(model)
    with torch.no_grad():
        silent.proj.weight[:, 4:8] = 0
    check_equal_in_both_modes(small, silent, images)
