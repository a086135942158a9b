"""Tiny-ImageNet, in the layout of its archive or as class folders."""

import os
from pathlib import Path
from typing import Any

import torch

from lit_prune.data.download import download_folder
from lit_prune.data.images import ImageData
from lit_prune.data.sources import FileImages, list_class_folders, list_folders
from lit_prune.errors import InputError


class TinyImageNetData(ImageData):
    """Tiny-ImageNet (Stanford CS231n): 100,000 training and 10,000 validation images of 64x64 pixels, 200 classes.

    Expects `root/tiny-imagenet-200/` (or `root` itself) with `train/<wnid>/images/` or `train/<wnid>/`, and
    `val/images/` with `val/val_annotations.txt` or `val/<wnid>/`; `download` fetches it. Labels follow the sorted
    wnids. The official test images have no labels, so validation images serve as the test split.

    Args:
        resolution: Height and width after bilinear resizing (antialiased); null keeps 64.
        **options: Those of every data set.
    """

    URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
    CLASSES = 200
    MEAN = (0.4802, 0.4481, 0.3975)
    STD = (0.2770, 0.2691, 0.2821)

    def __init__(self, resolution: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.resolution = 64 if resolution is None else resolution
        self.image_shape = (3, self.resolution, self.resolution)

    @property
    def folder(self) -> Path:
        """Folder with `train/` and `val/`."""
        root = Path(self.root)
        inner = root / "tiny-imagenet-200"
        return root if (root / "train").is_dir() and not inner.is_dir() else inner

    def prepare_data(self) -> None:
        """Downloads, verifies and unpacks the archive where asked for and missing.

        Raises:
            InputError: The download failed; nothing is left behind.
        """
        if self.download and not self.folder.is_dir():
            download_folder(self.URL, self.MD5, self.folder)

    def load_split(self, split: str) -> FileImages:
        """Files of the split; `"test"` is the official validation split."""
        self.classes = tuple(list_folders(self.folder / "train"))
        if len(self.classes) != self.num_classes:
            raise InputError(
                f"{self.folder}/train has {len(self.classes)} of {self.num_classes} class folders; expected"
                " train/<wnid>/images/*.JPEG and val/images/*.JPEG with val/val_annotations.txt;"
                " set download to true (a broken folder must be removed first) or root to the folder that holds it"
            )
        annotations = self.folder / "val" / "val_annotations.txt"
        if split != "train" and annotations.is_file() and (self.folder / "val" / "images").is_dir():
            files, labels = self._read_annotations(annotations)
        else:
            files, labels = list_class_folders(self.folder / ("train" if split == "train" else "val"), self.classes)
        return FileImages(tuple(files), torch.tensor(labels), self.resolution, self.resolution)

    def _read_annotations(self, file: Path) -> tuple[list[str], list[int]]:
        """Paths and labels from lines of file name, wnid and bounding box, separated by tabs."""
        label_of = {name: label for label, name in enumerate(self.classes)}
        rows = [line.split("\t") for line in file.read_text().splitlines() if line.strip()]
        unknown = [row[0] for row in rows if len(row) < 2 or row[1] not in label_of]
        if unknown or not rows:
            raise InputError(f"{file} gives no known class for {unknown[:1] or 'any image'}; replace the file")
        folder = str(file.parent / "images")
        return [os.path.join(folder, row[0]) for row in rows], [label_of[row[1]] for row in rows]
