"""Small image trees and in-memory data sets."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_prune.data.images import ImageData
from lit_prune.data.sources import MemoryImages


class RandomData(ImageData):
    """Random 3x8x8 images, 96 for training and 37 for testing."""

    CLASSES = 4
    TRAIN, TEST = 96, 37
    image_shape = (3, 8, 8)

    def load_split(self, split: str) -> MemoryImages:
        count = self.TRAIN if split == "train" else self.TEST
        generator = torch.Generator().manual_seed(count)
        pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
        self.classes = tuple("abcd")
        return MemoryImages(pixels, torch.randint(0, 4, (count,), generator=generator))


@pytest.fixture
def random_data() -> type[ImageData]:
    return RandomData


@pytest.fixture
def write_image() -> Callable[..., Path]:
    """Writes one random image; grey with `channels=1`."""

    def write(file: Path, seed: int = 0, size: tuple[int, int] = (16, 16), channels: int = 3) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = size if channels == 1 else (*size, channels)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(file)
        return file

    return write


@pytest.fixture
def image_tree(tmp_path: Path, write_image: Callable[..., Path]) -> Path:
    """Folder with train/{ant,bee,cat} of 6 PNG images each and test/ of 3 each, 16x16."""
    for split, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(("cat", "ant", "bee")):
            for i in range(count):
                write_image(tmp_path / "tree" / split / name / f"{i}.png", seed=100 * label + 10 * count + i)
    return tmp_path / "tree"
