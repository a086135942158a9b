"""Somebody's own segmentation module on CamVid: traced, cut in the middle of training, repaired; mIoU all the way.

    python examples/segmentation.py --data CAMVID --network package.module:function --epochs 6 --keep 0.7

The network is any that maps images [B, 3, H, W] to logits [B, C, H, W] (trained, such as an ESPNet). Nothing in the
module knows of lit_prune: both callbacks find the network, the images it really gets, its loss and its metric.
"""

import argparse
import importlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchmetrics import JaccardIndex

from lit_prune import AxisTrace, ChannelStage, Repair, StagedPruning

MEAN, STD = torch.tensor([105.03, 108.41, 110.33]), torch.tensor([69.90, 72.69, 72.13])
VOID, CLASSES = 11, 11


class CamVid(Dataset):
    def __init__(self, folder: Path, limit: int | None):
        self.images = sorted((folder / "images").iterdir())[:limit]
        self.labels = sorted((folder / "labels").iterdir())[:limit]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, place):
        image = torch.from_numpy(np.array(Image.open(self.images[place]).convert("RGB")))
        return image.permute(2, 0, 1), torch.from_numpy(np.array(Image.open(self.labels[place]))).long()


class Segmentation(LightningModule):
    def __init__(self, net: torch.nn.Module, lr: float):
        super().__init__()
        self.net, self.lr = net, lr
        self.iou = JaccardIndex("multiclass", num_classes=CLASSES + 1, ignore_index=VOID, average="none")

    def forward(self, pixels):  # the network's own preprocessing: standardised, BGR, divided by 255
        pixels = (pixels.float() - MEAN[:, None, None]) / STD[:, None, None] / 255
        return self.net(pixels.flip(1))

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1], ignore_index=VOID)

    def validation_step(self, batch, _):
        self.iou.update(self(batch[0])[:, :CLASSES].argmax(1), batch[1])

    def on_validation_epoch_end(self):
        self.log("val/miou", self.iou.compute()[:CLASSES].mean(), prog_bar=True)
        self.iou.reset()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/{images,labels}")
    parser.add_argument("--network", required=True, help="package.module:function that gives a trained network")
    parser.add_argument("--folder", default="runs/segmentation")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--limit", type=int, help="images of each split")
    given = parser.parse_args(arguments)
    package, function = given.network.split(":")
    module = Segmentation(getattr(importlib.import_module(package), function)(), lr=5e-4)
    stage = ChannelStage(given.keep, epoch=0, score="composite_ix", replace="refit")
    pruning = StagedPruning([stage], monitor="val/miou", calibration=8, repair=Repair(0.5, 0.0, form="kl"))
    trainer = Trainer(max_epochs=given.epochs, default_root_dir=given.folder, callbacks=[AxisTrace(limit=8), pruning])
    splits = (CamVid(given.data / split, given.limit) for split in ("train", "test"))
    trainer.fit(module, *(DataLoader(s, batch_size=4, shuffle=i == 0) for i, s in enumerate(splits)))
    return pruning.records[-1]["val/miou"]


if __name__ == "__main__":
    print(main())
