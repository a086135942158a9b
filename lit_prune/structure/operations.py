"""Operations of torch by what they do to channels, and their arguments."""

from typing import Any

import torch
from torch import Tensor

MOVES = frozenset(
    """view _unsafe_view reshape permute transpose t expand squeeze unsqueeze cat stack flip repeat pixel_shuffle
    pixel_unshuffle unfold im2col repeat_interleave unbind split split_with_sizes slice select roll index
    index_select diagonal unsafe_split unsafe_chunk unsafe_split_with_sizes
    _reshape_alias""".split()
)
MOVES_IN_PLACE = frozenset("squeeze_ unsqueeze_ transpose_ t_".split())
SPATIAL = frozenset(
    """max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d max_pool3d_with_indices
    avg_pool3d _adaptive_avg_pool3d avg_pool1d adaptive_avg_pool1d max_pool2d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
    upsample_linear1d _upsample_bilinear2d_aa reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d grid_sampler_2d adaptive_avg_pool2d
    adaptive_avg_pool3d""".split()
)
REDUCTIONS = frozenset("mean sum amax amin var std max min var_mean logsumexp linalg_vector_norm norm any all".split())
ALONG = frozenset("softmax _softmax log_softmax _log_softmax cumsum".split())
SAME = frozenset("clone contiguous detach alias _to_copy lift_fresh".split())
PLACES = frozenset(
    """_prelu_kernel prelu masked_fill masked_fill_ where threshold hardtanh hardtanh_ hardsigmoid hardswish
    leaky_relu leaky_relu_ elu elu_ softplus log_sigmoid_forward native_dropout dropout rsub copy_ relu6 celu
    mish mish_""".split()
)
NOTHING = frozenset(
    """zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_empty new_full fill_
    zero_ _local_scalar_dense equal is_same_size""".split()
)
PRODUCTS = frozenset(
    """mm bmm addmm baddbmm matmul linear _scaled_dot_product_flash_attention_for_cpu scaled_dot_product_attention
    einsum _scaled_dot_product_attention_math _scaled_dot_product_efficient_attention mv dot addmv convolution
    tensordot _scaled_dot_product_fused_attention_overrideable""".split()
)
_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
VIEWS = frozenset("view _unsafe_view reshape _reshape_alias".split())
SPLITS = frozenset("split split_with_sizes unsafe_split unsafe_chunk unsafe_split_with_sizes".split())
BATCH_NORM = frozenset("native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm batch_norm".split())
ADDITIONS = frozenset("add add_ sub sub_".split())
RESTRIDES = frozenset("as_strided as_strided_".split())
KNOWN = (
    RESTRIDES
    | MOVES
    | MOVES_IN_PLACE
    | SPATIAL
    | REDUCTIONS
    | ALONG
    | PRODUCTS
    | SAME
    | NOTHING
    | BATCH_NORM
    | {"constant_pad_nd", "glu"}
)
REGIONS = frozenset("roi_align roi_pool".split())
KNOWN |= REGIONS | {"channel_shuffle", "native_channel_shuffle", "index_put", "index_put_"}


def is_pointwise(function: Any) -> bool:
    """Whether each value of the output depends on the values at its place alone."""
    name = function.overloadpacket.__name__
    return torch.Tag.pointwise in function.tags or name in PLACES or name.removesuffix("_") in PLACES


def is_pointwise_copy(function: Any) -> bool:
    """Whether an operation writes such an output, and nothing else, to memory of its own."""
    return torch.Tag.pointwise in function.tags and not function._schema.is_mutable and not function.is_view


def is_shaped(function: Any, args: tuple) -> bool:
    """Whether an operation is a product of which torch can tell by shapes alone whether it runs, and what shape it has.

    It does not look at the channels of transposed convolutions, at lengths of biases, and at widths of heads.
    """
    name = function.overloadpacket.__name__
    if name == "convolution":
        weight, bias, transposed = args[1], args[2], args[6]
        return not transposed and (bias is None or len(bias) == len(weight))
    if name == "addmm":
        return args[0].shape == args[2].shape[1:]
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        query, key, value = args[:3]
        alike = query.shape[:2] == key.shape[:2] == value.shape[:2]
        return alike and query.shape[3] == key.shape[3] and key.shape[2] == value.shape[2]
    return name in ("mm", "bmm")


def without_addition(function: Any, args: tuple, kwargs: dict) -> tuple[Any, tuple, dict]:
    """An operation of the same shape that only multiplies."""
    adds = function is torch.ops.aten.addmm.default
    return (torch.ops.aten.mm.default, args[1:3], {}) if adds else (function, args, kwargs)


def is_opaque(function: Any) -> bool:
    """Whether an operation is not torch's own, or gives numbers or shapes that the values which it reads decide."""
    return function.namespace != "aten" or any(tag in function.tags for tag in _VALUES)


def gives_whole_numbers(function: Any, output: Any) -> bool:
    """Whether an operation gives whole numbers, such as positions, which may decide what else happens."""
    name = function.overloadpacket.__name__
    outputs = output if isinstance(output, (list, tuple)) else (output,)
    whole = (isinstance(t, Tensor) and not t.dtype.is_floating_point and t.dtype != torch.bool for t in outputs)
    return name not in SPATIAL and "attention" not in name and any(whole)  # where maxima lie; states of generators


def is_spread(tensor: Tensor, dim: int, dims: int) -> bool:
    """Whether the value of a tensor is the same all along a dimension of an output with so many dimensions."""
    own = dim - (dims - tensor.dim())
    return own < 0 or tensor.shape[own] == 1


def same_places(shape: torch.Size, strides: tuple[int, ...], output: Tensor) -> bool:
    """Whether other strides leave every value at its place: as before wherever there is a step to take."""
    steps = zip(strides, output.stride(), output.shape, strict=False)
    return shape == output.shape and all(a == b or size == 1 for a, b, size in steps)


def spatial_dims(name: str) -> int:
    """Number of dimensions that a pooling or interpolation mixes, which its name says."""
    return int(next(character for character in name if character.isdigit()))


def fits(labels: Tensor, shape: torch.Size) -> bool:
    """Whether labels can be read at every place of an output."""
    sizes = zip(reversed(labels.shape), reversed(shape), strict=False)
    return labels.dim() <= len(shape) and all(a in (1, b) for a, b in sizes)


def dim_along(name: str, args: tuple, dims: int) -> int | None:
    """Dimension that a moving operation works along, or None for one that treats all alike."""
    if name in SPLITS:
        return (args[2] if len(args) > 2 else 0) % dims
    if name in ("slice", "select", "index_select", "unbind", "narrow"):
        return (args[1] if len(args) > 1 else 0) % dims
    if name == "roll":
        return args[2][0] % dims if len(args) > 2 and args[2] else None
    if name == "index":
        return next((place for place, index in enumerate(args[1]) if index is not None), None)
    return None


def start_of(args: tuple, size: int) -> int:
    """First position of a slice."""
    start = args[2] if len(args) > 2 and args[2] is not None else 0
    return max(start + size, 0) if start < 0 else start
