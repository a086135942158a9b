"""Modules that do something unusual in their steps: measured all the same, or refused in one line."""

import json
from dataclasses import dataclass

import lightning_modules as modules
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from lightning_modules import MEAN, STD, images, loaders, trainer
from torch import nn
from torch.utils.data import DataLoader

from lit_prune import AxisTrace, ChannelStage, GradientTrace, InputError, LitClassifier, Repair, StagedPruning
from lit_prune.data import DigitsData


def pruning(epoch: int = 1, score: str = "magnitude", **options):
    return StagedPruning([ChannelStage(0.6, epoch, score=score)], recalibration_batches=1, **options)


def is_cut(network):
    return sum(p.numel() for p in network.parameters()) < sum(p.numel() for p in modules.network().parameters())


def record(folder):
    (found,) = [json.loads(line) for line in (folder / "stages.jsonl").read_text().splitlines()]
    return found


def test_a_classifier_with_a_step_of_its_own_is_taught_as_often_as_its_record_says(tmp_path):
    class Own(LitClassifier):
        def training_step(self, batch, batch_index):
            return F.cross_entropy(self(batch[0]), batch[1])

        def on_train_epoch_end(self):
            pass

    data = DigitsData(resolution=8, train_size=96, calibration_size=64, batch_size=32, pad=1)
    module = Own("cifar_resnet20", 10, data.image_shape)
    staged = pruning(repair=Repair(ramp=False))
    asked = []
    begin = staged.teaching.begin

    def counted(module, lesson):
        lesson.teacher.register_forward_hook(lambda *_: asked.append(torch.is_grad_enabled()))
        begin(module, lesson)

    staged.teaching.begin = counted
    fit = trainer(tmp_path, staged, epochs=2)
    fit.fit(module, datamodule=data)
    assert record(tmp_path)["distillation"]["evaluations"] == len(asked) == fit.num_training_batches
    assert not any(asked)


class Twice(modules.Classifier):
    """The network runs on the images and on their mirror images."""

    def training_step(self, batch, batch_idx):
        pixels, labels = batch
        return F.cross_entropy(self(pixels), labels) + (self(pixels) - self(pixels.flip(-1))).square().mean()


def test_a_network_that_is_called_several_times_a_step_is_taught_at_each_call(tmp_path):
    staged = pruning(monitor="val/acc", repair=Repair(ramp=False))
    trainer(tmp_path, AxisTrace(), staged, epochs=2).fit(module := Twice(), *loaders())
    assert is_cut(module.net)
    assert record(tmp_path)["distillation"]["evaluations"] == 3, "steps, whatever the calls"


class Heads(modules.Classifier):
    """Two answers, one of them a single number, which has no direction to compare."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.number = modules.network(), nn.Linear(4, 1)

        def forward(self, x):
            logits = self.trunk(x)
            return logits, self.number(logits)

    def __init__(self):
        super().__init__()
        self.net = self.Net()

    def loss(self, batch):
        logits, number = self(batch[0])
        return F.cross_entropy(logits, batch[1]) + (number[:, 0] - batch[1]).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))


def test_two_heads_are_taught_at_the_one_that_has_a_direction(tmp_path):
    staged = pruning(monitor="val/loss", mode="min", network="net", repair=Repair(ramp=False))
    trainer(tmp_path, staged, epochs=2).fit(module := Heads(), *loaders())
    assert is_cut(module.net.trunk)
    assert record(tmp_path)["distillation"]["evaluations"] == 3


def test_a_network_in_evaluation_mode_stays_there_is_taught_at_its_steps_alone_and_it_is_said(tmp_path):
    staged = pruning(monitor="val/acc", repair=Repair(ramp=False))
    module = modules.Classifier()
    module.net.eval()
    with pytest.warns(UserWarning, match="in evaluation mode"):
        trainer(tmp_path, GradientTrace(), staged, epochs=3).fit(module, *loaders())
    assert is_cut(module.net) and not any(part.training for part in module.net.modules())
    assert record(tmp_path)["distillation"]["evaluations"] == 6, "two epochs of three steps"


@dataclass
class Sample:
    """A batch of a class of its own."""

    left: torch.Tensor
    right: torch.Tensor

    def to(self, *arguments, **options):
        return Sample(self.left.to(*arguments, **options), self.right.to(*arguments, **options))


class OfAClass(modules.Classifier):
    """No task of ours knows its batches; its loss is what its step returns."""

    def __init__(self, returned: str = "loss"):
        super().__init__()
        self.returned = returned

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch.left), batch.right)
        return {"loss": loss, "none": None, "text": "0.3"}[self.returned]

    def validation_step(self, batch, batch_idx):
        right = (self(batch.left).argmax(1) == batch.right).float().mean()
        self.log("val/acc", right, batch_size=len(batch.left))


class Opaque:
    """A batch whose samples cannot be told apart from outside."""

    def __init__(self, left, right):
        self.held = lambda: (left, right)

    left = property(lambda self: self.held()[0])
    right = property(lambda self: self.held()[1])

    def to(self, *arguments, **options):
        return Opaque(self.left.to(*arguments, **options), self.right.to(*arguments, **options))


def samples(kind=Sample):
    pairs = [(image, place % 4) for place, image in enumerate(images())]
    collate = lambda pairs: kind(torch.stack([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs]))  # noqa: E731
    return [DataLoader(pairs, batch_size=16, collate_fn=collate)] * 2


def test_the_loss_of_the_step_serves_scores_where_no_task_fits(tmp_path):
    staged = pruning(score="taylor", monitor="val/acc")
    trainer(tmp_path, AxisTrace(), staged, epochs=2).fit(module := OfAClass(), *samples())
    assert is_cut(module.net)
    table = pd.read_parquet(tmp_path / "trace" / "epoch=000.parquet")
    assert table[~table["dead"]]["task_information"].notna().all()


@pytest.mark.real  # on another, a network whose graph a traceback holds cannot be moved
def test_a_step_that_returns_none_has_no_loss_for_a_score_and_takes_no_term(tmp_path):
    with pytest.raises(InputError, match="training_step of OfAClass returns NoneType, not a loss"):
        trainer(tmp_path, pruning(score="taylor", monitor="val/acc"), epochs=2).fit(OfAClass("none"), *samples())
    with pytest.raises(InputError, match="training_step of OfAClass returned None in every step of the epoch"):
        trainer(tmp_path, pruning(monitor="val/acc"), epochs=2).fit(OfAClass("none"), *samples())


def test_batches_that_cannot_be_taken_apart_are_cut_without_a_loss_and_refused_in_a_line_with_one(tmp_path):
    staged = pruning(score="cmr_logit", monitor="val/acc")
    trainer(tmp_path, staged, epochs=2).fit(module := OfAClass(), *samples(Opaque))
    assert is_cut(module.net)
    said = r"does not run on 1 samples of a batch, Opaque .* give task="
    with pytest.raises(InputError, match=said) as raised:
        trainer(tmp_path, pruning(score="taylor", monitor="val/acc"), epochs=2).fit(OfAClass(), *samples(Opaque))
    assert "\n" not in str(raised.value)
    trainer(tmp_path, AxisTrace(task="unlabelled"), epochs=1).fit(OfAClass(), *samples(Opaque))
    with pytest.warns(UserWarning, match=said):
        trainer(tmp_path, AxisTrace(), epochs=1).fit(OfAClass(), *samples(Opaque))
    table = pd.read_parquet(tmp_path / "trace" / "epoch=000.parquet")
    assert table["task_information"].isna().all() and table[~table["dead"]]["input_capture"].notna().all()


def test_the_images_that_are_measured_are_normalised_ones(tmp_path):
    """The step's own preparation counts, whatever the batches are."""
    seen = []

    class Watched(OfAClass):
        def __init__(self):
            super().__init__()
            self.net[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))

    trainer(tmp_path, AxisTrace(), epochs=1).fit(Watched(), *samples())
    wanted = (images()[:16] - MEAN) / STD
    assert all(part.abs().max() < wanted.abs().max() * 1.01 for part in seen)
