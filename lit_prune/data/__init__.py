"""Data modules: one class a data set, all with the loaders of `ImageData`."""

from lit_prune.data.boolean_circuit import BooleanCircuitData
from lit_prune.data.cifar import CIFAR10Data, CIFAR100Data
from lit_prune.data.digits import DigitsData, MNISTData
from lit_prune.data.folder import ImageFolderData
from lit_prune.data.imagenet100 import ImageNet100Data
from lit_prune.data.images import ImageData
from lit_prune.data.tiny_imagenet import TinyImageNetData
from lit_prune.registry import import_files

__all__ = [
    "BooleanCircuitData",
    "CIFAR10Data",
    "CIFAR100Data",
    "DigitsData",
    "ImageData",
    "ImageFolderData",
    "ImageNet100Data",
    "MNISTData",
    "TinyImageNetData",
]

import_files(__file__, __package__)
