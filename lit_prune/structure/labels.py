"""Labels that stand for channels, and what the network says about them: these belong together, these must stay."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

NOBODY = 0
"""Label of values that belong to no channel: constants, scalars, statistics over all of them."""
FIXED = 3
"""Labels 1 to 3 stand for what cannot go (the network's input, zeros of a padding, what is not followed): what meets
them stays, but does not belong together for it."""


@dataclass
class Labels:
    """Numbered labels; each axis that may be cut has one a position.

    A tensor's labels are a float64 tensor of its shape (exact whole numbers, and every operation that only moves values
    moves them), expanded without memory along dimensions where they do not change.
    """

    axes: dict[tuple[str, str], int] = field(default_factory=dict)  # (name, axis) -> first label
    widths: dict[tuple[str, str], int] = field(default_factory=dict)
    count: int = 1
    pairs: list[np.ndarray] = field(default_factory=list)  # int64 [n, 2]: labels that go together
    reasons: dict[int, str] = field(default_factory=dict)  # label -> why it must stay, the first one heard
    joined: list[np.ndarray] = field(default_factory=list)  # labels that an addition joins

    def axis(self, name: str, axis: str, width: int) -> Tensor:
        """Labels of the positions of one axis, [width]; the same ones whenever they are asked for."""
        key = (name, axis)
        if key not in self.axes:
            self.axes[key], self.widths[key] = self.count, width
            self.count += width
        return torch.arange(self.axes[key], self.axes[key] + width, dtype=torch.float64)

    def tie(self, one: Tensor, other: Tensor) -> bool:
        """Says that labels at the same places (after broadcasting) go together; whether any two differ."""
        left, right = (compact(values) for values in torch.broadcast_tensors(one, other))
        left, right = (values.reshape(-1) for values in torch.broadcast_tensors(left, right))
        differ = (left != right) & (left != NOBODY) & (right != NOBODY)
        if not bool(differ.any()):
            return False
        pairs = torch.stack([left[differ], right[differ]], 1).long().numpy()
        lower, higher = np.minimum(*pairs.T), np.maximum(*pairs.T)
        for fixed in range(1, FIXED + 1):
            held = higher[lower == fixed]
            for label in self._occurring(held) if len(held) else ():
                self.reasons.setdefault(label, self.reasons[fixed])
        self.pairs.append(pairs[lower > FIXED])
        return True

    def keep(self, values: Iterable[Tensor], reason: str) -> None:
        """Says that channels with these labels must stay."""
        for labels in values:
            for label in self._among(labels):
                if label != NOBODY:
                    self.reasons.setdefault(label, reason)

    def join(self, values: Iterable[Tensor]) -> None:
        """Says that an addition joins channels with these labels."""
        self.joined += [self._among(labels) for labels in values]

    def _among(self, values: Tensor) -> np.ndarray:
        """The labels that occur, int64, ascending."""
        return self._occurring(compact(values).flatten().long().numpy())

    def _occurring(self, labels: np.ndarray) -> np.ndarray:
        """The labels of a list, int64, each once, ascending."""
        occurs = np.zeros(self.count, dtype=bool)
        occurs[labels] = True
        return np.flatnonzero(occurs)

    def components(self) -> np.ndarray:
        """Number of the set of labels that go together, for each label."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        pairs = np.concatenate(self.pairs) if self.pairs else np.zeros((0, 2), dtype=np.int64)
        graph = coo_matrix((np.ones(len(pairs), dtype=np.int8), (pairs[:, 0], pairs[:, 1])), shape=(self.count,) * 2)
        return connected_components(graph, directed=False)[1]


def compact(values: Tensor) -> Tensor:
    """The same labels with size 1 along dimensions that hold no memory."""
    for dim, stride in enumerate(values.stride()):
        if stride == 0 and values.shape[dim] > 1:
            values = values.narrow(dim, 0, 1)
    return values


def condensed(values: Tensor) -> Tensor:
    """The same labels without memory along dimensions where they do not change."""
    shape = values.shape
    for dim in range(values.dim()):
        if not varies(values, dim):
            values = values.narrow(dim, 0, min(shape[dim], 1))
    return values.expand(shape)


def varies(values: Tensor, dim: int) -> bool:
    """Whether labels change along a dimension."""
    if values.dim() == 0 or values.shape[dim] < 2 or values.stride(dim) == 0:
        return False
    values = compact(values)
    return values.shape[dim] > 1 and bool((values != values.narrow(dim, 0, 1)).any())


def detail(values: Tensor) -> tuple[bool, int]:
    """How much labels say that others which go together with them need not: what stays, changes along dimensions."""
    least = compact(values)
    return bool((least <= FIXED).any()), least.numel()
