"""NaN is refused where it comes in: behind that point every figure would be NaN, or worse, look like a good one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.structure.example import Example
from lit_prune.task import Task
from lit_prune.tensor_files import check_defined


def check_finite(model: nn.Module, batches: Sequence[Any], task: Task, source: str = "model") -> None:
    """Refuses a network, or inputs, that hold NaN or infinity.

    Args:
        model: its parameters and buffers are looked at.
        batches: what it will be called with.
        task: says what of a batch the network gets.
        source: what the network is called in the message.

    Raises:
        InputError: the tensor, or the number of the batch, is named.
    """
    check_defined(model.state_dict(), source)
    for number, batch in enumerate(batches):
        if not _is_finite(task.inputs(batch)):
            raise InputError(f"batches: batch {number} holds NaN or infinity in its inputs; leave it out or repair it")


def check_answers(answers: Tensor, network: str, layer: str) -> None:
    """Refuses predictions that are not finite: no agreement is defined on them.

    Raises:
        InputError: network and layer are named.
    """
    if answers.is_floating_point() and not torch.isfinite(answers).all():
        wrong = int((~torch.isfinite(answers)).flatten(1).any(1).sum()) if answers.dim() > 1 else len(answers)
        raise InputError(
            f"interchange at layer {layer!r}: the {network} network answers {wrong} of {len(answers)} pairs with NaN "
            "or infinity; take a network whose outputs are finite"
        )


def _is_finite(example: Example) -> bool:
    values = (*example.args, *example.kwargs.values())
    return all(torch.isfinite(v).all() for v in values if isinstance(v, Tensor) and v.is_floating_point())
