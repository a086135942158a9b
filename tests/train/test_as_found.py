"""What a module, its callbacks and its loggers notice of the steps and validations that are run only to measure."""

from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MaxMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lit_prune import AxisTrace, ChannelStage, Repair, StagedPruning
from lit_prune.train.module_state import attributes_kept
from tests import lightning_modules as modules
from tests.lightning_modules import images, loaders, trainer


class Memory(nn.Module):
    """A loss that remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def forward(self, logits, labels):
        self.asked += 1
        return F.cross_entropy(logits, labels)


class Listing(modules.Classifier):
    """Collects over an epoch what it sees, in lists, metrics and parts of its own."""

    def __init__(self):
        super().__init__()
        self.seen, self.outputs, self.epochs = [], {"labels": {"all": []}}, []
        self.criterion, self.best = Memory(), MaxMetric()
        self.scores = MetricCollection([MulticlassAccuracy(4), MulticlassF1Score(4)])

    def training_step(self, batch, batch_idx):
        self.seen.append(len(batch["right"]))
        logits = self(batch["left"])
        self.scores.update(logits, batch["right"])
        return self.criterion(logits, batch["right"])

    def validation_step(self, batch, batch_idx):
        self.outputs["labels"]["all"].append(batch["right"])
        self.log("val/acc", (self(batch["left"]).argmax(1) == batch["right"]).float().mean())

    def on_validation_epoch_end(self):
        self.best(float(len(self.epochs)))
        assert len(torch.cat(self.outputs["labels"]["all"])) == 48
        self.outputs["labels"]["all"].clear()

    def on_train_epoch_end(self):
        counts = sum(self.seen), self.criterion.asked, self.best.update_count
        counts += tuple(metric.update_count for metric in self.scores.values())
        self.epochs.append((*counts, sum(int(metric.tp.sum() + metric.fn.sum()) for metric in self.scores.values())))
        self.seen.clear()
        self.scores.reset()


def test_a_module_counts_what_it_trains_and_validates_and_nothing_that_is_measured(tmp_path):
    named = [{"left": image, "right": place % 4} for place, image in enumerate(images())]
    stage = ChannelStage(0.6, 1, score="taylor", replace="delete", allocation="global")
    staged = StagedPruning([stage], monitor="val/acc", recalibration_batches=1, repair=Repair(ramp=False))
    module, data = Listing(), DataLoader(named, batch_size=16)
    trainer(tmp_path, AxisTrace(), staged, epochs=3).fit(module, data, data)
    assert staged.records[0]["plan"]
    asked, validations = 3, 1  # losses and validations an epoch
    assert module.epochs == [(48, asked * e, validations * e, asked, asked, 96) for e in (1, 2, 3)]


class Looking(modules.Classifier):
    """Reads the trainer in its validation, and writes where its logger does."""

    def __init__(self):
        super().__init__()
        self.found = []

    def on_validation_epoch_end(self):
        folder = Path(self.logger.log_dir) / "samples"
        folder.mkdir(exist_ok=True, parents=True)
        self.logger.log_metrics({"by_hand": 1.0}, step=len(self.found))
        self.logger.experiment.log_metrics({"by_the_experiment": 1.0}, step=len(self.found))
        stopping, bar = self.trainer.early_stopping_callback, self.trainer.progress_bar_callback
        self.found.append((folder, self.trainer.log_dir, self.logger.version, stopping.patience, bar))
        self.found = list(self.found)


class Called(Callback):
    """Counts its validation hooks."""

    def __init__(self):
        self.count = 0

    def on_validation_end(self, trainer, pl_module):
        self.count += 1


def test_a_validation_in_between_finds_callbacks_and_folders_and_neither_callbacks_nor_loggers_hear_of_it(tmp_path):
    bar, called, logger = RichProgressBar(), Called(), CSVLogger(tmp_path / "logs")
    callbacks = EarlyStopping("val/ce", patience=50), called, bar, modules.pruning(monitor="val/acc")
    found, module = [], Looking()
    module.on_validation_end = lambda: found.extend(module.found[-1:])  # of all, also those that are measured
    run = trainer(tmp_path, *callbacks, epochs=2, logger=logger, enable_progress_bar=True)
    run.fit(module, *loaders())
    assert len(found) > 2 == called.count == len(module.found)
    assert set(found) == {(Path(logger.log_dir) / "samples", logger.log_dir, 0, 50, bar)}
    rows = [row.split(",") for row in (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()]
    for key in ("by_hand", "by_the_experiment"):
        assert sum(row[rows[0].index(key)] != "" for row in rows[1:]) == called.count


def test_containers_that_count_and_keep_an_order_have_what_they_had():
    module = nn.Module()
    module.net = nn.Linear(2, 2)
    module.seen, module.order = Counter(cat=3), OrderedDict(first=1, second=2)
    module.groups, module.last = defaultdict(list, cat=[1]), deque([1, 2], maxlen=2)
    with attributes_kept(module, module.net):
        module.seen["dog"] += 1
        module.order.move_to_end("first")
        module.groups["cat"].append(2)
        module.last.append(3)
    assert module.seen == Counter(cat=3) and list(module.order) == ["first", "second"]
    assert module.groups == {"cat": [1]} and list(module.last) == [1, 2]
    assert module.groups["new"] == []
