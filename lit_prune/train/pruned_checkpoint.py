"""The structure of a network in the checkpoints of the LightningModule around it."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.structure import Plan
from lit_prune.structure.networks import STRUCTURE_KEY, structure_of
from lit_prune.structure.record import example_input, note_record, rebuild_inputs, record_of
from lit_prune.structure.surgery import replay
from lit_prune.structure.tracing import copy_network
from lit_prune.tensor_files import PickledError, read_torch
from lit_prune.train.locate import find_path, network_at, put_network

Module = TypeVar("Module", bound=LightningModule)
ADVICE = "removed channels: open this checkpoint with lit_prune.load_pruned(Class, path)"
"""Key of an empty tensor among the weights, which torch and Lightning show where those are loaded without the plans."""


def save_structure(module: LightningModule, path: str, checkpoint: dict[str, Any]) -> None:
    """Writes path, plans and inputs of the module's network into a checkpoint, as plain values."""
    record = record_of(network_at(module, path))
    checkpoint[STRUCTURE_KEY] = {
        "network": path,
        "backbone": record.backbone,
        "arguments": record.arguments,
        "plans": [plan.to_dict() for plan in record.plans],
        "inputs": record.inputs,
    }


@checked
def restore_structure(module: LightningModule, checkpoint: dict[str, Any], dense: nn.Module | None = None) -> None:
    """Gives the module's network the structure that a checkpoint's weights have; call it before they load.

    For a module's own `on_load_checkpoint`, so that `load_from_checkpoint` works on pruned checkpoints; with
    `StagedPruning` among the trainer's callbacks it is called anyway. Checkpoints without a structure are left alone.

    Args:
        module: the module that the weights will load into.
        checkpoint: a Lightning checkpoint.
        dense: the network before all plans, to go back to; None: the plans must go on from the present network.

    Raises:
        InputError: the checkpoint is from before a cut that the module's network has had.
    """
    _check_checkpoint(checkpoint, "checkpoint")
    checkpoint.get("state_dict", {}).pop(ADVICE, None)
    saved = structure_of(checkpoint)
    if not saved:
        return
    path = find_path(module, saved.get("network"))
    network = network_at(module, path)
    plans = [Plan.from_dict(plan, "plan of the checkpoint") for plan in saved["plans"]]
    if _begins(plans, network) and len(plans) == len(record_of(network).plans):
        return
    if not _begins(plans, network):
        if dense is None or not _begins(plans, dense):
            raise InputError(
                f"checkpoint: its network has had {len(plans)} cuts, which are not those of the present one "
                f"({len(record_of(network).plans)} cuts); build the module anew and load into that"
            )
        network = copy_network(dense).to(next(network.parameters()).device)
    put_network(module, path, carried_on(network, plans[len(record_of(network).plans) :], saved.get("inputs")))


def _begins(plans: list[Plan], network: nn.Module) -> bool:
    """Whether the plans that a network has had are the first of `plans`."""
    had = record_of(network).plans
    return [plan.to_dict() for plan in had] == [plan.to_dict() for plan in plans[: len(had)]]


def carried_on(network: nn.Module, plans: list[Plan], inputs: dict[str, Any] | None) -> nn.Module:
    """The network after further plans, with its record."""
    if not plans:
        return network
    record = record_of(network)
    example = example_input(rebuild_inputs(inputs, next(network.parameters()).device))
    after = replace(record, inputs=inputs, plans=(*record.plans, *plans))
    return note_record(replay(network, plans, example), after)


@checked
def load_pruned(
    kind: type[Module],
    path: str | Path,
    map_location: torch.device | str = "cpu",
    weights_only: bool = True,
    **arguments: Any,
) -> Module:
    """A LightningModule of a checkpoint that was written after structure was removed (or before).

    Args:
        kind: the class of the module.
        path: the checkpoint.
        map_location: where its tensors go.
        weights_only: refuse a file that holds more than plain values and tensors, such as a network among the
            hyperparameters. False runs what the file names: only for files that you trust.
        **arguments: of the class; those that it saved as hyperparameters need not be given.

    Raises:
        InputError: no such file, arguments missing, or weights that do not fit.
    """
    checkpoint = _read(path, weights_only)
    _check_checkpoint(checkpoint, f"checkpoint: {path}", needed=("state_dict",))
    known = inspect.signature(kind).parameters
    saved = {key: value for key, value in checkpoint.get("hyper_parameters", {}).items() if key in known}
    try:
        module = kind(**{**saved, **arguments})
    except TypeError as error:
        raise InputError(f"{kind.__name__}: {error}; give it to load_pruned by name") from error
    module.configure_model()
    module.to(map_location)
    restore_structure(module, checkpoint)
    module.on_load_checkpoint(checkpoint)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]  # the first names the class alone
        raise InputError(f"checkpoint: {path} does not fit {kind.__name__}: {lines[:2][-1]}") from error
    return module.eval()


def _check_checkpoint(checkpoint: Any, source: str, needed: Sequence[str] = ()) -> None:
    """Refuses values that are no checkpoint of Lightning, or one without what is needed of it."""
    for key in ("state_dict", STRUCTURE_KEY, "hyper_parameters"):
        missing = isinstance(checkpoint, Mapping) and key in needed and key not in checkpoint
        if missing or not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get(key) or {}, Mapping):
            raise InputError(f"{source} is no checkpoint of Lightning; give one that a Trainer wrote")


def _read(path: str | Path, weights_only: bool) -> dict[str, Any]:
    if not weights_only and Path(path).is_file():
        return torch.load(path, map_location="cpu", weights_only=False)
    try:
        return read_torch(path, "checkpoint")
    except PickledError as error:
        raise InputError(
            f"{error.found}, probably a hyperparameter: leave it out by save_hyperparameters(ignore=[...]), or give "
            "weights_only=False if you trust the file"
        ) from error


class StructureHooks:
    """The structure goes into every checkpoint of a module, and comes back before the weights load; until `remove`.

    Lightning calls `on_load_checkpoint` of the module before its weights load, a callback's hook comes too late.

    Args:
        module: its instance's `on_save_checkpoint` and `on_load_checkpoint` are wrapped.
        path: of its network.
        dense: gives the network before all plans, or None.
        replaced: is told the network that another took the place of.
    """

    def __init__(
        self,
        module: LightningModule,
        path: str,
        dense: Callable[[], nn.Module | None],
        replaced: Callable[[nn.Module], None],
    ) -> None:
        self.module, self.path, self.dense, self.replaced = module, path, dense, replaced
        self._wrap("on_save_checkpoint", self._save)
        self._wrap("on_load_checkpoint", self._load)

    def _wrap(self, name: str, before: Callable[[dict[str, Any]], None]) -> None:
        hook = getattr(self.module, name)

        @functools.wraps(hook)
        def wrapped(checkpoint: dict[str, Any]) -> None:
            before(checkpoint)
            hook(checkpoint)

        setattr(self.module, name, wrapped)

    def _save(self, checkpoint: dict[str, Any]) -> None:
        save_structure(self.module, self.path, checkpoint)
        if checkpoint[STRUCTURE_KEY]["plans"]:
            checkpoint["state_dict"][ADVICE] = torch.zeros(0)

    def _load(self, checkpoint: dict[str, Any]) -> None:
        before = network_at(self.module, self.path)
        restore_structure(self.module, checkpoint, self.dense())
        if network_at(self.module, self.path) is not before:
            self.replaced(before)

    def remove(self) -> None:
        """Takes the wrappers off."""
        for name in ("on_save_checkpoint", "on_load_checkpoint"):
            self.module.__dict__.pop(name, None)
