"""Any data set that is a folder of class folders."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_prune.data.augmentation import Augmentation, ResizedCropFlip
from lit_prune.data.images import ImageData
from lit_prune.data.sources import FileImages, describe_conversions, list_class_folders, list_folders
from lit_prune.errors import InputError

SPLITS = ("train", "val", "test")


class ImageFolderData(ImageData):
    """Images as `root/{train,val,test}/<class>/<image>`; labels follow the sorted class folders.

    Where only one of `val/` and `test/` is there it serves as both. There are two ways to use it:

    - `resident: false` (default) for photographs: worker processes decode; training images are random resized crops,
      mirrored; the others are resized to 256/224 of `resolution` (short side) and cut to the centre.
    - `resident: auto` or `true` for small images: all are decoded once into memory, resized (short side) and cut to
      `resolution`, and then treated like CIFAR: pad, crop, mirror. With `auto` that does not fit, workers do the same.

    Args:
        root: Folder that holds `train/`, and `val/` or `test/`.
        resolution: Height and width of the images in a batch.
        resident: Which of the two ways, and where images in memory live: see above and the option of every data set.
        **options: Those of every data set; `pad` and `padding` are used with images in memory only.

    Raises:
        InputError: `root` holds no split with class folders.
    """

    def __init__(
        self,
        root: str = "data",
        resolution: int = 224,
        resident: Literal["auto"] | bool = False,
        **options: Any,
    ) -> None:
        super().__init__(root=root, resident=resident, **options)
        self.resolution = resolution
        self.image_shape = (3, resolution, resolution)
        self.classes = self.find_classes()
        self.num_classes = len(self.classes)

    def find_classes(self) -> tuple[str, ...]:
        """Class folders of the training split, sorted; of another split where there is no `train/`."""
        for split in SPLITS:
            if names := list_folders(Path(self.root) / split):
                return tuple(names)
        raise InputError(
            f"root={self.root} has no class folders; expected {self.root}/train/<class>/<image> and val/ or test/"
            " likewise; set root to such a folder (there is no download)"
        )

    @property
    def has_validation(self) -> bool:
        """Whether `val/` and `test/` are both there."""
        return all((Path(self.root) / split).is_dir() for split in ("val", "test"))

    @property
    def available_splits(self) -> tuple[str, ...]:
        """The splits whose folders are there."""
        present = [split for split in SPLITS if (Path(self.root) / split).is_dir()]
        held_out = present[-1] != "train"
        available = {"train": "train" in present, "val": held_out or self.val_size > 0, "test": held_out}
        return tuple(split for split in SPLITS if available[split])

    def load_split(self, split: str) -> FileImages:
        """Files of the split."""
        other = {"test": "val"}.get(split, split)
        folder = next((place for name in (split, other) if (place := Path(self.root) / name).is_dir()), None)
        if folder is None:
            raise InputError(f"root={self.root} has no folder {split}/; expected {self.root}/{split}/<class>/<image>")
        unknown = sorted(set(list_folders(folder)) - set(self.classes))
        if unknown and not self.ignores_classes:
            raise InputError(f"{folder} has the class {unknown[0]}, which the training split lacks; remove that folder")
        files, labels = list_class_folders(folder, self.classes)
        if said := describe_conversions(files):
            rank_zero_info(f"{folder}: {said}")
        return FileImages(tuple(files), torch.tensor(labels), self.resolution, self.short_side)

    @property
    def short_side(self) -> int:
        """256/224 of the resolution for photographs; the resolution itself with images in memory."""
        return round(self.resolution * 256 / 224) if self.resident is False else self.resolution

    @property
    def ignores_classes(self) -> bool:
        """Whether class folders beside those of `classes` are left out rather than refused."""
        return False

    def augmentation(self, stream: str) -> Augmentation:
        """Random resized crops of files, or padded crops of images in memory; see the class."""
        if self.resident is False:
            return ResizedCropFlip(self.resolution, self.seed, stream, self.flip)
        return super().augmentation(stream)
