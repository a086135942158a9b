"""The attention layers of timm whose heads can go only with another forward, see `opened`."""

from typing import Any

import torch
from timm.layers import Attention, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.cait import ClassAttn
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor
from torch.func import functional_call

from lit_prune.structure.by_heads import OpenHeads, split_heads
from lit_prune.structure.opened import opens


class _OpenTokens(OpenHeads):
    """Projections of tokens, fused or not, with their separate biases."""

    k_bias: Any

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values [B, heads, L, head_dim]; the keys' bias is zero in these classes."""
        if self.qkv is None:
            return tuple(split_heads(layer(x), self.num_heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_bias is None:
            return self.parts(self.qkv(x))
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return self.parts(functional_call(self.qkv, {"bias": bias}, x))

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
        q, k, v = self._project(x)
        output = self.attend(q, k, v, sum(biases[1:], biases[0]) if biases else None)
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
        output = self.norm(self.attend(q, k, v, attn_mask, is_causal))
        if self.gate is not None:
            output = output * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(output))

    def _rotated(self, values: Tensor, rope: Tensor) -> Tensor:
        prefix, rest = values.tensor_split([self.num_prefix_tokens], 2)
        return torch.cat([prefix, apply_rot_embed_cat(rest, rope, half=self.rotate_half)], 2)


@opens(Attention)
class OpenAttention(OpenHeads, Attention):
    """timm's attention with heads of any width; the scale stays that of the dense one."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens [B, L, C] to tokens of the same shape."""
        q, k, v = self.parts(self.qkv(x))
        output = self.norm(self.attend(self.q_norm(q), self.k_norm(k), v, attn_mask, is_causal))
        output = output if self.gate is None else output * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(output))


@opens(WindowAttention)
class OpenWindowAttention(OpenHeads, WindowAttention):
    """timm's attention of Swin with heads of any width."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Windows [B · windows, L, C] to windows of the same shape; mask [windows, L, L]."""
        bias = self._get_rel_pos_bias()
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
        q, k, v = self.parts(self.qkv(x))
        return self.proj_drop(self.proj(self.attend(q, k, v, bias)))


@opens(ClassAttn)
class OpenClassAttention(OpenHeads, ClassAttn):
    """timm's attention of the class token alone (CaiT, XCiT), with heads of any width."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, L, C] to the class token [B, 1, C]."""
        parts = (self.q(x[:, :1]), self.k(x), self.v(x))
        q, k, v = (split_heads(part, self.num_heads) for part in parts)
        return self.proj_drop(self.proj(self.attend(q, k, v)))
