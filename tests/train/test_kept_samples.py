"""A stage reads its calibration samples once, however many passes it takes over them."""

import pytest
import torch
from lightning.pytorch import Callback

from lit_prune.train import samples
from lit_prune.train.samples import Kept, calibration_samples


class Counted:
    """A loader that notes how many batches each pass takes."""

    def __init__(self, batches) -> None:
        self.batches, self.passes = batches, []

    def __iter__(self):
        place = len(self.passes)
        self.passes.append(0)
        for batch in self.batches:
            self.passes[place] += 1
            yield batch


def pruned(folder, make_run, stages) -> tuple[Counted, dict]:
    """Loader and weights of a run that measures on several batches, with the method that a user gets."""
    _, _, data = make_run(folder)
    data.setup("fit")
    images, labels = next(iter(data.calibration_dataloader()))
    loader = Counted(list(zip(images.split(16), labels.split(16), strict=True)))
    trainer, module, data = make_run(folder, stages=stages, max_epochs=3, settings={}, calibration=loader)
    trainer.fit(module, datamodule=data)
    return loader, module.state_dict()


def test_a_stage_reads_the_loader_once_and_gives_what_many_passes_give(tmp_path, make_run, monkeypatch):
    stages = [("mid", 1), ("planes", 2)]
    loader, weights = pruned(tmp_path / "kept", make_run, stages)
    many = len(loader.batches)
    assert many > 1 and [count for count in loader.passes if count > 1] == [many, many]
    monkeypatch.setattr(samples, "LARGEST", 0)
    read, others = pruned(tmp_path / "read", make_run, stages)
    assert len([count for count in read.passes if count > 1]) > 4  # what is saved
    assert all(torch.equal(weights[name], others[name]) for name in weights)


class Writes(Callback):
    """Writes into what it is given, as networks and steps may."""

    def on_train_start(self, trainer, pl_module) -> None:
        kept = Kept(calibration_samples(trainer, "backbone", 64))
        self.first = [self._spoil(seen) for seen in kept]
        self.second = [self._spoil(seen) for seen in kept]

    def _spoil(self, seen):
        found = seen.args[0].clone(), seen.batch[1].clone()
        seen.args[0].zero_(), seen.batch[1].zero_()
        return found


@pytest.mark.parametrize("largest", [0, 1 << 30])
def test_every_pass_is_given_what_was_read(tmp_path, make_run, monkeypatch, largest):
    monkeypatch.setattr(samples, "LARGEST", largest)
    writes = Writes()
    trainer, module, data = make_run(tmp_path, stages=(), max_epochs=1, callbacks=[writes])
    trainer.fit(module, datamodule=data)
    assert len(writes.first) == len(writes.second) > 0 and writes.first[0][0].any()
    for first, second in zip(writes.first, writes.second, strict=True):
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
