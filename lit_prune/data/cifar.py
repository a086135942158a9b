"""CIFAR-10 and CIFAR-100 as distributed by their author, read by torchvision."""

from pathlib import Path

import torch
import torchvision

from lit_prune.data.download import no_empty_folder
from lit_prune.data.images import ImageData
from lit_prune.data.sources import MemoryImages
from lit_prune.errors import InputError


class CIFAR10Data(ImageData):
    """CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32x32 pixels, 10 classes.

    Expects `root/cifar-10-batches-py/`; `download` fetches it.
    """

    DATASET = torchvision.datasets.CIFAR10
    CLASSES = 10
    MEAN = (0.4914, 0.4822, 0.4465)
    STD = (0.2470, 0.2435, 0.2616)

    image_shape = (3, 32, 32)

    def prepare_data(self) -> None:
        """Downloads the archive where asked for and missing. InputError: The download failed."""
        if not self.download:
            return
        try:
            with no_empty_folder(Path(self.root)):
                self.DATASET(self.root, download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"download of {self.DATASET.url} failed ({error}); check the connection or unpack the archive by hand"
                f" into {self.root}"
            ) from error

    def load_split(self, split: str) -> MemoryImages:
        """Images of the split in memory."""
        try:
            dataset = self.DATASET(self.root, train=split == "train")
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"root={self.root} has no intact folder {self.DATASET.base_folder}/ with the files"
                f" {', '.join(name for name, _ in self.DATASET.train_list + self.DATASET.test_list)};"
                " set download to true or root to the folder that holds it"
            ) from error
        self.classes = tuple(dataset.classes)
        pixels = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()  # uint8 [N, 3, 32, 32]
        return MemoryImages(pixels, torch.tensor(dataset.targets))


class CIFAR100Data(CIFAR10Data):
    """CIFAR-100 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32x32 pixels, 100 fine classes.

    Expects `root/cifar-100-python/`; `download` fetches it.
    """

    DATASET = torchvision.datasets.CIFAR100
    CLASSES = 100
    MEAN = (0.5071, 0.4865, 0.4409)
    STD = (0.2673, 0.2564, 0.2762)
