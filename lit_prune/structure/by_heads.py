"""Tokens with an axis of heads, and without; what attentions share whose heads are of any width."""

import torch.nn.functional as F
from torch import Tensor, nn


def split_heads(values: Tensor, heads: int) -> Tensor:
    """[B, L, heads · d] to [B, heads, L, d]."""
    return values.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(values: Tensor) -> Tensor:
    """[B, heads, L, d] to [B, L, heads · d]."""
    return values.transpose(1, 2).flatten(2)


def split_projection(values: Tensor, inner: int, dim: int = -1) -> tuple[Tensor, ...]:
    """Queries, keys and values of a fused projection: the values of all heads are `inner` wide, the others share."""
    rest = (values.shape[dim] - inner) // 2
    return values.split([rest, rest, inner], dim)


class OpenHeads(nn.Module):
    """Beside an attention of timm: its heads have the widths that it states, whatever its input is wide."""

    @staticmethod
    def opened_attributes(module: nn.Module) -> dict[str, int]:
        """What changes when a layer is opened: it states the widths of a head."""
        return dict.fromkeys(("head_dim", "value_dim"), module.proj.in_features // module.num_heads)

    def parts(self, fused: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values [B, heads, L, width] of what one projection gives for all, [B, L, ...]."""
        return tuple(split_heads(part, self.num_heads) for part in split_projection(fused, self.proj.in_features))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False) -> Tensor:
        """The joined heads, [B, L, heads · value_dim]."""
        dropout = self.attn_drop.p if self.training else 0.0
        return join_heads(F.scaled_dot_product_attention(q, k, v, bias, dropout, causal, scale=self.scale))
