"""Operations whose rows are regions of maps, as in a detector's second stage, and what they do to labels."""

import torch
from torch import Tensor

from lit_prune.structure import reasons
from lit_prune.structure.labelled import LabelledTensors
from lit_prune.structure.labels import NOBODY, varies


def follow_regions(labelled: LabelledTensors, args: tuple, output: Tensor) -> None:
    """Regions of maps [B, C, H, W], one a row of the boxes [K, ...], are pooled: [K, C, h, w]."""
    boxes = labelled.of(args[1])
    if boxes is not None:
        labelled.labels.keep([boxes], reasons.operation("boxes of a pooling"))
    maps = labelled.shadow(args[0])
    one = maps[:1, :, :1, :1]
    labelled.labels.tie(one.expand(maps.shape), maps)
    labelled.put(output, one.expand(output.shape))


def follow_written(labelled: LabelledTensors, args: tuple, output: Tensor) -> None:
    """Rows are written over others of the same channels."""
    rows, values = labelled.shadow(args[0]), labelled.shadow(args[2])
    along_first = len(args[1]) == 1 and values.dim() == rows.dim()
    if not along_first or varies(rows, 0) or varies(values, 0):
        labelled.labels.keep([rows, values], reasons.operation("index_put"))
        labelled.put(output, labelled.fixed[2].expand(output.shape))
        return
    written = values[:1].expand(output.shape) if len(values) else rows
    labelled.labels.tie(rows, written)
    labelled.put(output, torch.where(rows == NOBODY, written, rows))
