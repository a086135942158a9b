"""The attention layers of timm's pyramids (PVT v2, Twins, Swin v2) whose heads can go only with another forward."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models.pvt_v2 import Attention as PyramidAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from torch import Tensor
from torch.func import functional_call

from lit_prune.structure.by_heads import OpenHeads, join_heads, split_heads
from lit_prune.structure.opened import opens


class _OpenReduced(OpenHeads):
    """Queries of all tokens, keys and values of fewer: `num_heads` heads of width `head_dim`."""

    def attended(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Tokens [B, L, C] of a map of `size` to tokens of the same shape."""
        q = split_heads(self.q(x), self.num_heads)
        parts = self.kv(self._reduced(x, size)).split([self.q.out_features, self.proj.in_features], -1)
        k, v = (split_heads(part, self.num_heads) for part in parts)
        return self.proj_drop(self.proj(self.attend(q, k, v)))

    def _reduced(self, x: Tensor, size: Sequence[int]) -> Tensor:
        if self.sr is None:
            return x
        maps = x.transpose(1, 2).unflatten(2, tuple(size))
        pool, act = getattr(self, "pool", None), getattr(self, "act", None)
        maps = self.sr(maps if pool is None else pool(maps))
        tokens = self.norm(maps.flatten(2).transpose(1, 2))
        return tokens if act is None else act(tokens)


@opens(PyramidAttention)
class OpenPyramidAttention(_OpenReduced, PyramidAttention):
    """timm's PVT v2 attention."""

    def forward(self, x: Tensor, feat_size: Sequence[int]) -> Tensor:
        """See `attended`."""
        return self.attended(x, feat_size)


@opens(GlobalSubSampleAttn)
class OpenGlobalSubSampleAttn(_OpenReduced, GlobalSubSampleAttn):
    """timm's global attention of Twins."""

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """See `attended`."""
        return self.attended(x, size)


@opens(LocallyGroupedAttn)
class OpenLocallyGroupedAttn(OpenHeads, LocallyGroupedAttn):
    """timm's attention of Twins within windows, with `num_heads` heads of width `head_dim`."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [B, L, C] of a map of `size` to tokens of the same shape."""
        maps = x.unflatten(1, tuple(size))
        maps = F.pad(maps, (0, 0, 0, -size[1] % self.ws, 0, -size[0] % self.ws))
        rows, columns = (side // self.ws for side in maps.shape[1:3])
        windows = maps.unflatten(2, (columns, self.ws)).unflatten(1, (rows, self.ws)).transpose(2, 3)
        windows = windows.flatten(3, 4).flatten(0, 2)  # [B · windows, places, C]
        q, k, v = self.parts(self.qkv(windows))
        output = self.attend(q, k, v)
        output = output.unflatten(0, (-1, rows, columns)).unflatten(3, (self.ws, self.ws)).transpose(2, 3)
        output = output.flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]
        return self.proj_drop(self.proj(output.flatten(1, 2)))


@opens(WindowAttentionV2)
class OpenWindowAttentionV2(OpenHeads, WindowAttentionV2):
    """timm's attention of Swin v2 (cosines), with `num_heads` heads of width `head_dim`."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Windows [B · windows, L, C] to windows of the same shape; mask [windows, L, L]."""
        q, k, v = self.parts(self._project(x))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * self.logit_scale.clamp(max=math.log(100.0)).exp() + self._bias(q.shape[2])
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        return self.proj_drop(self.proj(join_heads(self.attn_drop(self.softmax(scores)) @ v)))

    def _project(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return self.qkv(x)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return self.qkv(x) + bias if self.qkv_bias_separate else functional_call(self.qkv, {"bias": bias}, x)

    def _bias(self, places: int) -> Tensor:
        """[heads, L, L]."""
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)  # [positions, heads]
        found = table[self.relative_position_index.flatten()].unflatten(0, (places, places))
        return 16 * found.permute(2, 0, 1).sigmoid()

    def init_non_persistent_buffers(self) -> None:
        """Sets what no file holds."""
        if self.k_bias is not None:
            self.k_bias = torch.zeros_like(self.q_bias)
        self._init_buffers()
