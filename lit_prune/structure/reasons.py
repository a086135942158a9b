"""Why channels may not be cut, in the words of every report."""

from torch import nn

OUTPUT = "it is the network's output"
INPUT = "it is joined with the network's input"
ATTENTION = "its channels take part in attention, a recurrent layer or another product of activations"
PADDING = "its channels pass through a parameter-free channel padding, which shifts their positions"
UNTRACKED = "its channels cannot be followed through a split, reshape or unknown operation"
MIXES = "it mixes places, and channels pass through it one by one"
FIXED_PARTS = "its channels are cut into unequal parts or at a fixed position"
SPREAD = "it is spread over several channels"
SHARED = "it shares weights with a layer of another kind"
TOGETHER = "its channels could only go all at once, since each is tied to the others"
MISLED = "its channels do not keep their positions (shuffle, reshape, mixing or an operation that is not known)"
ORDER = (ATTENTION, INPUT, SHARED, FIXED_PARTS, UNTRACKED, SPREAD, MIXES, OUTPUT, PADDING)
"""Which of several is said."""


def operation(name: str) -> str:
    """The reason where an operation is not known to treat channels one by one."""
    return f"its channels do not keep their positions through the operation {name}"


def loose(product: str, owner: str, listed: bool) -> str:
    """The reason where channels are multiplied by weights that no layer holds.

    Args:
        product: the operation.
        owner: whose weights they are.
        listed: whether that is a layer which the network does not know of.
    """
    what, layer = ("a convolution", "nn.Conv2d") if product == "convolution" else ("a product", "nn.Linear")
    advice = "put layers into an nn.ModuleList" if listed else f"use a layer such as {layer}"
    return f"its channels pass through {what} with weights that no layer of the network holds ({owner}); {advice}"


def statistics(name: str, module: nn.Module) -> str:
    """The reason where a norm takes statistics over channels."""
    return f"they pass through {name} ({type(module).__name__}), whose statistics would change"
