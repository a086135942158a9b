"""What a network's output is made of."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.task.batches import describe

ANSWER_KEYS = ("logits", "out", "prediction", "predictions", "reconstruction", "output", "last_hidden_state")
ASIDE = ("loss", "aux", "hidden_states", "attentions", "past_key_values", "cross_attentions")  # not the answer


def answer(output: Any) -> Tensor:
    """The one tensor that answers: the output itself, the usual key of a dict, the first tensor of a tuple.

    Raises:
        InputError: there is none; the line says what the output is.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for key in ANSWER_KEYS:
            if isinstance(output.get(key), Tensor):
                return output[key]
    values = answers(output)
    if values:
        return values[0]
    raise InputError(f"model: its output is {describe(output)}, without a tensor of floats to read; give task=")


def answers(output: Any, inside: frozenset[int] = frozenset()) -> list[Tensor]:
    """Every tensor of floats in an output, in order; losses, auxiliary heads and hidden states are left aside."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.ndim else []
    parts = _parts(output, inside)
    if isinstance(output, Mapping):
        named = [name for name in ("logits", "out") if isinstance(output.get(name), Tensor)]
        parts = {name: value for name, value in parts.items() if name not in ASIDE and name in (named[:1] or parts)}
    return [tensor for value in parts.values() for tensor in answers(value, inside | {id(output)})]


def _parts(output: Any, inside: frozenset[int]) -> dict[Any, Any]:
    """What an output holds, by name or place; nothing of a class, an enumeration, or what it is itself a part of."""
    if isinstance(output, type | Enum) or id(output) in inside:
        return {}
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, list | tuple):
        return dict(enumerate(output))
    if is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in fields(output)}
    return dict(vars(output)) if hasattr(output, "__dict__") else {}


def joined(output: Any) -> Tensor:
    """The answers of an output as one tensor: as it is where there is one, else flattened and joined, [B, D].

    Raises:
        InputError: there is none, or they are not of equally many samples.
    """
    values = answers(output)
    if not values:
        raise InputError(f"model: its output is {describe(output)}, without a tensor of floats to read; give task=")
    if len({len(value) for value in values}) > 1:
        raise InputError(
            f"model: its output is {describe(output)}, in which it is not known what belongs to which sample; give "
            "task= with a prediction of its own"
        )
    return values[0] if len(values) == 1 else torch.cat([value.reshape(len(value), -1) for value in values], 1)


def named_outputs(output: Any, name: str = "", inside: frozenset[int] = frozenset()) -> dict[str, Tensor]:
    """Every tensor of floats with a sample axis in an output, by its place in dicts, tuples, lists and dataclasses."""
    if isinstance(output, Tensor):
        return {name: output} if output.is_floating_point() and output.ndim else {}
    found: dict[str, Tensor] = {}
    for key, part in _parts(output, inside).items():
        found |= named_outputs(part, f"{name}.{key}", inside | {id(output)})
    return found


def shared_outputs(one: Any, other: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors of two outputs that lie at the same place and have the same shape; none where there are none."""
    own, wanted = named_outputs(one), named_outputs(other)
    return [(own[name], wanted[name]) for name in own if name in wanted and own[name].shape == wanted[name].shape]


def softmax_divergence(original: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(original) ‖ softmax(other)) of logits [B, K, ...], mean over positions, [B], nats."""
    first, second = original.log_softmax(1), other.log_softmax(1)
    return (first.exp() * (first - second)).sum(1).reshape(len(original), -1).mean(1)
