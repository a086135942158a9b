"""Padded shortcuts: no weights, a table that ties the two sides."""

from collections.abc import Sequence
from typing import Any, ClassVar

from lit_prune.models.cifar_resnet import PaddedShortcut
from lit_prune.structure.layers.base import LayerType, register_layer


@register_layer("padded shortcut")
class Shortcut(LayerType):
    """Option A shortcuts: both sides lose channels independently."""

    modules = (PaddedShortcut,)
    sort = "mixing"
    stated: ClassVar = {"out": "out_channels", "in": "in_channels"}
    parameters = ()
    is_trunk = True

    def cut(self, module: Any, axis: str, positions: Sequence[int]) -> None:
        """Entries of the table."""
        (module.prune_out if axis == "out" else module.prune_in)(positions)
