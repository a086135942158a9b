"""The network of a LightningModule through a run that changes its structure."""

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.structure import Plan, transfer_tensors
from lit_prune.structure.example import Example
from lit_prune.structure.record import (
    describe_inputs,
    example_input,
    note_plan,
    note_record,
    rebuild_inputs,
    record_of,
)
from lit_prune.structure.tracing import copy_network
from lit_prune.train.locate import network_at, prefix_of, put_network
from lit_prune.train.own_forward import release
from lit_prune.train.pruned_checkpoint import StructureHooks, carried_on


class Subject:
    """A network at a path of a module, the plans it has had, and what it was before them.

    While it is `attached`, the module's checkpoints carry its structure and bring it back.
    """

    def __init__(self, module: LightningModule, path: str) -> None:
        self.module, self.path = module, path
        self._base: nn.Module | None = None
        self._hooks: StructureHooks | None = None

    def attach(self) -> None:
        """Wraps the module's checkpoint hooks."""
        self._hooks = StructureHooks(self.module, self.path, lambda: self._base, self.keep_base)

    def detach(self) -> None:
        """Takes the wrappers off again."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
            release(self.module)

    @property
    def network(self) -> nn.Module:
        """The network as it stands."""
        return network_at(self.module, self.path)

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Plans that it has had since it was built."""
        return record_of(self.network).plans

    @property
    def inputs(self) -> dict[str, Any] | None:
        """What it is called with, described; None before a batch has been seen."""
        return record_of(self.network).inputs

    @property
    def example(self) -> Tensor | Example:
        """What it is called with, one sample, on its device."""
        return example_input(rebuild_inputs(self.inputs, next(self.network.parameters()).device))

    def meet_inputs(self, one: Example) -> None:
        """Notes what the network is called with, one sample."""
        note_record(self.network, replace(record_of(self.network), inputs=describe_inputs(one)))

    def put(self, network: nn.Module, plan: Plan) -> None:
        """Puts the network that `plan` made of the present one in its place."""
        before = self.network
        note_plan(network, record_of(before), plan)
        put_network(self.module, self.path, network)
        self.keep_base(before)

    def keep_base(self, network: nn.Module) -> None:
        """Keeps the structure before all cuts of this process, on the CPU; the first one given counts."""
        if self._base is None:
            self._base = copy_network(network).to("cpu")

    def before(self, plans: int) -> nn.Module:
        """A network of the structure after the first so many plans, on the CPU; its weights mean nothing.

        Raises:
            InputError: the structure before them is not known any more.
        """
        every, inputs = self.plans, self.inputs
        base = self._base if self._base is not None else copy_network(self.network).to("cpu")
        had = len(record_of(base).plans)
        if had > plans:
            raise InputError("network: its dense structure is not known any more; build the module anew and resume")
        with torch.random.fork_rng(devices=[]):
            return carried_on(base if had == plans else copy_network(base), list(every[had:plans]), inputs)

    def slice_tensors(self, plan: Plan) -> Any:
        """A function that cuts optimizer tensors, under the module's names, as `plan` cuts the present network."""
        old, example, prefix = self.network, self.example, prefix_of(self.path)

        def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            inner = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            outer = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
            kept = transfer_tensors(old, plan, example, inner) if inner else {}
            return outer | {prefix + name: tensor for name, tensor in kept.items()}

        return cut


def memory_format_of(network: nn.Module) -> torch.memory_format:
    """The order in memory of a network's convolution weights."""
    weights = [parameter for parameter in network.parameters() if parameter.ndim == 4 and min(parameter.shape[1:]) > 1]
    last = weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    return torch.channels_last if last else torch.contiguous_format
