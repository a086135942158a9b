"""The attention layers of torch, torchvision and timm whose heads can go only with another forward, see `opened`."""

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from lit_prune.structure.opened import opens


def split_heads(values: Tensor, heads: int) -> Tensor:
    """[B, L, heads · d] to [B, heads, L, d]."""
    return values.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(values: Tensor) -> Tensor:
    """[B, heads, L, d] to [B, L, heads · d]."""
    return values.transpose(1, 2).flatten(2)


@opens(nn.MultiheadAttention)
class OpenMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with `num_heads` heads of width `head_dim`, whatever `embed_dim` is."""

    @staticmethod
    def opened_attributes(module: nn.MultiheadAttention) -> dict[str, int | bool]:
        """What changes when a layer is opened; the flag keeps torch's fused encoder layer away, which asks for it."""
        return {"head_dim": module.head_dim, "_qkv_same_embed_dim": False}

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
            weights = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.softmax(weights if mask is None else weights + mask, -1)
            weights = F.dropout(weights, dropout) if dropout else weights
            output = weights @ v
        else:
            weights = None
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(join_heads(output))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        if not batched:
            return output[0], weights
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _project(self, inputs: list[Tensor], same: bool) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, heads · head_dim] of queries, keys and values, the learned extra key and value included."""
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if same and self.in_proj_weight is not None:
            q, k, v = F.linear(inputs[0], self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        elif self.in_proj_weight is not None:
            q, k, v = map(F.linear, inputs, self.in_proj_weight.chunk(3), biases)
        else:
            q, k, v = map(F.linear, inputs, (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight), biases)
        if self.bias_k is not None:
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


class _OpenWindows:
    """Forward of torchvision's shifted window attention, with heads of width `head_dim`."""

    @staticmethod
    def opened_attributes(module: ShiftedWindowAttention) -> dict[str, int]:
        """What changes when a layer is opened: it states the width of a head."""
        return {"head_dim": module.qkv.out_features // (3 * module.num_heads)}

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, H, W, C] to maps of the same shape."""
        height, width = x.shape[1:3]
        wide, high = self.window_size[1], self.window_size[0]
        x = F.pad(x, (0, 0, 0, -width % wide, 0, -height % high))
        whole = (high >= x.shape[1], wide >= x.shape[2])  # one window covers the image: nothing to shift
        shift = [0 if one else s for one, s in zip(whole, self.shift_size, strict=True)]
        x = x.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else x
        windows = _into_windows(x, high, wide)  # [B, n, P, C]
        mask = _window_mask(x, high, wide, shift) if any(shift) else None  # [n, 1, P, P]
        y = self._attend(windows.flatten(0, 1), mask, len(windows))
        y = F.dropout(self.proj(y), self.dropout, self.training)
        y = _out_of_windows(y, x.shape, high, wide)
        y = y.roll(shift, (1, 2)) if any(shift) else y
        return y[:, :height, :width].contiguous()

    def _attend(self, x: Tensor, mask: Tensor | None, batch: int) -> Tensor:
        """Windows [B · n, P, C] to the joined heads [B · n, P, heads · head_dim]."""
        q, k, v = (split_heads(part, self.num_heads) for part in self._project(x).chunk(3, -1))
        scores = self._scores(q, k) + self.get_relative_position_bias()
        if mask is not None:
            scores = (scores.unflatten(0, (batch, -1)) + mask).flatten(0, 1)
        weights = F.dropout(F.softmax(scores, -1), self.attention_dropout, self.training)
        return join_heads(weights @ v)

    def _project(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * self.head_dim**-0.5) @ k.transpose(-2, -1)


@opens(ShiftedWindowAttention)
class OpenShiftedWindowAttention(_OpenWindows, ShiftedWindowAttention):
    """`ShiftedWindowAttention` with `num_heads` heads of width `head_dim`."""


@opens(ShiftedWindowAttentionV2)
class OpenShiftedWindowAttentionV2(_OpenWindows, ShiftedWindowAttentionV2):
    """`ShiftedWindowAttentionV2` (cosine attention, no bias of the keys) with `num_heads` heads of width `head_dim`."""

    def _project(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias
        if bias is None:
            return self.qkv(x)
        q, k, v = bias.chunk(3)
        return F.linear(x, self.qkv.weight, torch.cat([q, torch.zeros_like(k), v]))

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return cosines * self.logit_scale.clamp(max=4.605170185988092).exp()  # log 100


def _into_windows(x: Tensor, high: int, wide: int) -> Tensor:
    """[B, H, W, C] to [B, windows, positions, C]."""
    x = x.unflatten(2, (-1, wide)).unflatten(1, (-1, high))  # [B, h, high, w, wide, C]
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _out_of_windows(y: Tensor, shape: torch.Size, high: int, wide: int) -> Tensor:
    """[B · windows, positions, C] to [B, H, W, C] with B, H, W of `shape`."""
    y = y.reshape(shape[0], shape[1] // high, shape[2] // wide, high, wide, y.shape[-1])
    return y.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _window_mask(x: Tensor, high: int, wide: int, shift: list[int]) -> Tensor:
    """-100 between positions of a window that are no neighbours in the image, [windows, 1, P, P]."""
    part = x.new_zeros(x.shape[1:3])
    for row, rows in enumerate((slice(0, -high), slice(-high, -shift[0] or None), slice(-shift[0] or None, None))):
        for column, columns in enumerate((slice(0, -wide), slice(-wide, -shift[1] or None), slice(-shift[1], None))):
            part[rows, columns] = 3 * row + column
    part = _into_windows(part[None, :, :, None], high, wide)[0, :, :, 0]  # [n, P]
    return torch.where(part[:, None, :] != part[:, :, None], -100.0, 0.0).to(x.dtype)[:, None]


class _OpenTokens:
    """What the open attentions of timm share: the projections of tokens, fused or not, with their separate biases."""

    @staticmethod
    def opened_attributes(module: nn.Module) -> dict[str, int]:
        """What changes when a layer is opened: it states the width of a head."""
        return {"head_dim": module.proj.in_features // module.num_heads}

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values [B, heads, L, head_dim]; the keys' bias is zero in these classes."""
        if self.qkv is None:
            parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        elif self.q_bias is None:
            parts = self.qkv(x).chunk(3, -1)
        else:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            parts = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        return tuple(split_heads(part, self.num_heads) for part in parts)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool = False) -> Tensor:
        dropout = self.attn_drop.p if self.training else 0.0
        return join_heads(F.scaled_dot_product_attention(q, k, v, bias, dropout, causal, scale=self.scale))

    def init_non_persistent_buffers(self) -> None:
        """Sets what no file holds."""
        if self.k_bias is not None:
            self.k_bias = torch.zeros_like(self.q_bias)


@opens(BeitAttention)
class OpenBeitAttention(_OpenTokens, BeitAttention):
    """timm's BEiT attention with `num_heads` heads of width `head_dim`."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Tokens [B, L, C] to tokens of the same shape."""
        biases = [] if self.relative_position_bias_table is None else [self._get_rel_pos_bias()]
        biases += [] if shared_rel_pos_bias is None else [shared_rel_pos_bias]
        output = self._attend(*self._project(x), sum(biases[1:], biases[0]) if biases else None)
        return self.proj_drop(self.proj(output))


@opens(EvaAttention)
class OpenEvaAttention(_OpenTokens, EvaAttention):
    """timm's EVA attention with `num_heads` heads of width `head_dim`."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens [B, L, C] to tokens of the same shape."""
        q, k, v = self._project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (self._rotated(values, rope).type_as(v) for values in (q, k))
        output = self.norm(self._attend(q, k, v, attn_mask, is_causal))
        if self.gate is not None:
            output = output * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(output))

    def _rotated(self, values: Tensor, rope: Tensor) -> Tensor:
        prefix, rest = values.tensor_split([self.num_prefix_tokens], 2)
        return torch.cat([prefix, apply_rot_embed_cat(rest, rope, half=self.rotate_half)], 2)
