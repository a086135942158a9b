"""What a network's output is made of."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
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


def answers(output: Any) -> list[Tensor]:
    """Every tensor of floats in an output, in order; losses, auxiliary heads and hidden states are left aside."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.ndim else []
    if isinstance(output, Mapping):
        named = [output[key] for key in ("logits", "out") if isinstance(output.get(key), Tensor)]
        values = named[:1] or [value for key, value in output.items() if key not in ASIDE]
    elif isinstance(output, list | tuple):
        values = list(output)
    else:
        values = list(vars(output).values()) if hasattr(output, "__dict__") else []
    return [tensor for value in values for tensor in answers(value)]


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
    return values[0] if len(values) == 1 else torch.cat([value.flatten(1) for value in values], 1)


def named_outputs(output: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor of floats with a sample axis in an output, by its place in dicts, tuples, lists and dataclasses."""
    if isinstance(output, Tensor):
        return {name: output} if output.is_floating_point() and output.ndim else {}
    if isinstance(output, Mapping):
        items = list(output.items())
    elif isinstance(output, list | tuple):
        items = list(enumerate(output))
    elif is_dataclass(output):
        items = [(field.name, getattr(output, field.name)) for field in fields(output)]
    else:
        items = list(vars(output).items()) if hasattr(output, "__dict__") else []
    return {k: v for key, item in items for k, v in named_outputs(item, f"{name}.{key}").items()}


def shared_outputs(one: Any, other: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors of two outputs that lie at the same place and have the same shape; none where there are none."""
    own, wanted = named_outputs(one), named_outputs(other)
    return [(own[name], wanted[name]) for name in own if name in wanted and own[name].shape == wanted[name].shape]
