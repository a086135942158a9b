"""A network rebuilt from what a file says of it: its dense form by name, then every plan; refused in one line."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lit_prune.errors import InputError
from lit_prune.models import build_network
from lit_prune.models.registry import check_arguments
from lit_prune.structure.plan import Plan
from lit_prune.structure.record import (
    LARGEST_INPUT,
    Record,
    check_inputs,
    example_input,
    image_inputs,
    rebuild_inputs,
    record_of,
)
from lit_prune.structure.surgery import replay
from lit_prune.structure.tracing import copy_network

FETCHED = ("pretrained", "weights")
"""Arguments that only say where the first weights came from; a network is rebuilt without them."""


@dataclass(frozen=True)
class Description:
    """What a file says of a network, checked: values only, nothing is built or imported yet.

    Attributes:
        backbone: name or import path for `build_network`; None where only the caller can build the dense network.
        arguments: its keyword arguments.
        input_shape: shape of one input, such as (C, H, W); () where the network reads something else.
        plans: every plan since the dense network, in order.
        source: the file, for messages.
        inputs: what the network reads where that is not one input of `input_shape`, see `describe_inputs`.
    """

    backbone: str | None
    arguments: Mapping[str, Any]
    input_shape: tuple[int, ...]
    plans: tuple[Plan, ...]
    source: str
    inputs: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, values: Any, input_shape: Any, source: str) -> "Description":
        """The description among values that a file holds (`backbone`, `arguments`, `plans`).

        Raises:
            InputError: a value is missing or of another kind; the file is named.
        """
        try:
            backbone, arguments, plans = (values[key] for key in ("backbone", "arguments", "plans"))
            if backbone is not None:
                check_arguments(backbone, arguments)
            inputs = values.get("inputs") if input_shape is None else None
            shape = () if inputs else tuple(_whole(size) for size in input_shape)
            if not inputs and (not shape or min(shape) < 1 or torch.Size(shape).numel() > LARGEST_INPUT):
                raise InputError(f"input_shape {list(shape)} is no shape of one image")
            if inputs:
                check_inputs(inputs)
            if not isinstance(plans, list | tuple):
                raise InputError(f"plans is a {type(plans).__name__}, no list")
            arguments = {key: value for key, value in arguments.items() if key not in FETCHED}
            return cls(backbone, arguments, shape, tuple(Plan.from_dict(plan) for plan in plans), source, inputs)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            problem = f"{type(error).__name__} {error}"
            raise InputError(f"{source} is damaged: {problem}; save it again") from error

    @property
    def record(self) -> Record:
        """What stays with the network."""
        inputs = self.inputs or image_inputs(self.input_shape)
        return Record(self.backbone, dict(self.arguments), self.plans, dict(inputs))

    def rebuild(self, dense: nn.Module | None = None, trust: Iterable[str] = ()) -> nn.Module:
        """The network after all plans, with fresh weights; the random state of torch is as before.

        Args:
            dense: the dense network, of which a copy is cut, or one that knows the first of the plans as its own; None
                builds it by its name.
            trust: import paths that the caller vouches for.

        Raises:
            InputError: an import path that nobody vouches for, a network that this machine cannot hold, or plans
                that do not fit it.
        """
        if dense is None and self.backbone is None:
            raise InputError(f"{self.source} does not say how its network is built: give model=, the dense network")
        with torch.random.fork_rng(devices=[]):
            try:
                model = self._build(trust) if dense is None else copy_network(dense)
                example = example_input(rebuild_inputs(self.record.inputs))
                model = replay(model, self.plans if dense is None else self._after(dense), example)
            except InputError as error:
                raise InputError(f"{self.source}: {error}") from error
            except Exception as error:  # surgery of a plan that was made for another network
                problem = f"{type(error).__name__}: {error}"
                raise InputError(f"{self.source}: its plans do not fit the network ({problem})") from error
        return model

    def _after(self, model: nn.Module) -> tuple[Plan, ...]:
        """The plans that are left where the first of them made `model`; all of them where others did."""
        done = record_of(model).plans
        same = all(map(_cuts_alike, done, self.plans)) and len(done) <= len(self.plans)
        return self.plans[len(done) :] if same else self.plans

    def _build(self, trust: Iterable[str]) -> nn.Module:
        assert self.backbone is not None, "said where there is none"
        if ":" not in self.backbone:
            _check_memory(self.backbone, self.arguments)
        return build_network(self.backbone, dict(self.arguments), trust=trust)


def _cuts_alike(one: Plan, other: Plan) -> bool:
    """Whether two plans are the same but for their notes."""
    return replace(one, notes={}).to_dict() == replace(other, notes={}).to_dict()


def _check_memory(backbone: str, arguments: Mapping[str, Any]) -> None:
    """Refuses a network that this machine cannot hold, before any of its memory is taken.

    Raises:
        InputError: its parameters need more than half of the memory.
    """
    try:
        with torch.device("meta"):
            model = build_network(backbone, dict(arguments))
    except Exception:  # a constructor that computes with its weights; building it says what is wrong, if anything
        return
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    there = _memory()
    if needed > there / 2:
        raise InputError(
            f"backbone {backbone!r} with arguments {dict(arguments)} needs {needed / 2**30:.3g} GiB for its weights; "
            f"this machine has {there / 2**30:.3g} GiB"
        )


def _memory() -> float:
    """Bytes of memory of this machine; infinite where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _whole(size: Any) -> int:
    if type(size) is not int:
        raise TypeError(f"input_shape holds {size!r}, no whole number")
    return size
