"""LightningModules as their owners write them, with nothing of ours inside; tiny, on random tensors."""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lit_prune import ChannelStage, Repair, StagedPruning

MEAN, STD = 40.0, 25.0


def pruning(epoch: int = 1, **options) -> StagedPruning:
    """One cheap stage."""
    options = {"recalibration_batches": 1, "repair": Repair(ramp=False), **options}
    return StagedPruning([ChannelStage(0.6, epoch, score="magnitude")], **options)


def network(classes: int = 4) -> nn.Module:
    """Three convolutions and a head on images [B, 3, 8, 8]."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


def images(count: int = 48) -> torch.Tensor:
    """Pixel values from 0 to 100, channels of different scales."""
    generator = torch.Generator().manual_seed(0)
    return 100 * torch.rand(count, 3, 8, 8, generator=generator) ** torch.tensor([1.0, 2.0, 4.0])[:, None, None]


class Classifier(LightningModule):
    """Normalises inside `forward`, logs its own accuracy, brings its own optimizer and schedule."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = network(width)
        self.seen: list[torch.Tensor] = []

    def forward(self, pixels):
        return self.net((pixels - MEAN) / STD)

    def training_step(self, batch, batch_idx):
        pixels, labels = batch
        loss = F.cross_entropy(self(pixels), labels)
        self.log("train/own", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        pixels, labels = batch
        logits = self(pixels)
        self.log_dict(
            {"val/acc": (logits.argmax(1) == labels).float().mean(), "val/ce": F.cross_entropy(logits, labels)}
        )

    def test_step(self, batch, batch_idx):
        self.log("test/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Itself(LightningModule):
    """No network apart: the layers lie in the module, and its own `forward` says how they follow each other."""

    def __init__(self, width: int = 8):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.branches = nn.ModuleDict({name: nn.Conv2d(width, 12, 3, padding=1) for name in ("left", "right")})
        self.head = nn.Linear(12, 4)
        self.share = nn.Parameter(torch.tensor(0.3))
        self.temperature, self.features = 1.0, None
        self.sides, self.join = [self.branches["left"], self.branches["right"]], self.joined
        self.accuracy = MulticlassAccuracy(4)

    def joined(self, maps):
        left, right = (branch(maps) for branch in self.sides)
        return torch.relu(self.share * left + (1 - self.share) * right)

    def forward(self, pixels):
        self.features = self.join(self.stem((pixels - MEAN) / STD)).mean((2, 3))
        if self.training:
            return self.head(self.features) / self.temperature
        return self.head(self.features)

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("train/acc", self.accuracy, on_epoch=True)
        return F.cross_entropy(logits, batch[1]) + 1e-3 * self.features.square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class OneCycle(Classifier):
    """With a schedule made for the whole run."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Transferring(Classifier):
    """Normalises on the way to the device instead."""

    def forward(self, pixels):
        return self.net(pixels)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] - MEAN) / STD, batch[1]


class DictModule(Classifier):
    """Dict batches, and a dict as the result of the step."""

    def training_step(self, batch, batch_idx):
        return {"loss": F.cross_entropy(self(batch["image"]), batch["label"]), "more": 1}

    def validation_step(self, batch, batch_idx):
        self.log("val/acc", (self(batch["image"]).argmax(1) == batch["label"]).float().mean())


class Segmenter(LightningModule):
    """Per-pixel classes, a dict of outputs."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mid = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 10, 3, padding=1)
            self.norm, self.head = nn.BatchNorm2d(10), nn.Conv2d(10, 3, 1)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return {"out": self.head(torch.relu(self.norm(self.mid(x)))), "features": x}

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = self.Net()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0] / 100)["out"], batch[1])

    def validation_step(self, batch, batch_idx):
        right = (self.model(batch[0] / 100)["out"].argmax(1) == batch[1]).float().mean()
        self.log("val/pixels", right)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Manual(Classifier):
    """Optimizes by itself: two optimizers, and a term that callbacks add."""

    def __init__(self, takes_term: bool = True):
        super().__init__()
        self.automatic_optimization = False
        self.takes_term = takes_term
        self.critic = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        from lit_prune import added_loss

        first, second = self.optimizers()
        self.toggle_optimizer(first)
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        if self.takes_term:
            loss = loss + added_loss(self)
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        loss = self.critic(logits.detach()).square().mean()
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        self.untoggle_optimizer(second)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9), torch.optim.Adam(self.critic.parameters())


class Dicts(Dataset):
    """Samples as dicts."""

    def __init__(self):
        self.images = images()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, place):
        return {"image": self.images[place], "label": place % 4}


def loaders(kind: str = "pairs"):
    """Training and validation loader."""
    pixels = images()
    targets = {"pairs": torch.arange(48) % 4, "pixels": torch.randint(0, 3, (48, 8, 8))}
    data = Dicts() if kind == "dicts" else TensorDataset(pixels, targets[kind])
    return DataLoader(data, batch_size=16), DataLoader(data, batch_size=16)


def trainer(folder, *callbacks, epochs: int = 3, **options):
    """A quiet trainer on the CPU."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"devices": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    return Trainer(default_root_dir=folder, max_epochs=epochs, callbacks=list(callbacks), **(quiet | options))
