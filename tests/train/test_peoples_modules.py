"""Modules as people write them: where their network comes from, what it answers, which losses it is trained by."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from lit_prune import AxisTrace, ChannelStage, LitClassifier, Repair, StagedPruning, added_loss, load_pruned
from lit_prune.errors import InputError
from lit_prune.structure.example import Example, first_sample
from lit_prune.task import Custom
from lit_prune.train.capture import Seen
from lit_prune.train.distillation import Distillation
from lit_prune.train.samples import calibration_samples
from lit_prune.train.teaching import Lesson, Teaching
from tests import lightning_modules as modules
from tests.lightning_modules import images, loaders, network, trainer


def pruning(**options):
    stage = ChannelStage(keep=0.6, epoch=1, score="magnitude", allocation="global", replace="delete")
    return StagedPruning([stage], **options)


def is_cut(found: nn.Module) -> bool:
    return sum(p.numel() for p in found.parameters()) < 0.8 * sum(p.numel() for p in network().parameters())


def task_axis(folder) -> pd.Series:
    table = pd.read_parquet(folder / "trace" / "epoch=000.parquet")
    assert table[~table["dead"]]["input_capture"].notna().all()
    return table[~table["dead"]]["task_information"]


class Deferred(modules.Classifier):
    """Builds its network when the trainer asks for it."""

    def __init__(self):
        super().__init__()
        self.net = None


class Configured(Deferred):
    def configure_model(self):
        self.net = self.net or network()


class SetUp(Deferred):
    def setup(self, stage):
        self.net = network()


@pytest.mark.parametrize(("kind", "path"), [(Configured, None), (SetUp, "net")])
def test_a_network_that_is_built_after_init_is_found_cut_and_resumed(tmp_path, kind, path):
    best = ModelCheckpoint(monitor="val/acc", mode="max", save_last=True)
    callbacks = AxisTrace(network=path), pruning(network=path, monitor="val/acc"), best
    one = trainer(tmp_path, *callbacks, epochs=2, enable_checkpointing=True)
    one.fit(module := kind(), *loaders())
    assert is_cut(module.net)
    assert one.test(module, loaders()[1], ckpt_path="best", verbose=False)
    again = trainer(tmp_path, pruning(network=path, monitor="val/acc"), epochs=3)
    again.fit(other := kind(), *loaders(), ckpt_path=best.last_model_path)
    assert is_cut(other.net)
    if kind is Configured:
        assert is_cut(load_pruned(kind, best.last_model_path).net)


class SetUpThenConfigured(modules.Classifier):
    """`configure_model` reads what `setup` has made, as Lightning calls them in that order."""

    def setup(self, stage):
        self.width = 3

    def configure_model(self):
        self.unused = self.width


def test_configure_model_is_called_after_the_modules_own_setup(tmp_path):
    trainer(tmp_path, AxisTrace(), pruning(monitor="val/acc"), epochs=2).fit(
        module := SetUpThenConfigured(), *loaders()
    )
    assert is_cut(module.net)


def test_setup_that_builds_no_network_is_refused(tmp_path):
    class Without(Deferred):
        def setup(self, stage):
            pass

    with pytest.raises(InputError, match="no submodule with parameters"):
        trainer(tmp_path, pruning(), epochs=2).fit(Without(), *loaders())


@dataclass
class Answer:
    """What a network gives that answers in a class of its own."""

    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Answering(modules.Classifier):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, pixels):
            return Answer(self.body(pixels))

    def __init__(self):
        super().__init__()
        self.net = self.Net()

    def forward(self, pixels):
        return self.net(pixels).logits


def test_what_a_network_answers_in_a_class_of_its_own_is_taught(tmp_path):
    staged = pruning(monitor="val/acc", repair=Repair(ramp=False))
    trainer(tmp_path, staged, epochs=2).fit(Answering(), *loaders())
    assert staged.records[-1]["distillation"]["evaluations"] == 3


class Gan(LightningModule):
    """Two networks, two optimizers, no validation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        up = [nn.ConvTranspose2d(4, 16, 4), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 12, 4, 2, 1)]
        self.generator = nn.Sequential(*up, nn.ReLU(), nn.Conv2d(12, 3, 3, padding=1))
        self.critic = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 1))

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        fake = self.generator(torch.randn(len(batch[0]), 4, 1, 1, device=self.device))
        self.toggle_optimizer(first)
        self.manual_backward(F.softplus(-self.critic(fake)).mean() + added_loss(self))
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        self.manual_backward(F.softplus(self.critic(fake.detach())).mean() + F.softplus(-self.critic(batch[0])).mean())
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), 1e-3) for part in (self.generator, self.critic)]


def test_a_generator_is_traced_and_cut_without_validation_and_its_step_is_asked_for_no_loss(tmp_path):
    staged = pruning(network="generator", task="unlabelled", repair=Repair(form="mse", beta=0.0, ramp=False))
    with pytest.warns(UserWarning, match="there is no validation loader") as said:
        (run := trainer(tmp_path, AxisTrace(network="generator"), staged, epochs=2)).fit(module := Gan(), loaders()[0])
    assert any("Gan optimizes manually" in str(warning.message) for warning in said)
    assert module.generator[0].out_channels < 16 and task_axis(tmp_path).isna().all()
    assert run.global_step == 2 * 2 * 3, "two steps a batch, none for a measurement"


def test_a_run_in_which_nothing_is_measured_is_refused_before_training(tmp_path):
    run = trainer(tmp_path, pruning(network="generator"), epochs=2)
    with pytest.raises(InputError, match="monitor: none is given, and the network alone has no figure"):
        run.fit(Gan(), loaders()[0])
    assert run.global_step == 0
    run = trainer(tmp_path, pruning(monitor="val/acc"), epochs=2)
    with pytest.raises(InputError, match="'val/acc' is not logged by a validation epoch, which logs nothing"):
        run.fit(modules.Classifier(), loaders()[0])
    assert run.global_step == 0


class Late(Gan):
    """Its critic takes a step before its generator is called."""

    def training_step(self, batch, batch_idx):
        _, second = self.optimizers()
        self.manual_backward(F.softplus(-self.critic(batch[0])).mean())
        second.step()
        second.zero_grad()
        super().training_step(batch, batch_idx)


def test_a_step_that_is_followed_to_the_network_optimizes_nothing_on_the_way(tmp_path):
    found = []
    for callbacks in ([], [AxisTrace(network="generator")]):
        run = trainer(tmp_path, *callbacks, epochs=1)
        run.fit(module := Late(), loaders()[0])
        found.append((run.global_step, torch.cat([p.flatten() for p in module.parameters()])))
    assert found[0][0] == found[1][0] == 9
    assert torch.equal(found[0][1], found[1][1])


class Careful(Gan):
    """Sets a rate, toggles and asks for schedules before its generator is called, inside a closure."""

    def training_step(self, batch, batch_idx):
        first, _ = self.optimizers()
        assert self.lr_schedulers() is None
        for group in first.param_groups:
            group["lr"] = 1e-4
        with first.toggle_model():
            first.step(lambda: self.loss(len(batch[0])))

    def loss(self, count):
        loss = F.softplus(-self.critic(self.generator(torch.randn(count, 4, 1, 1, device=self.device)))).mean()
        self.manual_backward(loss)
        return loss


def test_optimizers_can_be_read_and_toggled_on_the_way_to_the_network(tmp_path):
    trainer(tmp_path, AxisTrace(network="generator"), epochs=1).fit(Careful(), loaders()[0])
    assert task_axis(tmp_path).isna().all()


class Siamese(LightningModule):
    """One network, called on both images of a pair."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = network()

    def training_step(self, batch, batch_idx):
        return apart((self.net(batch[0]), self.net(batch[1])), batch).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def apart(found: Any, batch: Any) -> torch.Tensor:
    """Contrastive loss of each pair."""
    distance = (found[0] - found[1]).square().sum(1)
    return torch.where(batch[2] > 0, distance, F.relu(1 - distance))


def pairs():
    both = [(a / 100, a.flip(-1) / 100 + 0.1, float(i % 2)) for i, a in enumerate(images())]
    return DataLoader(both, batch_size=16)


def test_a_loss_of_several_calls_is_none_of_one_output_and_a_task_makes_the_calls(tmp_path):
    with pytest.warns(UserWarning, match="calls the network 2 times"):
        trainer(tmp_path, AxisTrace(), epochs=1).fit(Siamese(), pairs(), pairs())
    assert task_axis(tmp_path).isna().all()
    with pytest.raises(InputError, match="calls the network 2 times, so that its loss is none of one output; give"):
        staged = StagedPruning([ChannelStage(0.6, 1, score="taylor", allocation="global")], monitor="val/loss")
        trainer(tmp_path, staged, epochs=2).fit(Siamese(), pairs(), pairs())
    task = Custom(run=lambda model, batch: (model(batch[0]), model(batch[1])), loss=apart)
    staged = pruning(monitor="val/loss", mode="min", task=task)
    trainer(tmp_path, AxisTrace(task=task), staged, epochs=2).fit(module := Siamese(), pairs(), pairs())
    assert is_cut(module.net) and task_axis(tmp_path).notna().all()


@pytest.mark.parametrize("how", ["in place", "a part"])
def test_a_network_that_is_compiled_anywhere_is_refused_as_compiled(tmp_path, how):
    module = modules.Classifier()
    if how == "in place":
        module.net.compile()
    else:
        module.net[3] = torch.compile(module.net[3])
    with pytest.raises(InputError, match="'net' goes through torch.compile"):
        trainer(tmp_path, pruning(), epochs=2).fit(module, *loaders())


class Skipping(modules.Classifier):
    """Leaves every second batch out."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


def test_batches_that_a_step_leaves_out_are_left_out_of_measurements(tmp_path):
    staged = pruning(recalibration_batches=2, repair=Repair(ramp=False))
    trainer(tmp_path, AxisTrace(), staged, epochs=2).fit(module := Skipping(), loaders()[0])
    assert is_cut(module.net) and staged.records[-1]["distillation"]["evaluations"] == 2


class Kept(modules.OneCycle):
    """Gives the optimizer and schedule that it made once, as LightningCLI does for those of its configuration."""

    def configure_optimizers(self):
        self.made = getattr(self, "made", None) or super().configure_optimizers()
        return self.made


def test_an_optimizer_that_is_given_again_takes_the_cut_parameters_as_a_new_one_does(tmp_path):
    trained = []
    for kind in (modules.OneCycle, Kept):
        trainer(tmp_path, pruning(monitor="val/acc"), epochs=3).fit(module := kind(), *loaders())
        trained.append(module.state_dict())
    assert all(torch.equal(trained[0][name], value) for name, value in trained[1].items())
    with pytest.raises(InputError, match="gives the same optimizer again, which cannot begin anew"):
        trainer(tmp_path, pruning(monitor="val/acc", optimizer="anew"), epochs=3).fit(Kept(), *loaders())


class Average(Callback):
    """Keeps an average of the weights by itself."""

    def on_fit_start(self, trainer, pl_module):
        self.mean = {name: value.clone() for name, value in pl_module.state_dict().items()}


class Momentum(modules.Classifier):
    """Holds a second network of the same kind."""

    def __init__(self):
        super().__init__()
        self.slow = deepcopy(self.net)


def test_averages_that_would_not_follow_a_cut_are_said_before_training(tmp_path):
    staged = pruning(network="net", monitor="val/acc")
    with pytest.warns(UserWarning, match="will not fit after a cut") as said:
        trainer(tmp_path, Average(), staged, epochs=1, fast_dev_run=True).fit(Momentum(), *loaders())
    names = [str(warning.message).split()[0] for warning in said if "will not fit after a cut" in str(warning.message)]
    assert names == ["Momentum.slow", "Average.mean"]


class Counting(modules.Classifier):
    """Its metric sums up over the epoch in the training step, and no task of ours knows its batches."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(4)

    def training_step(self, batch, batch_idx):
        logits = self(batch["left"])
        self.accuracy(logits, batch["right"])
        self.log("train/acc", self.accuracy, on_step=False, on_epoch=True)
        return F.cross_entropy(logits, batch["right"])

    def validation_step(self, batch, batch_idx):
        self(batch["left"])


def test_measuring_adds_nothing_to_the_metrics_of_the_step(tmp_path):
    named = [{"left": image, "right": place % 4} for place, image in enumerate(images())]
    found = []
    for callbacks in ([], [AxisTrace()]):
        run = trainer(tmp_path, *callbacks, epochs=2)
        run.fit(Counting(), DataLoader(named, batch_size=16), DataLoader(named, batch_size=16))
        found.append(float(run.callback_metrics["train/acc"]))
    assert found[0] == found[1]
    assert task_axis(tmp_path).notna().all()


def test_a_checkpoint_with_a_network_among_its_hyperparameters_needs_the_callers_word(tmp_path):
    class Given(modules.Classifier):
        def __init__(self, inner):
            super().__init__()
            self.save_hyperparameters()
            self.net = inner

    staged, last = pruning(monitor="val/acc"), ModelCheckpoint(save_last=True)
    trainer(tmp_path, staged, last, epochs=2, enable_checkpointing=True).fit(Given(network()), *loaders())
    with pytest.raises(InputError, match=r"it holds a pickled torch.nn.*ignore=\[...\]\), or give weights_only=False"):
        load_pruned(Given, last.last_model_path, inner=network())
    assert is_cut(load_pruned(Given, last.last_model_path, weights_only=False, inner=network()).net)


@pytest.mark.parametrize("kind", [list, tuple])
def test_images_and_targets_of_a_detector_are_taken_apart_however_they_are_collated(kind):
    found = Seen((kind(torch.rand(3, 3, 8, 8)), kind({"labels": torch.tensor([i])} for i in range(3))), {}, None)
    one = found.take(slice(1, 2))
    assert one.size == 1 and one.args[1][0]["labels"].item() == 1 and len(one.args[1]) == 1
    assert [len(value) for value in first_sample(Example(found.args, {})).args] == [1, 1]


class Choosing(nn.Module):
    """Its last layer reads some of the samples only, in training."""

    def __init__(self):
        super().__init__()
        self.body, self.roi_heads = nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 2)

    def forward(self, x):
        found = self.body(x)
        self.roi_heads(found[: 3 if self.training else 2])
        return found


def test_features_of_other_rows_are_left_out_for_proposals_and_refused_elsewhere():
    student, teacher = Choosing().train(), Choosing()
    teaching = Teaching(Repair(ramp=False))
    teaching.begin(holder := modules.Classifier(), Lesson(student, teacher, None, torch.zeros(1, 4), lambda: (0, 1)))
    assert teaching.describe()["features"] is None and "proposals" in teaching.describe()["reason"]
    teaching.end(holder)
    term = Distillation(Repair(ramp=False), student, teacher, lambda: (0, 1), layer="roi_heads")
    student(torch.rand(4, 4))
    with pytest.raises(InputError, match="reads 3 samples in the network and 2 in its teacher"):
        term()


def test_our_own_classifier_reads_batches_as_any_task_does(tmp_path):
    named = [{"image": image, "label": place % 4} for place, image in enumerate(images(16))]
    numbered = [(image, place % 4, place) for place, image in enumerate(images(16))]
    for samples in (named, numbered):
        module = LitClassifier("cifar_resnet20", 4, (3, 8, 8))
        run = trainer(tmp_path, epochs=1)
        run.fit(module, DataLoader(samples, batch_size=8), DataLoader(samples, batch_size=8))
        assert {"train/loss", "val/accuracy"} <= set(run.callback_metrics)
        assert torch.cat(run.predict(module, DataLoader(samples, batch_size=8))).shape == (16, 4)


class Looks(Callback):
    """Takes the first calibration batch of a loader, then all of them."""

    def __init__(self, loader: DataLoader, started: list[int]) -> None:
        self.loader, self.started = loader, started

    def on_train_start(self, trainer, pl_module):
        samples = calibration_samples(trainer, "net", self.loader)
        self.first, self.after_first = samples.first(), list(self.started)
        self.all = list(samples)


def test_the_first_batch_starts_no_processes(tmp_path, monkeypatch):
    """Where they are spawned each takes seconds."""
    started, begin = [], torch.utils.data.dataloader._MultiProcessingDataLoaderIter

    def counted(loader):
        started.append(loader.num_workers)
        return begin(loader)

    monkeypatch.setattr(torch.utils.data.dataloader, "_MultiProcessingDataLoaderIter", counted)
    train, validation = loaders()
    looks = Looks(DataLoader(validation.dataset, batch_size=8, num_workers=1), started)
    trainer(tmp_path, looks, epochs=1).fit(modules.Classifier(), train, validation)
    assert looks.after_first == [] and started == [1]
    assert torch.equal(looks.first.args[0], looks.all[0].args[0])


class InWorkers(Dataset):
    """Reads from what it opens in a worker process, as files of HDF5 are."""

    def __init__(self, samples: Dataset) -> None:
        self.samples, self.opened = samples, None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        return self.opened[index]

    def open(self, worker: int) -> None:
        self.opened = self.samples


def test_the_first_batch_comes_from_workers_where_only_they_can_read_it(tmp_path):
    train, validation = loaders()
    only = InWorkers(validation.dataset)
    looks = Looks(DataLoader(only, batch_size=8, num_workers=1, worker_init_fn=only.open), [])
    trainer(tmp_path, looks, epochs=1).fit(modules.Classifier(), train, validation)
    assert torch.equal(looks.first.args[0], looks.all[0].args[0])
