"""The attention layers of torch whose heads can go only with another forward, see `opened`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_prune.structure.by_heads import join_heads, split_heads, split_projection
from lit_prune.structure.opened import opens


@opens(nn.MultiheadAttention)
class OpenMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with `num_heads` heads of any width, whatever `embed_dim` is.

    `head_dim` is the width of queries and keys, `value_dim` that of values; `scale` stays when they shrink.
    """

    @staticmethod
    def opened_attributes(module: nn.MultiheadAttention) -> dict[str, int | float | bool]:
        """What changes when a layer is opened; the flag keeps torch's fused encoder layer away, which asks for it."""
        width = module.head_dim
        return {"head_dim": width, "value_dim": width, "scale": width**-0.5, "_qkv_same_embed_dim": False}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        batched = query.dim() == 3
        inputs = [values if batched else values[None] for values in (query, key, value)]
        if batched and not self.batch_first:
            inputs = [values.transpose(0, 1) for values in inputs]
        q, k, v = self._project(inputs, query is key and key is value)
        mask = self._mask(key_padding_mask, attn_mask, q, k)
        q, k, v = (split_heads(values, self.num_heads) for values in (q, k, v))
        k, v, mask = self._with_zeros(k, v, mask)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            weights = (q * self.scale) @ k.transpose(-2, -1)
            weights = F.softmax(weights if mask is None else weights + mask, -1)
            weights = F.dropout(weights, dropout) if dropout else weights
            output = weights @ v
        else:
            weights = None
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        output = self.out_proj(join_heads(output))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        if not batched:
            return output[0], weights
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _project(self, inputs: list[Tensor], same: bool) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, heads · width] of queries, keys and values, the learned extra key and value included."""
        inner = self.out_proj.in_features
        biases = (None,) * 3 if self.in_proj_bias is None else split_projection(self.in_proj_bias, inner)
        if same and self.in_proj_weight is not None:
            q, k, v = split_projection(F.linear(inputs[0], self.in_proj_weight, self.in_proj_bias), inner)
        elif self.in_proj_weight is not None:
            q, k, v = map(F.linear, inputs, split_projection(self.in_proj_weight, inner, 0), biases)
        else:
            q, k, v = map(F.linear, inputs, (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight), biases)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], 1)
        return q, k, v

    def _mask(self, padding: Tensor | None, mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one that is added to the products, broadcastable to [B, heads, L, S]; None for neither."""
        total = None
        if mask is not None:
            mask = _additive(mask, q)
            total = mask if mask.dim() == 2 else mask.unflatten(0, (len(q), -1))
        if padding is not None:
            padding = _additive(padding if padding.dim() == 2 else padding[None], q)[:, None, None]
            total = padding if total is None else total + padding
        if total is not None and self.bias_k is not None:
            total = F.pad(total, (0, 1))
        return total

    def _with_zeros(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """With one more key and value of zeros where the layer asks for it."""
        if not self.add_zero_attn:
            return k, v, mask
        k, v = (F.pad(values, (0, 0, 0, 1)) for values in (k, v))
        return k, v, None if mask is None else F.pad(mask, (0, 1))


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of True where nothing may be read as one of -inf."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
