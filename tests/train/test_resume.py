"""A run killed at any point and resumed from `last.ckpt` ends with the weights of the uninterrupted run."""

import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

MAX_EPOCHS = 6


class Kill(Callback):
    """Raises at one point of the run, as a signal would."""

    def __init__(self, epoch: int, hook: str) -> None:
        self.epoch, self.hook = epoch, hook

    def _at(self, hook: str, trainer) -> None:
        if (hook, trainer.current_epoch) == (self.hook, self.epoch):
            raise KilledError

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self._at("epoch start", trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._at("first batch", trainer)

    def on_train_end(self, trainer, pl_module) -> None:
        self._at("end", trainer)


class KilledError(Exception):
    pass


def final(run) -> tuple[dict, list]:
    trainer, module, _ = run
    records = [json.loads(line) for line in (run_dir(trainer) / "stages.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("seconds")
    return {name: value.clone() for name, value in module.state_dict().items()}, records


def run_dir(trainer):
    from pathlib import Path

    return Path(trainer.default_root_dir)


@pytest.fixture(scope="module")
def uninterrupted():
    return {}


POINTS = [("fresh", "epoch start", epoch) for epoch in range(1, MAX_EPOCHS)]
POINTS += [("fresh", "first batch", 2), ("fresh", "first batch", 5), ("fresh", "end", 6)]
POINTS += [("continued", "epoch start", epoch) for epoch in (2, 3, 5)]


@pytest.mark.parametrize(("optimizer", "hook", "epoch"), POINTS)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, make_run, uninterrupted, optimizer, hook, epoch):
    options = {"optimizer": None} if optimizer == "continued" else {"optimizer": partial(torch.optim.Adam, lr=1e-3)}
    if optimizer not in uninterrupted:
        trainer, module, data = whole = make_run(tmp_path / "whole", **options)
        trainer.fit(module, datamodule=data)
        uninterrupted[optimizer] = final(whole)
    trainer, module, data = make_run(tmp_path / "killed", callbacks=[Kill(epoch, hook)], **options)
    with pytest.raises(KilledError):
        trainer.fit(module, datamodule=data)
    torch.manual_seed(99)  # the resumed process has another random state
    trainer, module, data = resumed = make_run(tmp_path / "killed", **options)
    trainer.fit(module, datamodule=data, ckpt_path=tmp_path / "killed" / "checkpoints" / "last.ckpt", weights_only=True)
    weights, records = final(resumed)
    wanted_weights, wanted_records = uninterrupted[optimizer]
    assert weights.keys() == wanted_weights.keys()
    differing = [name for name in weights if not torch.equal(weights[name], wanted_weights[name])]
    assert not differing
    assert records == wanted_records
    assert (tmp_path / "killed" / "compact" / "model.safetensors").exists()
