"""Attention that is written as `torch.einsum`: which letters are heads, queries, keys and positions within a head."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Einsum:
    """A product of two tensors.

    Attributes:
        tensors: the factors.
        letters: of the first factor, of the second, and of the result.
    """

    tensors: tuple[Tensor, Tensor]
    letters: tuple[str, str, str]

    @classmethod
    def read(cls, args: tuple[Any, ...]) -> "Einsum | None":
        """The product that `torch.einsum` is called with; None unless it is of two tensors with every letter named."""
        operands = tuple(args[1]) if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
        if not isinstance(args[0], str) or len(operands) != 2:
            return None
        parts, arrow, result = args[0].replace(" ", "").partition("->")
        letters = (*parts.split(","), result)
        whole = bool(arrow) and "." not in args[0] and all(len(set(part)) == len(part) for part in letters)
        return cls(operands, letters) if whole and len(letters) == 3 else None

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Both factors, if what is summed over is the last axis of each: queries and keys."""
        first, second, result = self.letters
        summed = set(first + second) - set(result)
        return self.tensors if summed == {first[-1]} == {second[-1]} else None

    def of_weights(self, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
        """The product with weights [..., heads, L, S], as [..., heads, L, d] and as asked for, a view of the former.

        None where neither factor is of that shape, or the result has other axes.
        """
        for place, tensor in enumerate(self.tensors):
            weights, values, result = self.letters[place], self.letters[1 - place], self.letters[2]
            width = set(values) - set(weights)
            if tensor.shape == shape and len(width) == 1 and set(result) == {*weights[:-1], *width}:
                order = weights[:-1] + width.pop()
                product = torch.einsum(f"{weights},{values}->{order}", tensor, self.tensors[1 - place])
                return product, product.permute([order.index(letter) for letter in result])
        return None
