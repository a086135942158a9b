"""A torchvision detector in one's own module: its training losses fall again after a part of it is cut away.

    python examples/detection.py --epochs 4

Made-up scenes of bright boxes stand for the data. In training a torchvision detector returns losses, not predictions,
so there is nothing to distil: alpha = beta = 0, and the loss is the figure.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from lit_prune import ChannelStage, Repair, StagedPruning


class Scenes(Dataset):
    """One to three bright boxes on noise, each with its class: wide or tall."""

    def __init__(self, count: int, size: int, seed: int):
        self.count, self.size, self.seed = count, size, seed

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        random = torch.Generator().manual_seed(self.seed * 100_003 + place)
        image = 0.2 * torch.rand(3, self.size, self.size, generator=random)
        boxes, labels = [], []
        for _ in range(int(torch.randint(1, 4, (), generator=random))):
            label = int(torch.randint(1, 3, (), generator=random))
            width, height = (80, 40) if label == 1 else (40, 80)
            x, y = (int(torch.randint(0, self.size - side, (), generator=random)) for side in (width, height))
            image[label, y : y + height, x : x + width] += 0.7
            boxes.append([x, y, x + width, y + height])
            labels.append(label)
        return image, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)}


class Detector(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)

    def training_step(self, batch, _):
        loss = sum(self.net(*batch).values())
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]), prog_bar=True)
        return loss

    def validation_step(self, batch, _):
        self.net.train()  # torchvision gives losses in training mode only
        self.log("val/loss", sum(self.net(*batch).values()), batch_size=len(batch[0]), prog_bar=True)
        self.net.eval()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/detection")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--keep", type=float, default=0.7)
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    stage = ChannelStage(given.keep, epoch=given.epochs // 2, score="magnitude")
    pruning = StagedPruning([stage], monitor="val/loss", mode="min", calibration=4, repair=Repair(0.0, 0.0))
    trainer = Trainer(max_epochs=given.epochs, default_root_dir=given.folder, callbacks=[pruning])
    options = {"batch_size": 4, "collate_fn": lambda samples: tuple(map(list, zip(*samples, strict=True)))}
    trainer.fit(Detector(), *(DataLoader(Scenes(given.images, 320, seed), **options) for seed in (0, 1)))
    return pruning.records[-1]["val/loss"]


if __name__ == "__main__":
    print(main())
