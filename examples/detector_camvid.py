"""A torchvision detector in one's own LightningModule: its losses fall, half of its MACs go, its losses fall again.

    python examples/detector_camvid.py --samples ../shared --epochs 9

Boxes around the cars, pedestrians and cyclists of `data/camvid`, from its label maps; the network starts at random, so
that a run takes minutes and no detection is good. With labels and boxes of your own only `boxes_of` changes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from scipy import ndimage
from torch.utils.data import DataLoader
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from lit_prune import ChannelStage, StagedPruning

CLASSES = (8, 9, 10)  # labels of cars, pedestrians, cyclists


def boxes_of(labels: np.ndarray) -> dict[str, torch.Tensor]:
    """A box around each connected region of a class that is 8 pixels wide and high."""
    found = []
    for kind, label in enumerate(CLASSES, 1):
        for rows, columns in ndimage.find_objects(ndimage.label(labels == label)[0]):
            if min(rows.stop - rows.start, columns.stop - columns.start) >= 8:
                found.append([columns.start, rows.start, columns.stop, rows.stop, kind])
    table = torch.tensor(found).reshape(-1, 5)
    return {"boxes": table[:, :4].float(), "labels": table[:, 4].long()}


def street_scene(file: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    image = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) / 255
    return image, boxes_of(np.asarray(Image.open(file.parents[1] / "labels" / f"{file.stem}.png")))


class Detector(LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.losses = ssdlite320_mobilenet_v3_large(weights_backbone=None, num_classes=len(CLASSES) + 1), {}

    def training_step(self, batch, _):
        loss = sum(self.net(*batch).values())
        self.losses.setdefault(self.current_epoch, []).append(loss.item())
        return loss

    def validation_step(self, batch, _):
        best = [found["scores"].max() for found in self.net(batch[0]) if len(found["scores"])]
        self.log("val/surest_box", torch.stack(best).mean() if best else 0.0, prog_bar=True, batch_size=len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, default="../shared")
    parser.add_argument("--folder", default="runs/detector_camvid")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--images", type=int, default=62, help="at most, of each split")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    files = [given.samples / "data/camvid" / split / "images" for split in ("train", "test")]
    scenes = [[street_scene(file) for file in sorted(folder.glob("*.webp"))[: given.images]] for folder in files]
    options = {"batch_size": 4, "collate_fn": lambda pairs: tuple(map(list, zip(*pairs, strict=True)))}
    train, test = DataLoader(scenes[0], shuffle=True, drop_last=True, **options), DataLoader(scenes[1], **options)
    module = Detector()
    pruning = StagedPruning([ChannelStage(given.keep, epoch=given.epochs // 2, score="cmr_logit", allocation="global")])
    Trainer(max_epochs=given.epochs, default_root_dir=given.folder, callbacks=[pruning]).fit(module, train, test)
    return [sum(losses) / len(losses) for losses in module.losses.values()]


if __name__ == "__main__":
    print("mean training loss of each epoch:", " ".join(f"{loss:.2f}" for loss in main()))
