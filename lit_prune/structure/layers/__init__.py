"""Types of layers, each one class that says all there is to know: its axes, how it is cut, followed, counted."""

from lit_prune.registry import import_files
from lit_prune.structure.layers.base import LAYERS, LayerCost, LayerType, drop, layer_type, register_layer

__all__ = ["LAYERS", "LayerCost", "LayerType", "drop", "layer_type", "register_layer"]

import_files(__file__, __package__)
