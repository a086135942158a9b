"""The attention layers of timm's LeViT, MaxViT, CoAtNet and CaiT whose heads can go only with another forward."""

from typing import Any

import torch.nn.functional as F
from timm.layers import RelPosBias, RelPosMlp
from timm.models.cait import TalkingHeadAttn
from timm.models.levit import Attention as LevitAttention
from timm.models.levit import AttentionDownsample
from timm.models.maxxvit import Attention2d, AttentionCl
from torch import Tensor, nn

from lit_prune.structure.by_heads import OpenHeads, join_heads, split_heads, split_projection
from lit_prune.structure.opened import opens


class _OpenLevit(nn.Module):
    """Heads lie one after the other, in each its queries, keys and values; a table of biases that is never kept."""

    @staticmethod
    def opened_attributes(module: nn.Module) -> dict[str, Any]:
        """What changes when a layer is opened: it states the widths of a head, and keeps no biases of all heads."""
        return {"head_dim": module.key_dim, "value_dim": module.val_dim, "attention_bias_cache": {}}

    def _parts(self, values: Tensor, *widths: int) -> tuple[Tensor, ...]:
        """Tokens [B, L, heads · Σ widths], or maps of so many channels, to [B, heads, L, width] of each width."""
        if not self.use_conv:
            return split_heads(values, self.num_heads).split(widths, -1)
        # not transposed first: torch gives a BatchNorm wrong gradients for one image whose gradient is channels last
        parts = values.flatten(2).unflatten(1, (self.num_heads, -1)).split(widths, 2)
        return tuple(part.transpose(-2, -1) for part in parts)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, L, heads · value_dim]."""
        bias = self.attention_biases[:, self.attention_bias_idxs]
        return join_heads(F.scaled_dot_product_attention(q, k, v, bias, scale=self.scale))


@opens(LevitAttention)
class OpenLevitAttention(_OpenLevit, LevitAttention):
    """LeViT's attention with `num_heads` heads of width `head_dim`, values of width `value_dim`."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, L, C] to tokens, or maps [B, C, H, W] to maps."""
        y = self._attend(*self._parts(self.qkv(x), self.head_dim, self.head_dim, self.value_dim))
        return self.proj(y.transpose(1, 2).unflatten(2, x.shape[2:]) if self.use_conv else y)


@opens(AttentionDownsample)
class OpenAttentionDownsample(_OpenLevit, AttentionDownsample):
    """LeViT's attention between stages: queries at fewer places."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, L, C] to fewer tokens, or maps [B, C, H, W] to smaller maps."""
        queries = self.q(x)
        y = self._attend(*self._parts(queries, self.head_dim), *self._parts(self.kv(x), self.head_dim, self.value_dim))
        return self.proj(y.transpose(1, 2).unflatten(2, queries.shape[2:]) if self.use_conv else y)


class _OpenMaxxvit(OpenHeads):
    """Heads one after the other with their queries, keys and values in each, or queries, keys and values of all."""

    @staticmethod
    def opened_attributes(module: nn.Module) -> dict[str, int]:
        """What changes when a layer is opened: it states the widths of a head."""
        return {"head_dim": module.dim_head, "value_dim": module.dim_head}

    def _attended(self, tokens: Tensor, shared: Tensor | None) -> Tensor:
        """What was projected from tokens, [B, L, C], to [B, L, heads · value_dim]."""
        if self.head_first:
            widths = [self.head_dim, self.head_dim, self.value_dim]
            q, k, v = split_heads(tokens, self.num_heads).split(widths, -1)
        else:
            parts = split_projection(tokens, self.proj.weight.shape[1])
            q, k, v = (split_heads(part, self.num_heads) for part in parts)
        return self.attend(q, k, v, shared if self.rel_pos is None else self.rel_pos.get_bias())


def _nothing(module: nn.Module) -> dict[str, Any]:
    """What changes when a table is opened."""
    return {}


@opens(RelPosBias)
class OpenRelPosBias(RelPosBias):
    """A table of biases of any number of heads."""

    opened_attributes = staticmethod(_nothing)

    def get_bias(self) -> Tensor:
        """[1, heads, L, L]."""
        places = self.relative_position_index.view(self.bias_shape[:2])
        return self.relative_position_bias_table[places].permute(2, 0, 1)[None]


@opens(RelPosMlp)
class OpenRelPosMlp(RelPosMlp):
    """Biases of any number of heads that a network computes from positions."""

    opened_attributes = staticmethod(_nothing)

    def get_bias(self) -> Tensor:
        """[1, heads, L, L]."""
        bias = self.mlp(self.rel_coords_log)
        if self.relative_position_index is not None:
            bias = bias.flatten(0, -2)[self.relative_position_index.view(self.bias_shape[:2])]
        bias = self.bias_act(bias.permute(2, 0, 1))
        bias = bias if self.bias_gain is None else self.bias_gain * bias
        return F.pad(bias, [self.prefix_tokens, 0] * 2)[None]


@opens(AttentionCl)
class OpenAttentionCl(_OpenMaxxvit, AttentionCl):
    """MaxViT's attention with `num_heads` heads of width `head_dim`, values of width `value_dim`."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """[B, ..., C] to [B, ..., C]."""
        y = self._attended(self.qkv(x).flatten(1, -2), shared_rel_pos)
        return self.proj_drop(self.proj(y.unflatten(1, x.shape[1:-1])))


@opens(Attention2d)
class OpenAttention2d(_OpenMaxxvit, Attention2d):
    """The same over maps."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """[B, C, H, W] to [B, C, H, W]."""
        y = self._attended(self.qkv(x).flatten(2).transpose(1, 2), shared_rel_pos)
        return self.proj_drop(self.proj(y.transpose(1, 2).unflatten(2, x.shape[2:])))


@opens(TalkingHeadAttn)
class OpenTalkingHeads(TalkingHeadAttn):
    """CaiT's talking heads: `num_heads` maps of weights, which two layers mix, for `value_heads` heads of values.

    Only the latter can go: each map of the former is read by all heads.
    """

    @staticmethod
    def opened_attributes(module: TalkingHeadAttn) -> dict[str, int]:
        """What changes when a layer is opened: it states the heads of the values and the widths of a head."""
        width = module.proj.in_features // module.num_heads
        return {"value_heads": module.num_heads, "head_dim": width, "value_dim": width}

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, L, C] to tokens of the same shape."""
        q, k, v = split_projection(self.qkv(x), self.proj.in_features)
        q, k = (split_heads(values, self.num_heads) for values in (q, k))
        maps = (q * self.scale) @ k.transpose(-2, -1)  # [B, maps, L, L]
        maps = self.proj_l(maps.movedim(1, -1)).movedim(-1, 1).softmax(-1)
        maps = self.attn_drop(self.proj_w(maps.movedim(1, -1)).movedim(-1, 1))  # [B, value_heads, L, L]
        return self.proj_drop(self.proj(join_heads(maps @ split_heads(v, self.value_heads))))
