"""Speed of training: resident images against a stock DataLoader, and Lightning with everything on against a bare loop.

    python benchmarks/training.py [data overhead checkpoint]

CIFAR-100 images where `data/cifar-100-python` is there, else random pixels of that size; batches of 128, float32, one
thread. `data`: steps of a bare loop whose batches come from the resident loader or from torchvision's data set and
transforms in a DataLoader with one worker process. `overhead`: a step inside `Trainer.fit` of our module with tracing,
staged pruning and checkpoints on, from batch to batch, against a bare loop with the same batches, loss, optimizer and
schedule, in processor time, which other work on the machine hardly touches. `checkpoint`: how long training waits for a
ResNet-18 checkpoint, written in place and beside.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from PIL import Image
from rows import Row, choose, main, ratio_row
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from lit_prune.cli.trainer import Trainer, last_checkpoint
from lit_prune.data import CIFAR100Data
from lit_prune.data.sources import MemoryImages
from lit_prune.lab.trajectory.gradient_trace import GradientTrace
from lit_prune.models import build_backbone
from lit_prune.processes import keep_freed_memory
from lit_prune.train.axis_trace import AxisTrace
from lit_prune.train.checkpoints import WholeFileIO, checkpoint_writer
from lit_prune.train.classifier import LitClassifier
from lit_prune.train.schedule import PhaseCosine
from lit_prune.train.staged_pruning import StagedPruning
from lit_prune.train.stages import ChannelStage

BATCH, TURNS = 128, 5
NETWORKS = {
    "two-layer ConvNet": ("cifar_convnet", {"widths": [32, 64]}, 20),
    "ResNet-20": ("cifar_resnet20", {}, 10),
}
"""Name to backbone, arguments, steps a turn."""
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4)


class Images(CIFAR100Data):
    """CIFAR-100, or as many random pixels where it is not there."""

    def load_split(self, split: str) -> MemoryImages:
        """Images of the split."""
        if (Path(self.root) / self.DATASET.base_folder).is_dir():
            return super().load_split(split)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (10_000, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return MemoryImages(pixels, torch.arange(10_000) % self.CLASSES)


class PlainImages(Dataset):
    """The same images one by one through torchvision's transforms, as in most training scripts."""

    def __init__(self, images: MemoryImages, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.pixels, self.labels = images.pixels.permute(0, 2, 3, 1).numpy(), images.labels.tolist()
        steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class Steps(Callback):
    """Stops after the first epoch; `seconds` is the processor time of a step, from batch end to batch end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Notes the time."""
        self.ends.append(time.process_time())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LitClassifier) -> None:
        """Ends the run."""
        trainer.should_stop = True

    @property
    def seconds(self) -> float:
        """Mean over the steps of the epoch but the first."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


def endless(loader: Iterable) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch after the other."""
    while True:
        yield from loader


class BareLoop:
    """The usual loop: forward, cross-entropy, backward, optimizer, schedule."""

    def __init__(
        self, model: nn.Module, loader: Iterable, steps: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.model, self.batches, self.steps, self.clock = model.train(), endless(loader), steps, clock
        self.optimizer = SGD(model.parameters())
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10_000)

    def run(self) -> float:
        """Seconds of a step, mean over all but the first."""
        for step in range(self.steps):
            if step == 1:
                start = self.clock()
            images, labels = next(self.batches)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(images), labels).backward()
            self.optimizer.step()
            self.schedule.step()
        return (self.clock() - start) / (self.steps - 1)


def data_rows() -> list[Row]:
    """Images a second of both ways to get batches."""
    found = []
    for title, (backbone, arguments, steps) in NETWORKS.items():
        data = Images(batch_size=BATCH)
        resident = data.train_dataloader()
        plain = DataLoader(
            PlainImages(resident.images, data.mean, data.std),
            batch_size=BATCH,
            shuffle=True,
            drop_last=True,
            num_workers=1,
            persistent_workers=True,
        )
        loaders = {"resident": resident, "plain": plain}
        loops = {
            name: BareLoop(build_backbone(backbone, num_classes=100, **arguments), loader, steps)
            for name, loader in loaders.items()
        }
        taken = measured(loops)
        row = ratio_row(f"{title}: images/s, resident / plain DataLoader", taken["plain"], taken["resident"])
        speeds = [BATCH / statistics.median(taken[name]) for name in loaders]
        found.append(Row(row.name, row.ratio, row.spread, detail=f"{speeds[0]:,.0f} /s, {speeds[1]:,.0f} /s"))
    return found


def measured(loops: dict[str, BareLoop]) -> dict[str, list[float]]:
    """Seconds of a step by loop, in turns after one turn to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(TURNS + 1):
        for name, loop in loops.items():
            seconds = loop.run()
            taken[name] += [seconds] if turn else []
    return taken


def fit_seconds(backbone: str, arguments: dict, steps: int) -> float:
    """Processor seconds of a step inside `fit` with tracing, staged pruning and checkpoints on."""
    timer = Steps()
    with tempfile.TemporaryDirectory() as folder:
        data = Images(batch_size=BATCH, train_size=BATCH * steps, calibration_size=64)
        module = LitClassifier(backbone, 100, (3, 32, 32), arguments, optimizer=SGD, scheduler=PhaseCosine)
        traces = [AxisTrace(every_n_epochs=100, limit=64), GradientTrace(every_n_epochs=100, limit=64)]
        pruning = StagedPruning([ChannelStage(0.5, epoch=50)])
        trainer = Trainer(
            max_epochs=100,
            default_root_dir=folder,
            callbacks=[*traces, pruning, timer, last_checkpoint(Path(folder))],
            plugins=[checkpoint_writer()],
            accelerator="cpu",
            devices=1,
            logger=False,
            limit_val_batches=0,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(module, datamodule=data)
    return timer.seconds


def overhead_rows() -> list[Row]:
    """Step inside `fit` against the bare loop; both begin with a new network in each turn."""
    found = []
    for title, (backbone, arguments, steps) in NETWORKS.items():
        data = Images(batch_size=BATCH, train_size=BATCH * steps)
        fit, bare = [], []
        for turn in range(TURNS + 1):
            model = build_backbone(backbone, num_classes=100, **arguments)
            loop = BareLoop(model, data.train_dataloader(), steps, time.process_time)
            one, other = fit_seconds(backbone, arguments, steps), loop.run()
            fit, bare = (fit + [one], bare + [other]) if turn else (fit, bare)
        found.append(ratio_row(f"{title}: step in fit / bare step", fit, bare))
    return found


def checkpoint_rows() -> list[Row]:
    """Time that training waits for a checkpoint of ResNet-18 with its momentum."""
    model = build_backbone("resnet18", num_classes=100, stem="cifar")
    state = {"state_dict": model.state_dict(), "momentum": [p.detach().clone() for p in model.parameters()]}
    beside = checkpoint_writer()
    with tempfile.TemporaryDirectory() as folder:
        ways = {"beside": beside, "in place": WholeFileIO()}
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(TURNS + 1):
            for name, writer in ways.items():
                start = time.perf_counter()
                writer.save_checkpoint(state, str(Path(folder) / f"{name}.ckpt"))
                taken[name] += [time.perf_counter() - start] if turn else []
                writer.teardown()
    return [ratio_row("ResNet-18 checkpoint: wait, beside / in place", taken["beside"], taken["in place"])]


PARTS = {"data": data_rows, "overhead": overhead_rows, "checkpoint": checkpoint_rows}


def rows(names: list[str]) -> list[Row]:
    """Rows of the result table."""
    keep_freed_memory()
    torch.set_num_threads(1)
    return [row for name in choose(names, list(PARTS)) for row in PARTS[name]()]


if __name__ == "__main__":
    main(rows, __doc__)
