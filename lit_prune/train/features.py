"""Where features are compared: at the inputs of a network's last layer."""

from torch import nn

from lit_prune.errors import InputError


def last_layer(network: nn.Module) -> str:
    """Name of the last Linear in module order, else of the last convolution: the head.

    Raises:
        InputError: the network has neither.
    """
    for kinds in (nn.Linear, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        names = [name for name, layer in network.named_modules() if isinstance(layer, kinds)]
        if names:
            return names[-1]
    raise InputError(f"repair: {type(network).__name__} has no Linear or convolution whose inputs could be compared")


def input_width(network: nn.Module, name: str) -> int:
    """Channels that a layer reads."""
    layer = network.get_submodule(name)
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
