"""ESPNet on street scenes in one's own LightningModule: watched on two axes, cut to 70 % of its MACs, repaired briefly.

    python examples/espnet_camvid.py --samples ../shared --keep 0.7 --epochs 4

`--samples` holds `data/camvid` (images and label maps), trained weights and `tools/real_networks.py`, which builds the
network. Prints the mean intersection over union of the test images before, after surgery, and after the repair.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex

from lit_prune import AxisTrace, ChannelStage, Repair, StagedPruning
from lit_prune.task import Segmentation

VOID = 11


class StreetScenes(LightningModule):
    def __init__(self, network: torch.nn.Module, lr: float):
        super().__init__()
        self.net, self.lr = network, lr
        self.miou = MulticlassJaccardIndex(VOID + 1, ignore_index=VOID)

    def training_step(self, batch, _):
        images, labels = (x.flip(-1) for x in batch) if torch.rand(()) < 0.5 else batch
        return F.cross_entropy(self.net(images), labels, ignore_index=VOID)

    def validation_step(self, batch, _):
        self.miou.update(self.net(batch[0]), batch[1])
        self.log("val/miou", self.miou, prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def street_scene(file: Path, every: int, prepare) -> tuple[torch.Tensor, torch.Tensor]:
    """An image and its label map, every so many pixels, of a height that the network takes."""
    image, labels = Image.open(file).convert("RGB"), Image.open(file.parents[1] / "labels" / f"{file.stem}.png")
    rows = slice(None, image.height // (8 * every) * 8 * every, every)
    image, labels = (np.asarray(x)[rows, ::every] for x in (image, labels))
    return prepare(image), torch.from_numpy(labels.astype("int64"))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, default="../shared")
    parser.add_argument("--folder", default="runs/espnet_camvid")
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--epochs", type=int, default=4, help="of repair")
    parser.add_argument("--images", type=int, default=100, help="at most, of each split")
    parser.add_argument("--every", type=int, default=1, help="take every so many pixels")
    given = parser.parse_args(arguments)
    sys.path.insert(0, str(given.samples / "tools"))
    from real_networks import camvid_input, espnet_camvid

    torch.manual_seed(0)
    folders = [given.samples / "data" / "camvid" / split / "images" for split in ("train", "test")]
    files = [sorted(folder.glob("*.webp"))[: given.images] for folder in folders]
    train, test = ([street_scene(file, given.every, camvid_input) for file in split] for split in files)
    measured = {"task": Segmentation(VOID), "calibration": DataLoader(train, batch_size=4)}
    stage = ChannelStage(given.keep, score="reconstruction", allocation="measured", replace="refit")
    pruning = StagedPruning([stage], monitor="val/miou", repair=Repair(form="kl"), **measured)
    callbacks = [AxisTrace(**measured), pruning]
    trainer = Trainer(max_epochs=given.epochs, default_root_dir=given.folder, callbacks=callbacks)
    loaders = DataLoader(train, batch_size=4, shuffle=True), DataLoader(test, batch_size=4)
    trainer.fit(StreetScenes(espnet_camvid().train(), lr=5e-5), *loaders)
    return pruning.records[-1]["val/miou"]


if __name__ == "__main__":
    print(main())
