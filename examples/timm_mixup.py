"""A timm network in one's own module: mixup, OneCycleLR, plain DataLoaders; half of its MACs go at a third of the run.

    python examples/timm_mixup.py --network resnet18 --epochs 9

Digits of scikit-learn stand for the data. The schedule goes on over the cut where it was; with `--fresh` the optimizer
is made anew and its OneCycleLR fits the epochs that are left.
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from timm.data import Mixup
from torch.utils.data import DataLoader, TensorDataset

from lit_prune import ChannelStage, Repair, StagedPruning


class Digits(LightningModule):
    def __init__(self, network: str, lr: float):
        super().__init__()
        self.model = timm.create_model(network, num_classes=10, in_chans=1)
        self.mixup = Mixup(mixup_alpha=0.2, num_classes=10, label_smoothing=0.1)
        self.lr = lr

    def training_step(self, batch, _):
        images, soft = self.mixup(batch[0].clone(), batch[1])
        return -(soft * self.model(images).log_softmax(1)).sum(1).mean()

    def validation_step(self, batch, _):
        logits = self.model(batch[0])
        self.log("val/acc", (logits.argmax(1) == batch[1]).float().mean(), prog_bar=True)
        self.log("val/ce", F.cross_entropy(logits, batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--folder", default="runs/timm_mixup")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--fresh", action="store_true")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    digits = load_digits()
    images = F.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, size=32)
    data = TensorDataset(images, torch.tensor(digits.target))
    train = torch.utils.data.Subset(data, range(given.images))
    test = torch.utils.data.Subset(data, range(given.images, min(len(data), 2 * given.images)))
    pruning = StagedPruning(
        [ChannelStage(given.keep, epoch=given.epochs // 3, score="taylor")],
        monitor="val/acc",
        repair=Repair(alpha=0.1, beta=0.1, form="kl"),
        optimizer="anew" if given.fresh else None,
    )
    trainer = Trainer(max_epochs=given.epochs, default_root_dir=given.folder, callbacks=[pruning])
    loaders = DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=256)
    trainer.fit(Digits(given.network, lr=2e-3), *loaders)
    return pruning.records[-1]["val/acc"]


if __name__ == "__main__":
    print(main())
