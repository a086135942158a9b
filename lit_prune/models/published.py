"""Weights that others published for the project's own networks: fetched by name, compared with a checksum, kept."""

import os
from dataclasses import dataclass
from pathlib import Path

from lit_prune.errors import InputError

AKAMASTER = (
    "https://raw.githubusercontent.com/akamaster/pytorch_resnet_cifar10/"
    "d5489e8995e81e91ce6b1d69dcc98ad579b0b153/pretrained_models/"
)
FOLDER = "LIT_PRUNE_WEIGHTS"
"""Variable of the environment that names the folder of fetched weights; default: `~/.cache/lit_prune/weights`."""


@dataclass(frozen=True)
class Published:
    """A file of weights.

    Attributes:
        url: where it is fetched from.
        sha256: of the file.
        classes: of its head.
        accuracy: on the test images of its data set, as published.
        mean: of each channel that its images were normalised with, on the scale 0..1.
        std: likewise.
        source: who published it, under what licence.
    """

    url: str
    sha256: str
    classes: int
    accuracy: float
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    source: str = "Y. Idelbayev, github.com/akamaster/pytorch_resnet_cifar10, BSD 2-Clause"


PUBLISHED = {
    "cifar_resnet20": Published(
        f"{AKAMASTER}resnet20-12fca82f.th",
        "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8",
        10,
        0.9173,
    ),
    "cifar_resnet32": Published(
        f"{AKAMASTER}resnet32-d509ac18.th",
        "d509ac1820d7f25398913559d7e81a13229b1e7adc5648e3bfa5e22dc137f850",
        10,
        0.9263,
    ),
    "cifar_resnet56": Published(
        f"{AKAMASTER}resnet56-4bfd9763.th",
        "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367",
        10,
        0.9339,
    ),
}
"""By backbone: CIFAR-10."""


def published_file(backbone: str) -> Path:
    """The file of a backbone's published weights, fetched where it is not there yet.

    Raises:
        InputError: nobody published any that we know of, the download failed, or the file is another one.
    """
    if backbone not in PUBLISHED:
        raise InputError(
            f"backbone {backbone!r} has no weights to download (there are some for {', '.join(PUBLISHED)}): use "
            "pretrained=False and a local file"
        )
    from lit_prune.data.download import fetch_file

    found = PUBLISHED[backbone]
    folder = Path(os.environ.get(FOLDER) or Path.home() / ".cache" / "lit_prune" / "weights")
    return fetch_file(found.url, found.sha256, folder / found.url.rpartition("/")[2])
