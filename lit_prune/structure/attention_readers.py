"""Which layer reads the values of an attention, and in which of its channels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Read:
    """What a layer that mixes channels reads and writes: its weight's name, both tensors, where their channels are."""

    weight: str
    inputs: Tensor
    output: Tensor
    dim: int


def columns_of(outputs: list[Tensor], reads: Sequence[Read]) -> list[tuple[int, Tensor] | str]:
    """For each output of an attention the number of its read and the column that reads each value, or a reason."""
    if not outputs or not reads:
        return ["no layer reads it"] * len(outputs)
    plain, by_column, by_read = (_gradients(reads, outputs, code) for code in (_ones, _column_code, _read_code))
    found: list[tuple[int, Tensor] | str] = []
    for ones, column, read in zip(plain, by_column, by_read, strict=True):
        if ones is None or column is None or read is None:
            found.append("no layer reads it")
        else:
            found.append(_one_reader(ones, column, read))
    return found


def _gradients(reads: Sequence[Read], outputs: list[Tensor], code) -> tuple[Tensor | None, ...]:
    inputs = [read.inputs for read in reads]
    codes = [code(number, read).expand(read.inputs.shape) for number, read in enumerate(reads)]
    return torch.autograd.grad(inputs, outputs, codes, retain_graph=True, allow_unused=True)


def _ones(number: int, read: Read) -> Tensor:
    return read.inputs.new_ones(())


def _column_code(number: int, read: Read) -> Tensor:
    shape = [1] * read.inputs.dim()
    shape[read.dim] = -1
    return torch.arange(1, read.inputs.shape[read.dim] + 1, device=read.inputs.device).view(shape).to(read.inputs)


def _read_code(number: int, read: Read) -> Tensor:
    return read.inputs.new_full((), number + 1.0)


def _one_reader(ones: Tensor, column: Tensor, read: Tensor) -> tuple[int, Tensor] | str:
    """The read, and for each head and dimension its column, int64 [heads, d]."""
    seen = ones != 0
    columns, reads = (torch.where(seen, values / ones, -1.0) for values in (column, read))
    dims = [dim for dim in range(ones.dim()) if dim not in (ones.dim() - 3, ones.dim() - 1)]
    lowest = [torch.where(values > 0, values, torch.inf).amin(dims) for values in (columns, reads)]  # [heads, d]
    columns, reads = (values.amax(dims) for values in (columns, reads))
    whole = all(
        bool((highest - least < 0.01).all()) and bool((highest > 0.5).all())
        for least, highest in zip(lowest, (columns, reads), strict=True)
    )
    rounded, number = columns.round().long() - 1, reads.round().long() - 1
    if not whole or (columns - 1 - rounded).abs().max() > 0.01 or len(number.unique()) != 1:
        return "its heads are mixed (a norm, a gate or a layer across heads) before one layer reads them"
    return int(number.flatten()[0]), rounded
