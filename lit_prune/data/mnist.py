"""MNIST, read by torchvision and scaled up to the size that image networks expect."""

from pathlib import Path

import torchvision

from lit_prune.data.digits import GreyDigits
from lit_prune.data.download import no_empty_folder
from lit_prune.data.sources import MemoryImages
from lit_prune.errors import InputError


class MNISTData(GreyDigits):
    """MNIST (LeCun, Cortes): 60,000 training and 10,000 test images of handwritten digits, 28x28 pixels, grey.

    Expects `root/MNIST/raw/` with the four idx files; `download` fetches them.

    The arguments are those of `GreyDigits`.
    """

    SIDE = 28
    GREY = (0.1307, 0.3081)

    def prepare_data(self) -> None:
        """Downloads the four files where asked for and missing.

        Raises:
            InputError: The download failed.
        """
        if not self.download:
            return
        try:
            with no_empty_folder(Path(self.root) / "MNIST" / "raw"):
                torchvision.datasets.MNIST(self.root, download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"download of MNIST failed ({' '.join(str(error).split())}); check the connection or put the files by"
                f" hand into {self.root}/MNIST/raw"
            ) from error

    def load_split(self, split: str) -> MemoryImages:
        """Images of the split in memory, resized."""
        try:
            dataset = torchvision.datasets.MNIST(self.root, train=split == "train")
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"root={self.root} has no MNIST/raw/ with the four files *-ubyte; set download to true or root to the"
                " folder that holds MNIST/"
            ) from error
        return self._resized(dataset.data[:, None], dataset.targets.long())
