"""A run killed at any point and resumed from `last.ckpt` ends with the weights of the uninterrupted run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

MAX_EPOCHS = 6


class Keep(Callback):
    """Copies the run folder at points of the run: what is left there when a signal kills it at once."""

    def __init__(self, copies: Path, optimizer: str) -> None:
        self.copies, self.optimizer = copies, optimizer

    def _at(self, hook: str, trainer) -> None:
        if (self.optimizer, hook, trainer.current_epoch) in POINTS:
            trainer.strategy.checkpoint_io._executor.submit(int).result()  # behind what it is writing
            shutil.copytree(trainer.default_root_dir, self.copies / f"{hook} {trainer.current_epoch}")

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self._at("epoch start", trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == 0:
            self._at("first batch", trainer)

    def on_train_end(self, trainer, pl_module) -> None:
        self._at("end", trainer)


def final(trainer, module, _) -> tuple[dict, list]:
    records = [json.loads(line) for line in (Path(trainer.default_root_dir) / "stages.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("seconds")
    return {name: value.clone() for name, value in module.state_dict().items()}, records


@pytest.fixture(scope="module")
def uninterrupted():
    """Folder, weights and records of the finished runs, by their optimizer; the copies lie beside the folder."""
    return {}


POINTS = [("fresh", "epoch start", epoch) for epoch in range(1, MAX_EPOCHS)]
POINTS += [("fresh", "first batch", 2), ("fresh", "first batch", 5), ("fresh", "end", 6)]
POINTS += [("continued", "epoch start", epoch) for epoch in (2, 3, 5)]


@pytest.mark.parametrize(("optimizer", "hook", "epoch"), POINTS)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path_factory, make_run, uninterrupted, optimizer, hook, epoch):
    options = {"optimizer": None, "settings": {}} if optimizer == "continued" else {}
    if optimizer not in uninterrupted:
        folder = tmp_path_factory.mktemp(optimizer) / "run"
        trainer, module, data = whole = make_run(folder, callbacks=[Keep(folder.parent, optimizer)], **options)
        trainer.fit(module, datamodule=data)
        uninterrupted[optimizer] = folder, *final(*whole)
    folder, wanted_weights, wanted_records = uninterrupted[optimizer]
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / f"{hook} {epoch}", folder)
    torch.manual_seed(99)  # the resumed process has another random state
    trainer, module, data = resumed = make_run(folder, **options)
    trainer.fit(module, datamodule=data, ckpt_path=folder / "checkpoints" / "last.ckpt", weights_only=True)
    weights, records = final(*resumed)
    assert weights.keys() == wanted_weights.keys()
    differing = [name for name in weights if not torch.equal(weights[name], wanted_weights[name])]
    assert not differing
    assert records == wanted_records
    assert (folder / "compact" / "model.safetensors").exists()
