"""What an optimizer remembers of each parameter, carried over a cut.

Most of it has the parameter's shape (momentum, second moments) and is cut as the parameter is. Factored second moments
(Adafactor) have length 1 along some dimensions and are cut along the others. What has any other shape (the flat history
of L-BFGS, preconditioners, blocks of 8-bit states) says nothing of single channels: what the optimizer knows of that
parameter is forgotten, and it is said.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

Slicing = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Remembered:
    """The state of one parameter before the cut.

    Attributes:
        shape: of the parameter then.
        values: the optimizer's entries.
    """

    shape: torch.Size
    values: dict[str, Any]

    @property
    def follows(self) -> bool:
        """Whether every tensor among the entries can be cut as the parameter is."""
        return all(
            not value.ndim or _fits(value, self.shape) if isinstance(value, Tensor) else not _holds_tensors(value)
            for value in self.values.values()
        )


def state_by_name(module: nn.Module, optimizer: Optimizer) -> dict[str, Remembered]:
    """What the optimizer remembers, by the module's names of the parameters."""
    named = module.named_parameters()
    return {name: Remembered(p.shape, dict(optimizer.state[p])) for name, p in named if p in optimizer.state}


def restore_state(
    module: nn.Module, optimizer: Optimizer, states: dict[str, Remembered], slice_tensors: Slicing
) -> None:
    """Gives the optimizer of the live parameters what was remembered of the old ones.

    Args:
        module: after the cut.
        optimizer: a new one.
        states: of the old parameters.
        slice_tensors: maps tensors of the old parameters' shapes, by name, to the new ones.
    """
    live = dict(module.named_parameters())
    states = {name: state for name, state in states.items() if name in live}
    forgotten = [name for name, state in states.items() if not state.follows]
    if forgotten:
        kind = type(optimizer).__name__
        warnings.warn(
            f"optimizer: {kind} keeps tensors of other shapes than the parameters', which cannot follow a cut; what it "
            f"has learnt of {len(forgotten)} of {len(states)} parameters begins anew ({', '.join(forgotten[:3])})",
            stacklevel=2,
        )
    kept = {name: state for name, state in states.items() if state.follows}
    for key in sorted({key for state in kept.values() for key in state.values}):
        entries = {name: state.values[key] for name, state in kept.items() if key in state.values}
        shaped = {name: value for name, value in entries.items() if isinstance(value, Tensor) and value.ndim}
        if shaped:
            cut = slice_tensors({name: value.expand(kept[name].shape) for name, value in shaped.items()})
            entries |= {name: _as_long(value, shaped[name]) for name, value in cut.items()}
        for name, value in entries.items():
            optimizer.state[live[name]][key] = value


def _holds_tensors(value: Any) -> bool:
    """Whether there are tensors in a list or dictionary, such as preconditioners."""
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _fits(tensor: Tensor, shape: torch.Size) -> bool:
    """Whether a tensor has a parameter's shape, or length 1 instead along some dimensions."""
    return tensor.ndim == len(shape) and all(
        length in (1, whole) for length, whole in zip(tensor.shape, shape, strict=True)
    )


def _as_long(cut: Tensor, before: Tensor) -> Tensor:
    """`cut` with length 1 where `before` had it."""
    for dim, length in enumerate(before.shape):
        cut = cut.narrow(dim, 0, 1) if length == 1 else cut
    return cut.clone() if 1 in before.shape else cut
