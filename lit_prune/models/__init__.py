"""Networks by name, their weights, and their anatomy: blocks, stages, protected units."""

from lit_prune.models.anatomy import drop_blocks, dropped_by_keep_configuration, find_blocks, find_head
from lit_prune.models.cifar_resnet import PaddedShortcut
from lit_prune.models.families import Block
from lit_prune.models.registry import (
    backbone_names,
    build_backbone,
    build_network,
    check_forward,
    taken_arguments,
)
from lit_prune.models.weights import LoadReport, load_weights

__all__ = [
    "Block",
    "LoadReport",
    "PaddedShortcut",
    "backbone_names",
    "build_backbone",
    "build_network",
    "check_forward",
    "drop_blocks",
    "dropped_by_keep_configuration",
    "find_blocks",
    "find_head",
    "load_weights",
    "taken_arguments",
]
