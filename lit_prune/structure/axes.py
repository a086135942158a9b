"""The channel axes of layers: what kind of layer it is, how wide each axis is."""

from torch import Tensor, nn

from lit_prune.models.cifar_resnet import PaddedShortcut

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
INSTANCE_NORMS = (nn.modules.instancenorm._InstanceNorm,)
FROZEN_NORM = frozenset({"weight", "bias", "running_mean", "running_var"})  # buffers of a norm that does not train

Axis = tuple[str, str]
"""(qualified name, axis): "out" or "in" of a module or bare parameter, "dim:K" of a tensor, and numbers that a module
states in an attribute: "heads:NAME" of heads, "attribute:NAME" of channels of all heads."""


def stated(axis: str) -> str:
    """Name of the attribute whose value the axis is, or ""."""
    kind, _, name = axis.partition(":")
    return name if kind in ("heads", "attribute") else ""


def find(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    """Module, parameter or buffer of `model` with that qualified name; the model itself for "".

    Raises:
        AttributeError: there is none.
    """
    if not name:
        return model
    parent, _, last = name.rpartition(".")
    return getattr(model.get_submodule(parent), last)


def is_depthwise(module: object) -> bool:
    """Whether `module` is a convolution with one input and one output channel in each of several groups."""
    return isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.out_channels == module.in_channels


def is_grouped(module: object) -> bool:
    """Whether `module` is a convolution in groups that may lose channels (a transposed one may not)."""
    return isinstance(module, CONVOLUTIONS) and module.groups > 1 and not module.transposed


def is_weighted(module: object) -> bool:
    """Whether `module` is a convolution or a linear layer."""
    return isinstance(module, (*CONVOLUTIONS, nn.Linear))


def is_boundary(module: object) -> bool:
    """Whether channels end and begin here: a convolution that mixes channels, a linear layer, a padded shortcut."""
    return (is_weighted(module) and not is_depthwise(module)) or isinstance(module, PaddedShortcut)


def is_channelwise(module: object) -> bool:
    """Whether `module` has weights for each channel and mixes none: depthwise convolution, norm, PReLU.

    The statistics of a GroupNorm mix the channels of a group, so that whole groups of them go.
    """
    channelwise = isinstance(module, (*BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm, nn.PReLU))
    return channelwise or is_depthwise(module) or is_frozen_norm(module)


def is_layer_norm(module: object) -> bool:
    """Whether `module` takes statistics over all channels and has a scale for each: LayerNorm, RMSNorm, timm's GRN."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return len(module.normalized_shape) == 1
    return is_response_norm(module)


def is_response_norm(module: object) -> bool:
    """Whether `module` is the global response norm of ConvNeXt v2 (timm)."""
    return type(module).__name__ == "GlobalResponseNorm"


def goes_by_group(module: nn.Module) -> bool:
    """Whether a grouped convolution loses whole groups (where they are many and narrow), or the same places of each."""
    return module.groups >= module.in_channels // module.groups


def channel_dim(module: nn.Module, values: Tensor) -> int:
    """Channels are last for linear layers, attentions and LayerNorms, else second (first for an unbatched map)."""
    if is_response_norm(module):
        return module.channel_dim % values.dim()
    maps = "2d" in type(module).__name__  # the LayerNorm2d of torchvision and timm
    if isinstance(module, (nn.Linear, nn.MultiheadAttention)) or (is_layer_norm(module) and not maps):
        return values.dim() - 1
    spatial = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
    dims = next((dims for kind, dims in spatial.items() if isinstance(module, kind)), None)
    return 0 if dims is not None and values.dim() == dims + 1 else 1


def is_frozen_norm(module: object) -> bool:
    """Whether `module` is a BatchNorm whose affine map and statistics are all buffers, as in detection backbones."""
    if (
        not isinstance(module, nn.Module)
        or isinstance(module, BATCH_NORMS)
        or any(p is not None for p in module._parameters.values())
    ):
        return False
    return module._buffers.keys() >= FROZEN_NORM and all(module._buffers[key].dim() == 1 for key in FROZEN_NORM)


def is_single_prelu(module: object) -> bool:
    """A PReLU with one parameter for all channels is an activation like any other."""
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def width(module: nn.Module | nn.Parameter, axis: str) -> int:
    """Number of channels that the attributes of a layer state; for a bare parameter the number of its values."""
    if stated(axis):
        return getattr(module, stated(axis))
    if axis.startswith("dim:"):
        return module.shape[int(axis[4:])]
    if isinstance(module, Tensor):
        return module.numel()
    if isinstance(module, (*CONVOLUTIONS, PaddedShortcut)):
        return module.out_channels if axis == "out" else module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features if axis == "out" else module.in_features
    if is_frozen_norm(module):
        return len(module.weight)
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if is_layer_norm(module):
        return len(module.weight) if is_response_norm(module) else module.normalized_shape[0]
    return module.num_parameters if isinstance(module, nn.PReLU) else module.num_features


def stored_width(module: nn.Module | nn.Parameter, axis: str) -> int:
    """Number of channels that the tensors of a layer have (the attributes' where it has no tensor)."""
    if ":" in axis:
        return width(module, axis)
    if isinstance(module, (*BATCH_NORMS, *INSTANCE_NORMS)):
        tensors = [t for t in (module.weight, module.running_mean) if t is not None]
        widths = {len(tensor) for tensor in tensors} or {module.num_features}
        return widths.pop() if len(widths) == 1 else -1
    if is_frozen_norm(module):
        widths = {len(module._buffers[key]) for key in FROZEN_NORM}
        return widths.pop() if len(widths) == 1 else -1
    if not is_weighted(module):
        return width(module, axis)
    transposed = isinstance(module, CONVOLUTIONS) and module.transposed
    if (axis == "out") != transposed or is_depthwise(module):
        return module.weight.shape[0]
    return module.weight.shape[1] * getattr(module, "groups", 1)
