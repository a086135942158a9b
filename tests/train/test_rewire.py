"""The two silent failures of surgery inside a trainer, and the trainers that are refused."""

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy

from lit_prune.errors import InputError
from lit_prune.structure.record import record_of


class Snapshot(Callback):
    """Parameters at the first batch of an epoch, optimizer tensors by identity."""

    def __init__(self, epoch: int) -> None:
        self.epoch, self.weights, self.momentum = epoch, {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 0:
            self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            state = trainer.optimizers[0].state
            self.momentum = {n: copy.deepcopy(state[p]) for n, p in pl_module.named_parameters() if p in state}
            self.rates = [group["lr"] for group in trainer.optimizers[0].param_groups]


def test_every_layer_that_was_cut_trains_on(tmp_path, make_run):
    snapshot = Snapshot(2)
    trainer, module, data = make_run(tmp_path, stages=[("channels", 2)], max_epochs=3, callbacks=[snapshot])
    trainer.fit(module, datamodule=data)
    live = {id(p) for p in module.parameters()}
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert live == held
    stuck = [name for name, p in module.named_parameters() if torch.equal(p, snapshot.weights[name])]
    assert not stuck


def test_surgery_without_new_optimizer_is_caught(tmp_path, make_run, monkeypatch):
    trainer, module, data = make_run(tmp_path, stages=[("channels", 1)], max_epochs=2)
    original, held = SingleDeviceStrategy.setup, []

    def of_the_old_ones(self, trainer) -> None:
        original(self, trainer)
        held.append([p for group in self.optimizers[0].param_groups for p in group["params"]])
        if len(held) > 1:
            self.optimizers = [torch.optim.SGD(held[0], lr=0.1)]

    monkeypatch.setattr(SingleDeviceStrategy, "setup", of_the_old_ones)
    with pytest.raises(RuntimeError, match="not trained"):
        trainer.fit(module, datamodule=data)


def test_a_continued_optimizer_keeps_momentum_of_kept_channels_and_its_place_in_the_schedule(tmp_path, make_run):
    after = Snapshot(2)

    class LastState(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            if trainer.current_epoch == 1:
                state = trainer.optimizers[0].state
                self.momentum = {n: state[p]["momentum_buffer"].clone() for n, p in pl_module.named_parameters()}

    last = LastState()
    trainer, module, data = make_run(
        tmp_path, stages=[("mid", 2)], max_epochs=4, callbacks=[after, last], optimizer=None
    )
    trainer.fit(module, datamodule=data)
    kept = record_of(module.backbone).plans[0].keep_channels["backbone.layer1.0.conv1".removeprefix("backbone.")]
    name = "backbone.layer1.0.conv1.weight"
    carried = after.momentum[name]["momentum_buffer"]
    assert carried.shape[0] == len(kept) < last.momentum[name].shape[0]
    assert torch.equal(carried, last.momentum[name][list(kept)])
    untouched = "backbone.linear.weight"
    assert torch.equal(after.momentum[untouched]["momentum_buffer"], last.momentum[untouched])
    steps = 3  # of an epoch: 96 images, 32 a batch; the rate after two epochs of four, as if nothing had happened
    assert after.rates == [pytest.approx(0.05 * (1 + math.cos(math.pi * 2 * steps / (4 * steps))) / 2)]


def test_weight_averaging_is_refused(tmp_path, make_run):
    trainer, module, data = make_run(tmp_path, callbacks=[StochasticWeightAveraging(1e-2)])
    with pytest.raises(InputError, match="StochasticWeightAveraging keeps weights in the shape before pruning"):
        trainer.fit(module, datamodule=data)


def test_sharding_strategies_are_refused():
    from types import SimpleNamespace

    from lightning.pytorch.strategies import FSDPStrategy

    from lit_prune.train.rewire import check_supported

    trainer = SimpleNamespace(strategy=FSDPStrategy(), callbacks=[])
    with pytest.raises(InputError, match="FSDPStrategy cannot change the network during fit"):
        check_supported(trainer)
