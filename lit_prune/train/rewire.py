"""Makes a running trainer consistent with a network whose structure has just changed.

The only code that touches `trainer.strategy`. Two things go wrong without it and neither raises: an optimizer that
still holds the removed tensors (the cut layers stop training), and a DDP wrapper that reduces gradients of tensors
that are gone (ranks drift apart). Both are checked at the end.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_prune.errors import InputError

INCOMPATIBLE_CALLBACKS = (StochasticWeightAveraging, WeightAveraging, ModelPruning)


def check_supported(trainer: Trainer) -> None:
    """Refuses trainers whose network cannot change shape while they run.

    Raises:
        InputError: the strategy shards parameters, or a callback keeps a copy of the weights in the old shape.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise InputError(
            f"strategy {type(trainer.strategy).__name__} cannot change the network during fit: it shards or owns the "
            "parameters; use --trainer.strategy ddp or one device"
        )
    for callback in trainer.callbacks:
        if isinstance(callback, INCOMPATIBLE_CALLBACKS):
            raise InputError(
                f"callback {type(callback).__name__} keeps weights in the shape before pruning; remove it from "
                "trainer.callbacks"
            )


@contextmanager
def rewired(trainer: Trainer, slice_tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None) -> Iterator[None]:
    """Around a change of the network: builds optimizer, schedule and DDP wrapper anew after it, then checks them.

    Enter it on every rank, between epochs; change `trainer.lightning_module` inside.

    Args:
        trainer: in `fit`, on a strategy that `check_supported` accepts.
        slice_tensors: maps tensors of the old parameters (by name) to the new ones. Given: the optimizer goes on; the
            momentum of the kept channels, the learning rates and the schedule's position are carried over. None: a
            fresh optimizer and schedule begin, made for the phase.

    Raises:
        RuntimeError: the optimizer does not hold exactly the live parameters, or ranks differ.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    carried = None if slice_tensors is None else _collect(trainer)
    yield
    strategy.model = module  # bare: drops the DDP wrapper of the old parameters
    strategy.setup(trainer)
    if carried is not None:
        _restore(trainer, carried, slice_tensors)
    check_optimizer(trainer)
    check_ranks(trainer)


def _collect(trainer: Trainer) -> dict[str, Any]:
    """State of the optimizer by parameter name, its hyperparameters, and the positions of the schedules."""
    optimizer = trainer.optimizers[0]
    named = trainer.lightning_module.named_parameters()
    return {
        "state": {name: dict(optimizer.state[p]) for name, p in named if p in optimizer.state},
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "schedules": [entry.scheduler.state_dict() for entry in trainer.lr_scheduler_configs],
    }


def _restore(trainer: Trainer, carried: dict[str, Any], slice_tensors: Callable) -> None:
    """Puts the carried state into the new optimizer and schedules."""
    optimizer = trainer.optimizers[0]
    for entry, state in zip(trainer.lr_scheduler_configs, carried["schedules"], strict=True):
        entry.scheduler.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, carried["groups"], strict=True):
        group.update(values)
    live = dict(trainer.lightning_module.named_parameters())
    for key in sorted({key for state in carried["state"].values() for key in state}):
        values = {name: state[key] for name, state in carried["state"].items() if key in state and name in live}
        shaped = {name: value for name, value in values.items() if isinstance(value, Tensor) and value.ndim}
        values.update(slice_tensors(shaped) if shaped else {})
        for name, value in values.items():
            if name in live:
                optimizer.state[live[name]][key] = value


def check_optimizer(trainer: Trainer) -> None:
    """Raises RuntimeError unless the optimizer holds exactly the live trainable parameters, by identity."""
    live = {id(p): name for name, p in trainer.lightning_module.named_parameters() if p.requires_grad}
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for key, name in live.items() if key not in held]
    if missing or len(held) != len(live):
        raise RuntimeError(
            f"the optimizer holds {len(held)} tensors of {len(live)} live ones; not trained: {', '.join(missing[:3])}"
        )


def parameter_checksum(module: nn.Module) -> int:
    """CRC-32 over names, shapes and bytes of all parameters and buffers."""
    checksum = 0
    for name, tensor in module.state_dict().items():
        checksum = zlib.crc32(f"{name}{tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), checksum)
    return checksum


def check_ranks(trainer: Trainer) -> None:
    """Raises RuntimeError unless every rank holds bit-equal parameters and DDP reduces exactly the live ones."""
    module = trainer.lightning_module
    if trainer.world_size == 1:
        return
    wrapped = trainer.strategy.model
    if not isinstance(wrapped, DistributedDataParallel) or wrapped.module is not module:
        raise RuntimeError("the changed network is not wrapped for gradient reduction: ranks would drift apart")
    reduced = {id(p) for p in wrapped._module_parameters if p.requires_grad}
    if reduced != {id(p) for p in module.parameters() if p.requires_grad}:
        raise RuntimeError("DDP reduces gradients of other tensors than the live parameters: ranks would drift apart")
    own = torch.tensor(parameter_checksum(module), device=module.device)
    sums = trainer.strategy.all_gather(own).flatten().tolist()
    if len(set(sums)) > 1:
        raise RuntimeError(f"ranks hold different parameters after surgery (checksums {sums})")
