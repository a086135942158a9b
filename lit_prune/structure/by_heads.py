"""Tokens with an axis of heads, and without."""

from torch import Tensor


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
