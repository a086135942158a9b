"""What the network inside a LightningModule really gets: the arguments of its call, from the module's own step."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lit_prune.errors import InputError
from lit_prune.running import modes_kept, removing
from lit_prune.task.batches import are_images, size_of, slice_batch
from lit_prune.train.locate import network_at
from lit_prune.train.module_state import attributes_kept

STILL = ("zero_grad", "load_state_dict", "add_param_group")
BY_HAND = ("manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
STEPS = {"training_step": "training", "validation_step": "validating"}


@dataclass(frozen=True)
class Seen:
    """A batch as the network gets it.

    Attributes:
        args: positional arguments of the network's call.
        kwargs: its named arguments.
        batch: the batch itself, after the module's transfer hooks.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: Any

    @property
    def size(self) -> int:
        """Number of samples."""
        return size_of((self.args, self.kwargs))

    def take(self, samples: slice) -> "Seen":
        """The samples that a slice names: what has one entry a sample is cut, all else stays."""
        size, listed = self.size, any(isinstance(value, list) or are_images(value) for value in self.args)
        cut = (slice_batch(part, samples, size, listed) for part in (self.args, self.kwargs, self.batch))
        return Seen(*cut)

    def first(self, samples: int) -> "Seen":
        """The first so many samples."""
        return self if self.size <= samples else self.take(slice(samples))


class NotCalledError(InputError):
    """A step ended without calling the network."""


class _ReachedError(BaseException):
    """Leaves a step at the call of the network; no `except Exception` of the step stops it."""


def step_for_evaluation(module: LightningModule) -> str:
    """`validation_step` where the module has one, else `training_step`."""
    return "validation_step" if is_overridden("validation_step", module) else "training_step"


def see(trainer: Trainer, path: str, batch: Any, index: int, step: str, loader: int = 0) -> Seen:
    """What the network at `path` is called with when the module's `step` gets `batch`.

    The batch passes the module's (or DataModule's) `on_before_batch_transfer`, `transfer_batch_to_device` and
    `on_after_batch_transfer` in the trainer's state that belongs to the step, then the step itself up to the first call
    of the network. The step's random numbers are a function of `index`. Afterwards modes, flags, buffers, attributes,
    the random state and the trainer's state are as before, and nothing was logged.

    Args:
        trainer: in `fit`.
        path: of the network in `trainer.lightning_module`.
        batch: as the loader gives it.
        index: number of the batch.
        step: `training_step` or `validation_step`.
        loader: number of its loader among several.

    Raises:
        NotCalledError: the step ends without calling the network.
    """
    module = trainer.lightning_module
    network = network_at(module, path)
    with as_found(trainer, module, network), isolate_rng(), torch.no_grad():
        torch.manual_seed(index)
        setattr(trainer, STEPS[step], True)
        module.train(step == "training_step")
        batch = _transferred(trainer, module, batch, loader)
        call = _call_of(module, network, getattr(module, step), (batch, index, loader))
    return Seen(*call, batch)


def _transferred(trainer: Trainer, module: LightningModule, batch: Any, loader: int) -> Any:
    """The batch as Lightning gives it to a step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=loader)
    return trainer.strategy.batch_to_device(batch, module.device, dataloader_idx=loader)


def _call_of(module: nn.Module, network: nn.Module, step: Any, given: tuple[Any, int, int]) -> tuple[tuple, dict]:
    """Arguments of the first call of the network in a step."""
    found: list[tuple[tuple, dict]] = []

    def reach(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _ReachedError

    handle = network.register_forward_pre_hook(reach, with_kwargs=True, prepend=True)
    with removing([handle]), suppress(_ReachedError):
        step(*step_arguments(step, *given))
    if not found:
        name = getattr(step, "__name__", "step")
        parts = ", ".join(part for part, child in module.named_children() if any(True for _ in child.parameters()))
        raise NotCalledError(
            f"network: {name} of {type(module).__name__} does not call {type(network).__name__}; name the submodule "
            f"that it calls by network= ({parts})"
        )
    return found[0]


def step_arguments(step: Any, batch: Any, index: int, loader: int) -> list[Any]:
    """Arguments of a step, as many as it takes."""
    step = getattr(step, "__wrapped__", step)
    names = inspect.signature(step).parameters
    given = [batch, index, *([loader] if "dataloader_idx" in names else [])]
    several = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in names.values())
    return given if several else given[: len(names)]


@contextmanager
def as_found(trainer: Trainer, module: LightningModule, network: nn.Module) -> Iterator[None]:
    """Silences the module's log and its own optimization, and puts back what a step may have changed."""
    stage = trainer.state.stage
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    own = {id(buffer) for buffer in network.buffers()}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers() if id(buffer) not in own]
    try:
        with modes_kept(module), attributes_kept(module, network):
            _silence(module)
            yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)
        for parameter, required in flags:
            parameter.requires_grad_(required)
        trainer.state.stage = stage


def _silence(module: LightningModule) -> None:
    """Nothing is logged any more, and nothing optimized by hand."""
    own: dict[str, Any] = dict.fromkeys(("log", "log_dict"), _silent)
    if not module.automatic_optimization:
        still = {name: _still(getattr(module, name)()) for name in ("optimizers", "lr_schedulers")}
        own |= {name: lambda *_, found=found, **__: found for name, found in still.items()}
        own |= dict.fromkeys(BY_HAND, _silent)
    module.__dict__.update(own)


class _Still:
    """In the place of an optimizer or a schedule: it can be read, and nothing moves."""

    def __init__(self, found: Any) -> None:
        self.found = found
        self.param_groups = [dict(group) for group in getattr(found, "param_groups", ())]

    def step(self, closure: Any = None, **_: Any) -> Any:
        """Calls the closure, which may be what calls the network."""
        return closure() if callable(closure) else None

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Toggles nothing."""
        yield

    def __getattr__(self, name: str) -> Any:
        return _silent if name in STILL else getattr(self.found, name)


def _still(found: Any) -> Any:
    """As many as there are."""
    if isinstance(found, list):
        return [_Still(one) for one in found]
    return None if found is None else _Still(found)


def _silent(*_: Any, **__: Any) -> None:
    """In the place of `log` and `log_dict`."""
