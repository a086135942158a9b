"""ImageNet-100: a hundred classes of ImageNet, picked from the full tree or as a tree of their own."""

from importlib import resources
from pathlib import Path
from typing import Any

from lit_prune.data.folder import SPLITS, ImageFolderData
from lit_prune.data.sources import list_folders
from lit_prune.errors import InputError


def published_classes() -> tuple[str, ...]:
    """The hundred wnids of Tian et al. (Contrastive Multiview Coding, 2020), sorted."""
    text = resources.files("lit_prune.data").joinpath("imagenet100_classes.txt").read_text()
    return tuple(sorted(line for line in text.splitlines() if line and not line.startswith("#")))


class ImageNet100Data(ImageFolderData):
    """ImageNet-100 (Tian et al. 2020): about 126,000 training and 5,000 validation photographs, 100 classes.

    Expects `root/train/<wnid>/` and `root/val/<wnid>/`. Of a tree that holds the hundred published classes, such as the
    full ImageNet, those are used and all others ignored; a tree of any hundred classes is used as it is. There is no
    download: ImageNet asks for registration. Labels follow the sorted wnids.

    Args:
        root: Folder that holds `train/` and `val/`.
        **options: Those of every folder of images.

    Raises:
        InputError: `root` holds neither.
    """

    CLASSES = 100

    def __init__(self, root: str = "data/imagenet", **options: Any) -> None:
        super().__init__(root=root, **options)

    def find_classes(self) -> tuple[str, ...]:
        """The published classes where all are there, else the hundred that are."""
        found = next((names for split in SPLITS if (names := list_folders(Path(self.root) / split))), [])
        published = published_classes()
        if set(published) <= set(found):
            return published
        if len(found) == self.CLASSES:
            return tuple(found)
        missing = len(set(published) - set(found))
        raise InputError(
            f"root={self.root} has {len(found)} class folders, {missing} of the 100 published ones missing; expected"
            f" {self.root}/train/<wnid>/ and {self.root}/val/<wnid>/ (ImageNet is from image-net.org, no download here)"
        )

    @property
    def ignores_classes(self) -> bool:
        """True: the other classes of a full ImageNet are left out."""
        return True
