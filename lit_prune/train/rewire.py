"""Makes a running trainer consistent with a network whose structure has just changed.

The only code that touches `trainer.strategy` and the trainer's inner state. Two things go wrong without it and neither
raises: an optimizer that still holds the removed tensors (the cut layers stop training), and a DDP wrapper that reduces
gradients of tensors that are gone (ranks drift apart). Both are checked at the end.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_prune.errors import InputError
from lit_prune.tensor_files import tensor_bytes
from lit_prune.train.optimizer_state import restore_state, state_by_name
from lit_prune.train.trainer_state import callbacks_of

INCOMPATIBLE_CALLBACKS = {
    StochasticWeightAveraging: "keeps weights in the shape before pruning",
    WeightAveraging: "keeps weights in the shape before pruning",
    ModelPruning: "keeps masks in the shape before pruning",
    BaseFinetuning: "adds parameter groups to the optimizer that a new optimizer after a stage does not have",
}


def check_supported(trainer: Trainer) -> None:
    """Refuses trainers whose network cannot change shape while they run.

    Raises:
        InputError: the strategy shards parameters, or a callback holds on to the parameters before a cut.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise InputError(
            f"strategy {type(trainer.strategy).__name__} cannot change the network during fit: it shards or owns the "
            "parameters; use --trainer.strategy ddp or one device"
        )
    for callback in callbacks_of(trainer):
        for kind, reason in INCOMPATIBLE_CALLBACKS.items():
            if isinstance(callback, kind):
                raise InputError(f"callback {type(callback).__name__} {reason}; remove it from trainer.callbacks")


def configure_network(trainer: Trainer) -> None:
    """Calls the module's `configure_model`, as Lightning does after the callbacks' `setup`; it may be called twice."""
    if is_overridden("configure_model", trainer.lightning_module):
        with trainer.strategy.tensor_init_context(), trainer.precision_plugin.module_init_context():
            trainer.lightning_module.configure_model()


@contextmanager
def rewired(trainer: Trainer, slice_tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None) -> Iterator[None]:
    """Around a change of the network: builds optimizers, schedules and DDP wrapper anew after it, then checks them.

    Enter it on every rank, between epochs; change `trainer.lightning_module` inside.

    Args:
        trainer: in `fit`, on a strategy that `check_supported` accepts.
        slice_tensors: maps tensors of the old parameters (by name) to the new ones. Given: the optimizers go on; the
            momentum of the kept channels, the learning rates and the schedules' positions are carried over. None: fresh
            optimizers and schedules begin, made for the phase.

    Raises:
        RuntimeError: the optimizers do not hold the live parameters, or ranks differ.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    held, objects, names = held_names(trainer), list(trainer.optimizers), _names(trainer)
    carried = None if slice_tensors is None else [_collect(trainer, k) for k in range(len(trainer.optimizers))]
    positions = [entry.scheduler.state_dict() for entry in trainer.lr_scheduler_configs]
    yield
    strategy.model = module  # bare: drops the DDP wrapper of the old parameters
    strategy.setup(trainer)
    for optimizer, groups in zip(objects, names, strict=True):
        if any(optimizer is other for other in trainer.optimizers):
            _give_live(module, optimizer, groups, fresh=carried is None)
    if carried is not None and slice_tensors is not None:
        _restore(trainer, carried, positions, slice_tensors)
    check_optimizer(trainer, held)
    check_ranks(trainer)


def _names(trainer: Trainer) -> list[list[list[str | Tensor]]]:
    """Names of the parameters in each group of each optimizer; those of nobody in the module as they are."""
    names = {id(parameter): name for name, parameter in trainer.lightning_module.named_parameters()}
    return [[[names.get(id(p), p) for p in group["params"]] for group in o.param_groups] for o in trainer.optimizers]


def _give_live(module: nn.Module, optimizer: Any, groups: list[list[str | Tensor]], fresh: bool) -> None:
    """Puts the live parameters into an optimizer that `configure_optimizers` gives again, in the place of the old ones.

    LightningCLI does so with an optimizer of its configuration, and so do modules that make theirs once.

    Raises:
        InputError: it was to be a fresh one.
    """
    if fresh:
        raise InputError(
            "optimizer: configure_optimizers gives the same optimizer again, which cannot begin anew; leave "
            "StagedPruning(optimizer=None), or give one that makes it"
        )
    live = dict(module.named_parameters())
    optimizer.state.clear()
    for group, names in zip(optimizer.param_groups, groups, strict=True):
        found = (live.get(name) if isinstance(name, str) else name for name in names)
        group["params"] = [parameter for parameter in found if parameter is not None]


def _collect(trainer: Trainer, place: int) -> dict[str, Any]:
    """State of one optimizer by parameter name, and its hyperparameters."""
    optimizer = trainer.optimizers[place]
    return {
        "state": state_by_name(trainer.lightning_module, optimizer),
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
    }


def _restore(trainer: Trainer, carried: list[dict[str, Any]], positions: list[Any], slice_tensors: Callable) -> None:
    """Puts the carried states into the new optimizers and schedules."""
    found = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
    if found != [len(state["groups"]) for state in carried] or len(positions) != len(trainer.lr_scheduler_configs):
        raise InputError(
            "optimizer: configure_optimizers gives other optimizers, parameter groups or schedules than before the "
            "cut, so their state cannot go on; give StagedPruning(optimizer=...) or optimizer=anew"
        )
    for entry, state in zip(trainer.lr_scheduler_configs, positions, strict=True):
        entry.scheduler.load_state_dict(state)
    for optimizer, state in zip(trainer.optimizers, carried, strict=True):
        for group, values in zip(optimizer.param_groups, state["groups"], strict=True):
            group.update(values)
        restore_state(trainer.lightning_module, optimizer, state["state"], slice_tensors)


def held_names(trainer: Trainer) -> set[str]:
    """Names of the trainable parameters that the optimizers hold."""
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    return {name for name, p in trainer.lightning_module.named_parameters() if p.requires_grad and id(p) in held}


def check_optimizer(trainer: Trainer, before: set[str]) -> None:
    """Raises RuntimeError unless the optimizers hold, by identity, live parameters and all of those held before.

    Args:
        trainer: in `fit`.
        before: names of the parameters held before the network changed.
    """
    live = {name: p for name, p in trainer.lightning_module.named_parameters() if p.requires_grad}
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in live.items() if name in before and id(p) not in held]
    dead = held - {id(p) for p in trainer.lightning_module.parameters()}
    if missing or dead:
        raise RuntimeError(
            f"the optimizer holds {len(held) - len(dead)} of {len(live)} live tensors and {len(dead)} that are gone; "
            f"not trained: {', '.join(missing[:3])}"
        )


def parameter_checksum(module: nn.Module) -> int:
    """CRC-32 over names, shapes and bytes of all parameters and buffers."""
    checksum = 0
    for name, tensor in module.state_dict().items():
        checksum = zlib.crc32(f"{name}{tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor_bytes(tensor), checksum)
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


def share_state(trainer: Trainer, network: nn.Module) -> None:
    """Gives every rank the parameters and buffers that rank 0 holds; the structure is the same on all."""
    if trainer.world_size == 1:
        return
    state = network.state_dict()
    own = {name: value.cpu() for name, value in state.items()} if trainer.is_global_zero else {}
    found = trainer.strategy.broadcast(own)
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(found[name])


def mean_over_ranks(trainer: Trainer, value: float) -> float:
    """The mean of the ranks' values; equal values stay as they are."""
    if trainer.world_size == 1:
        return value
    own = torch.tensor(value, dtype=torch.float64, device=trainer.lightning_module.device)
    return float(trainer.strategy.reduce(own, reduce_op="mean"))


def sum_over_ranks(trainer: Trainer, sums: Tensor) -> Tensor:
    """The sum of the ranks' tensors, on the CPU."""
    return trainer.strategy.reduce(sums.to(trainer.lightning_module.device), reduce_op="sum").cpu()


def begin_anew(trainer: Trainer) -> list[str]:
    """Lets callbacks forget figures of the network before a cut: what EarlyStopping and ModelCheckpoint call best.

    Otherwise a repair is stopped for being worse than the dense network, and the dense one stays the best checkpoint.

    Returns:
        Names of the callbacks that forgot something.
    """
    forgot = []
    for callback in callbacks_of(trainer):
        if isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = _worst(callback.best_score, callback.monitor_op is torch.lt)
        elif isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models, callback.kth_best_model_path, callback.best_model_path = {}, "", ""
            callback.best_model_score = callback.current_score = None
            callback.kth_value = _worst(torch.tensor(0.0), callback.mode == "min")
        else:
            continue
        forgot.append(type(callback).__name__)
    return forgot


def _worst(like: Tensor, smaller_is_better: bool) -> Tensor:
    return torch.full_like(like, torch.inf if smaller_is_better else -torch.inf)


def training_loader(trainer: Trainer) -> Any:
    """The training loader as the user gives it, made anew where a method makes it."""
    return trainer.fit_loop._data_source.dataloader()


def validation_loader(trainer: Trainer) -> Any:
    """The validation loader or loaders as the run uses them (each rank its share); None where there are none."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if not loop._data_source.is_defined() or not trainer.limit_val_batches:
        return None
    loop.setup_data()
    return None if loop.skip else trainer.val_dataloaders
