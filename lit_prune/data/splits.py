"""The splits of a data set: which there are, how the training split is divided, that labels fit."""

from lightning import LightningDataModule
from torch import Tensor

from lit_prune.data.sampling import seeded_generator, stratified_order
from lit_prune.data.sources import ImageSource, check_label_range
from lit_prune.errors import InputError

STAGE_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}


class Splits(LightningDataModule):
    """Splits by name, each loaded once, the first time that it is asked for.

    Attributes:
        root: folder that holds the data set.
        seed: of the division.
        train_size: training images that are kept, class-balanced; None keeps all.
        val_size: training images held out for validation.
        num_classes: that labels must lie below.
        train_positions: places of the training images in the official split, int64 [N], once it is loaded.
    """

    root: str
    seed: int
    train_size: int | None
    val_size: int
    num_classes: int
    train_positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[str, ImageSource] = {}

    def _check_shape(self) -> None:
        """Refuses images that the settings do not fit, before anything is loaded."""
        raise NotImplementedError

    def load_split(self, split: str) -> ImageSource:
        """Images of an official split.

        Args:
            split: `"train"`, `"test"`, or `"val"` where `has_validation`.

        Raises:
            InputError: The files are missing or damaged.
        """
        raise NotImplementedError

    @property
    def has_validation(self) -> bool:
        """Whether the data set has a validation split beside its test split."""
        return False

    @property
    def available_splits(self) -> tuple[str, ...]:
        """The splits that `load_split` can give, and validation."""
        return "train", "val", "test"

    def setup(self, stage: str | None = None) -> None:
        """Loads the splits of `stage` (all for None), once; without a trainer it also prepares the data.

        Raises:
            InputError: Files are missing or damaged, or the sizes asked for exceed the training split.
        """
        if self.trainer is None:
            self.prepare_data()
        for split in STAGE_SPLITS.get(str(stage), self.available_splits):
            self._source(split)

    def _stored_as(self, split: str) -> str:
        return "test" if split == "val" and not self.val_size and not self.has_validation else split

    def _source(self, split: str) -> ImageSource:
        split = self._stored_as(split)
        if split not in self._sources:
            if split == "train" or (split == "val" and self.val_size):
                self._divide_training_split()
            else:
                self._sources[split] = self._checked(split)
        return self._sources[split]

    def _checked(self, split: str) -> ImageSource:
        self._check_shape()
        source = self.load_split(split)
        check_label_range(source.labels, self.num_classes, f"the {split} split in {self.root}")
        return source

    def _divide_training_split(self) -> None:
        source = self._checked("train")
        total, wanted = len(source.labels), self.val_size + (self.train_size or 1)
        if wanted > total:
            raise InputError(
                f"train_size={self.train_size} with val_size={self.val_size} needs {wanted} images, the training split"
                f" has {total}; lower one of them"
            )
        order = stratified_order(source.labels, seeded_generator(self.seed, "split"))
        held_out, rest = order[: self.val_size].sort().values, order[self.val_size :]
        if self.val_size:
            self._sources["val"] = source.subset(held_out)
        self.train_positions = rest[: self.train_size].sort().values  # in the official training split, int64 [N]
        whole = len(self.train_positions) == total
        self._sources["train"] = source if whole else source.subset(self.train_positions)

    def size(self, split: str) -> int:
        """Number of images that a split of `available_splits` has."""
        return len(self._source(split).labels)

    @property
    def validation_split(self) -> str:
        """The split that validation really reads: `val`, or `test` where there is neither `val_size` nor `val`."""
        return self._stored_as("val")
