"""The digit images that come with scikit-learn: the data set that needs no file and no network."""

import torch
from sklearn.datasets import load_digits

from lit_prune.data.calibration import stratified_order
from lit_prune.data.grey import GreyDigits
from lit_prune.data.seeding import seeded_generator
from lit_prune.data.sources import MemoryImages

TEST_IMAGES = 360  # a fifth; scikit-learn ships no split
GREY_LEVELS = 16  # pixels are counts 0..16 of 4x4 bitmap blocks


class DigitsData(GreyDigits):
    """Handwritten digits (Alpaydin, Kaynak 1998, as in scikit-learn): 1,437 training and 360 test images of 8x8 pixels.

    The split is class-balanced and always the same, whatever `seed`; `root` and `download` are not used.

    The arguments are those of `GreyDigits`.
    """

    SIDE = 8
    GREY = (0.3047, 0.3235)  # at 32x32

    def load_split(self, split: str) -> MemoryImages:
        """Images of the split in memory, resized."""
        grey, labels = load_digits(return_X_y=True)  # [1797, 64], 0..16
        pixels = torch.from_numpy(grey).view(-1, 1, 8, 8).mul(255 / GREY_LEVELS).round().to(torch.uint8)
        targets = torch.from_numpy(labels).long()
        order = stratified_order(targets, seeded_generator(0, "digits"))
        chosen = (order[TEST_IMAGES:] if split == "train" else order[:TEST_IMAGES]).sort().values
        return self._resized(pixels[chosen], targets[chosen])
