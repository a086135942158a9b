"""Attention that people have copied into their code: heads go although its forward reads their width off the input."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lit_prune
from lit_prune.structure import Plan, apply_plan, load_compact, save_compact, trace_groups
from lit_prune.structure.example import as_example
from lit_prune.structure.opened import opened
from lit_prune.structure.record import describe_inputs


class Fused(nn.Module):
    """DeiT's, MAE's; DINO's gives its weights too."""

    def __init__(self, with_weights: bool = False, scale: float = 0.5) -> None:
        super().__init__()
        self.num_heads, self.scale, self.with_weights = 3, scale, with_weights
        self.qkv, self.attn_drop = nn.Linear(12, 36), nn.Dropout(0.2)
        self.proj, self.proj_drop = nn.Linear(12, 12), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop(((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1))
        x = self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(B, N, C)))
        return (x, weights) if self.with_weights else x


class Causal(nn.Module):
    """nanoGPT's."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.n_head, self.n_embd = nn.Linear(12, 36), nn.Linear(12, 12), 3, 12

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        parts = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class Separate(nn.Module):
    """minGPT's layers in their order, vit-pytorch's output; an inner width of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim_head = 3, 5
        self.key, self.query, self.value = (nn.Linear(12, 15) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(15, 12), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        k, q, v = (
            layer(x).view(B, N, self.heads, self.dim_head).transpose(1, 2)
            for layer in (self.key, self.query, self.value)
        )
        weights = (q @ k.transpose(-2, -1) / self.dim_head**0.5).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).reshape(B, N, self.heads * self.dim_head))


class Network(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.attention, self.head = (
            nn.Linear(5, 12),
            nn.LayerNorm(12),
            attention,
            nn.Linear(12, 3),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        mixed = self.attention(self.norm(x))
        return self.head((x + (mixed[0] if isinstance(mixed, tuple) else mixed)).mean(1))


TOKENS = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1))
KINDS = {
    "fused": (Fused, "proj", 4),
    "with weights": (lambda: Fused(True), "proj", 4),
    "causal": (Causal, "c_proj", 4),
    "separate": (Separate, "to_out.0", 5),
}


def without(model: nn.Module, kept: tuple[int, ...]) -> nn.Module:
    (heads,) = (group for group in trace_groups(model, TOKENS).prunable if group.role == "heads")
    return apply_plan(model, Plan((), {heads.name: kept}, {heads.name: 3}), TOKENS)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_go_and_leave_the_network_with_these_heads_silenced_in_both_modes(kind):
    make, reader, width = KINDS[kind]
    torch.manual_seed(0)
    model = Network(make()).eval()
    small, silent = without(model, (0, 2)), copy.deepcopy(model)
    with torch.no_grad():
        silent.attention.get_submodule(reader).weight[:, width : 2 * width] = 0
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(small(TOKENS), silent(TOKENS))
    for net in (model, small, silent):
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # drawn for fewer heads
    torch.testing.assert_close(small.train()(TOKENS), silent.train()(TOKENS))
    assert type(model.attention) is type(make())


@pytest.mark.parametrize("kind", KINDS)
def test_the_opened_layer_draws_its_dropouts_as_the_layer_itself_and_is_closed_again(kind):
    torch.manual_seed(0)
    model = Network(KINDS[kind][0]()).train()
    before = dict(vars(model.attention))

    def answer() -> Tensor:
        torch.manual_seed(2)
        return model(TOKENS)

    own = answer()
    with opened(model):
        assert type(model.attention) is not type(KINDS[kind][0]())
        torch.testing.assert_close(answer(), own)
    assert type(model.attention) is type(KINDS[kind][0]()) and vars(model.attention).keys() == before.keys()


class Interleaved(Fused):
    """Heads before queries, keys and values in the projection: another layout, not to be taken for the usual one."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, self.num_heads, 3, C // self.num_heads).permute(3, 0, 2, 1, 4)
        return self.proj((((q @ k.transpose(-2, -1)) * self.scale).softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


class Sharpened(Fused):
    """The usual layers, and one step of one's own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.01


@pytest.mark.parametrize("kind", [Interleaved, Sharpened])
def test_a_layer_that_gives_anything_else_is_left_alone_and_its_heads_are_protected(kind):
    torch.manual_seed(0)
    model = Network(kind()).eval()
    with opened(model):
        assert type(model.attention) is kind
    heads = [group for group in trace_groups(model, TOKENS).groups if group.role == "heads"]
    assert heads and all("does not run without a part of it" in group.protected for group in heads)


def test_the_compact_network_is_pickled_saved_and_opened_with_the_module_of_the_user(tmp_path):
    torch.manual_seed(0)
    model = Network(Fused()).eval()
    tokens = [torch.randn(64, 6, 5) for _ in range(4)]
    small, report = lit_prune.compress(model, tokens, keep=0.7, recipe=lit_prune.Recipe(only="heads"))
    assert report["compact"]["macs"] < report["dense"]["macs"]
    torch.testing.assert_close(pickle.loads(pickle.dumps(small))(TOKENS), small(TOKENS))
    plans, inputs = [Plan.from_dict(report["plan"])], describe_inputs(as_example(TOKENS))
    save_compact(tmp_path / "compact", small, plans=plans, inputs=inputs)
    torch.testing.assert_close(load_compact(tmp_path / "compact", model=Network(Fused()))(TOKENS), small(TOKENS))
