"""The attention layers of torchvision whose heads can go only with another forward, see `opened`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from lit_prune.structure.by_heads import join_heads, split_heads, split_projection
from lit_prune.structure.opened import opens


class _OpenWindows(nn.Module):
    """Forward of torchvision's shifted window attention, with heads of width `head_dim`."""

    @staticmethod
    def opened_attributes(module: ShiftedWindowAttention) -> dict[str, int | float]:
        """What changes when a layer is opened: it states the widths of a head, and a scale that stays."""
        width = module.proj.in_features // module.num_heads
        return {"head_dim": width, "value_dim": width, "scale": width**-0.5}

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
        parts = split_projection(self._project(x), self.proj.in_features)
        q, k, v = (split_heads(part, self.num_heads) for part in parts)
        scores = self._scores(q, k) + self.get_relative_position_bias()
        if mask is not None:
            scores = (scores.unflatten(0, (batch, -1)) + mask).flatten(0, 1)
        weights = F.dropout(F.softmax(scores, -1), self.attention_dropout, self.training)
        return join_heads(weights @ v)

    def _project(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * self.scale) @ k.transpose(-2, -1)


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
        q, k, v = split_projection(bias, self.proj.in_features)
        return functional_call(self.qkv, {"bias": torch.cat([q, torch.zeros_like(k), v])}, x)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return cosines * self.logit_scale.clamp(max=4.605170185988092).exp()  # log 100


@opens(RelativePositionalMultiHeadAttention)
class OpenRelativeAttention(RelativePositionalMultiHeadAttention):
    """Attention of torchvision's MaxViT with `n_heads` heads of width `head_dim`."""

    @staticmethod
    def opened_attributes(module: RelativePositionalMultiHeadAttention) -> dict[str, int]:
        """What changes when a layer is opened: it states the width of a head's values."""
        return {"value_dim": module.head_dim}

    def forward(self, x: Tensor) -> Tensor:
        """Windows [B, windows, P, C] to windows of the same shape."""
        parts = split_projection(self.to_qkv(x.flatten(0, 1)), self.merge.in_features)
        q, k, v = (split_heads(part, self.n_heads) for part in parts)
        bias = self.get_relative_positional_bias()
        y = join_heads(F.scaled_dot_product_attention(q, k, v, bias, scale=self.scale_factor))
        return self.merge(y).unflatten(0, x.shape[:2])


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
