"""Multiply-adds and parameters: counted from layers, and as arithmetic on the widths of groups.

What is counted, for one image: the multiply-adds of convolutions and linear layers, and of the products in
attention (queries times keys, weights times values). Nothing else: no norm, activation, pooling, bias or addition.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.structure import axes
from lit_prune.structure.groups import ChannelGraph
from lit_prune.structure.opened import opened
from lit_prune.structure.tracing import one_sample, run, traceable


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer for one image.

    Attributes:
        macs: multiply-adds, over all calls of the layer.
        params: parameters that the layer holds itself.
        out_channels: width of the output (0 for an attention product without a layer).
        in_channels: width of the input (0 likewise).
        positions: positions at which the kernel is applied: pixels, tokens; over all calls.
        kind: "conv", "depthwise", "linear" or "attention".
    """

    macs: int
    params: int
    out_channels: int
    in_channels: int
    positions: int
    kind: str


@dataclass(frozen=True, repr=False)
class Cost:
    """Cost of a network for one image: `macs`, exact `params`, and `layers` by qualified name in order of use."""

    macs: int
    params: int
    layers: dict[str, LayerCost]

    def __repr__(self) -> str:
        """The sums, in a line; `layers` has the rest."""
        return f"Cost({self.macs / 1e6:,.2f} M MACs, {self.params / 1e6:,.3f} M parameters, {len(self.layers)} layers)"


@checked
def cost(model: nn.Module, example_input: Any) -> Cost:
    """Counts multiply-adds and parameters analytically in one forward pass; the model is left as it was found.

    Convolution: `positions · kernel · in / groups · out`; linear layer: `positions · in · out`; attention with L
    queries, S keys and embedding width E: `2 · L · S · E` for the two products. Matrix products and functional layers
    outside any layer module count under the module that calls them.

    >>> found = cost(nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 6, 6))  # 4·4 positions, 3·3 kernel
    >>> found.macs, found.params
    (3456, 224)

    Args:
        model: any network.
        example_input: a tensor [B, ...], a tuple of arguments or a dictionary of them; one sample is used.

    Raises:
        InputError: the network does not run on `example_input`.
    """
    counter = _Counter()
    with traceable(model):
        sample = one_sample(model, example_input)
        handles = [handle for name, module in model.named_modules() for handle in counter.watch(name, module)]
        try:
            with counter:
                run(model, sample)
        finally:
            for handle in handles:
                handle.remove()
    layers = counter.layers
    return Cost(sum(layer.macs for layer in layers.values()), sum(p.numel() for p in model.parameters()), layers)


class _Counter(TorchFunctionMode):
    """Counts layers by forward hooks, and the products between them by looking at the functions called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[str, LayerCost] = {}
        self.calling: list[tuple[str, bool]] = []  # (module, whether its hook counts everything inside)

    def watch(self, name: str, module: nn.Module) -> list:
        """Hooks on one module."""
        whole = axes.is_weighted(module) or isinstance(module, nn.MultiheadAttention)

        def enter(*_: object) -> None:
            self.calling.append((name, whole))

        def leave(_: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            self.calling.pop()
            if whole and not any(counted for _, counted in self.calling):
                self._add(name, _layer_cost(module, args, kwargs, output))

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, with_kwargs=True)]

    def _add(self, name: str, found: LayerCost) -> None:
        before = self.layers.get(name)
        if before is not None:
            found = replace(found, macs=found.macs + before.macs, positions=found.positions + before.positions)
        self.layers[name] = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Runs the function and counts it if it multiplies matrices outside the layers that are counted whole."""
        output = function(*args, **(kwargs or {}))
        if function in _PRODUCTS and not any(counted for _, counted in self.calling):
            macs, kind = _PRODUCTS[function](args, kwargs or {}, output)
            self._add(self.calling[-1][0] if self.calling else "", LayerCost(macs, 0, 0, 0, 0, kind))
        return output


def _layer_cost(module: nn.Module, args: tuple, kwargs: dict, output: object) -> LayerCost:
    params = sum(parameter.numel() for parameter in module.parameters())
    if isinstance(module, nn.MultiheadAttention):
        return _attention_cost(module, (*args, *(kwargs[k] for k in ("query", "key", "value") if k in kwargs)), params)
    if isinstance(module, nn.Linear):
        positions = output.numel() // module.out_features
        return LayerCost(
            positions * module.weight.numel(), params, module.out_features, module.in_features, positions, "linear"
        )
    values, channels = (args[0], module.in_channels) if module.transposed else (output, module.out_channels)
    positions = values.numel() // channels  # frames folded into the batch count too
    kind = "depthwise" if axes.is_depthwise(module) else "conv"
    macs = positions * module.weight.numel()
    return LayerCost(macs, params, module.out_channels, module.in_channels, positions, kind)


def _attention_cost(module: nn.MultiheadAttention, inputs: tuple[Tensor, ...], params: int) -> LayerCost:
    """Four projections and two products; query [.., L, ..], key [.., S, ..] for one image."""
    query, key, value = inputs[:3]
    queries, keys = query.numel() // query.shape[-1], key.numel() // key.shape[-1]  # L, S
    inner, width = module.num_heads * module.head_dim, module.out_proj.out_features
    projections = queries * inner * query.shape[-1] + keys * inner * (key.shape[-1] + value.shape[-1])
    macs = projections + queries * inner * width + 2 * queries * keys * inner
    return LayerCost(macs, params, width, width, queries, "attention")


def _count_attention(args: tuple, kwargs: dict, output: Tensor) -> tuple[int, str]:
    """Queries [.., L, E] times keys [.., S, E], then [.., L, S] times values [.., S, V] = output [.., L, V]."""
    query, key = (*args, *(kwargs[name] for name in ("query", "key") if name in kwargs))[:2]
    return (math.prod(query.shape) + output.numel()) * key.shape[-2], "attention"


def _count_product(args: tuple, kwargs: dict, output: Tensor) -> tuple[int, str]:
    """[.., M, K] times [.., K, N] = [.., M, N]: K multiply-adds for each value of the output."""
    left, right = (*args, *kwargs.values())[-2:] if len(args) < 2 else args[:2]
    learned = isinstance(left, nn.Parameter) or isinstance(right, nn.Parameter)
    return output.numel() * left.shape[-1], "linear" if learned else "attention"


def _count_third_product(args: tuple, kwargs: dict, output: Tensor) -> tuple[int, str]:
    """As `_count_product`, for functions that add a matrix first."""
    return _count_product(args[1:], kwargs, output)


def _count_linear(args: tuple, kwargs: dict, output: Tensor) -> tuple[int, str]:
    """Functional linear layer: input width multiply-adds for each value of the output."""
    return output.numel() * args[0].shape[-1], "linear"


def _count_convolution(args: tuple, kwargs: dict, output: Tensor) -> tuple[int, str]:
    """Functional convolution with weight [out, in / groups, ...]: one kernel for each value of the output."""
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    return output.numel() * weight[0].numel(), "conv"


def _count_transposed(args: tuple, kwargs: dict, output: Tensor) -> tuple[int, str]:
    """Functional transposed convolution with weight [in, out / groups, ...]: one kernel for each value of the input."""
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    return args[0].numel() * weight[0].numel(), "conv"


def _count_tensordot(args: tuple, kwargs: dict, output: Tensor) -> tuple[int, str]:
    """Each value of the output sums over the contracted sizes: √(|a|·|b| / |output|) of them, if each appears once."""
    left, right = args[:2]
    return output.numel() * math.isqrt(left.numel() * right.numel() // max(output.numel(), 1)), "attention"


def _count_einsum(args: tuple, kwargs: dict, output: Tensor) -> tuple[int, str]:
    """Two operands: the product of the sizes of all indices; without a contraction nothing.

    Raises:
        InputError: three or more operands, or indices given as lists, which are not counted.
    """
    operands = args[1:] if len(args) > 1 and isinstance(args[1], Tensor) else args[1]
    if not isinstance(args[0], str) or len(operands) > 2:
        raise InputError(
            "cost: an einsum with three or more operands, or with lists of indices, is not counted; split it"
        )
    if len(operands) < 2:
        return 0, "attention"
    sizes: dict[str, int] = {}
    for indices, tensor in zip(args[0].replace(" ", "").split("->")[0].split(","), operands, strict=True):
        before, dots, after = indices.partition("...")
        spread = range(tensor.dim() - len(before) - len(after)) if dots else ()
        names = [*before, *(f".{len(spread) - place}" for place in spread), *after]  # aligned at the right
        sizes |= {name: max(size, sizes.get(name, 1)) for name, size in zip(names, tensor.shape, strict=True)}
    macs = math.prod(sizes.values())
    return (macs if macs > output.numel() else 0), "attention"


_PRODUCTS = {
    F.scaled_dot_product_attention: _count_attention,
    F.linear: _count_linear,
    torch.einsum: _count_einsum,
    torch.tensordot: _count_tensordot,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _count_convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _count_transposed),
    **dict.fromkeys((torch.baddbmm, torch.addmm, Tensor.baddbmm, Tensor.addmm), _count_third_product),
    **dict.fromkeys(
        (torch.matmul, torch.bmm, torch.mm, torch.mv, torch.linalg.matmul, Tensor.matmul, Tensor.bmm, Tensor.mm)
        + (Tensor.mv, Tensor.__matmul__, Tensor.__rmatmul__),
        _count_product,
    ),
}


@dataclass(frozen=True)
class CostModel:
    """Cost of a network as exact arithmetic on the widths of its groups.

    With `v = (width of each group, ..., 1)` every channel axis is a row `a` with width `a·v`, a layer costs
    `c·(a·v)(b·v)`, and so the whole network `vᵀQv` with one matrix of whole numbers for each of macs and params.

    Attributes:
        names: group names, the order of the widths.
        sizes: their dense widths, int64 [G].
        macs_matrix: int64 [G+1, G+1].
        params_matrix: int64 [G+1, G+1].
    """

    names: tuple[str, ...]
    sizes: np.ndarray
    macs_matrix: np.ndarray
    params_matrix: np.ndarray

    @classmethod
    def build(cls, model: nn.Module, graph: ChannelGraph, example_input: Any) -> "CostModel":
        """Counts `model` once and relates the layers to the groups of `graph`, which was traced on it."""
        with opened(model):  # there the projections of every attention are layers
            counted = cost(model, example_input)
        sizes = np.array([group.size for group in graph.groups], dtype=np.int64)
        macs, params = (np.zeros((len(sizes) + 1,) * 2, dtype=np.int64) for _ in range(2))
        rows = _axis_rows(graph)
        for name, layer in counted.layers.items():
            module = model.get_submodule(name)
            if layer.kind == "attention" or not axes.is_weighted(module):
                heads = _heads_row(rows, graph, name)
                inner = rows.get((f"{name}.in_proj_weight", "dim:1"))
                projections = 0 if inner is None else _projections(module, layer)
                macs[-1] += (layer.macs - projections) // int(heads @ np.append(sizes, 1)) * heads
                if projections:
                    macs += projections // _dense(heads, inner, sizes) * np.outer(heads, inner)
                continue
            out, inner = _row(rows, graph, module, name, "out"), _row(rows, graph, module, name, "in")
            macs += layer.macs // _dense(out, inner, sizes) * np.outer(out, inner)
        for parameter_name, parameter in model.named_parameters():
            params += _parameter_terms(model, parameter_name, parameter, rows, graph)
        return cls(tuple(group.name for group in graph.groups), sizes, macs, params)

    def macs(self, widths: np.ndarray) -> int:
        """Multiply-adds for one image with these widths, int64 [G]."""
        return _form(self.macs_matrix, widths)

    def params(self, widths: np.ndarray) -> int:
        """Parameters with these widths, int64 [G]."""
        return _form(self.params_matrix, widths)

    def widths(self, keep_channels: Mapping[str, tuple[int, ...]]) -> np.ndarray:
        """Widths after a plan that keeps these units, int64 [G]."""
        kept = [len(keep_channels.get(name, range(size))) for name, size in zip(self.names, self.sizes, strict=True)]
        return np.array(kept, dtype=np.int64)


def _projections(module: nn.MultiheadAttention, layer: LayerCost) -> int:
    """What the four projections take of `h·(2LE + 2SE + 2LS)` multiply-adds; h = heads · their width, L = queries."""
    inner, width, queries = module.num_heads * module.head_dim, module.embed_dim, layer.positions
    keys = (layer.macs // inner - 2 * queries * width) // (2 * (width + queries))
    return 2 * inner * width * (queries + keys)


def _form(matrix: np.ndarray, widths: np.ndarray) -> int:
    extended = np.append(widths, 1)
    return int(extended @ (matrix @ extended))


def _dense(out: np.ndarray, inner: np.ndarray, sizes: np.ndarray) -> int:
    extended = np.append(sizes, 1)
    return int(out @ extended) * int(inner @ extended)


def _axis_rows(graph: ChannelGraph) -> dict[axes.Axis, np.ndarray]:
    """Row a of each axis that belongs to groups: positions for each unit, then what belongs to none."""
    rows: dict[axes.Axis, np.ndarray] = {}
    for column, group in enumerate(graph.groups):
        for member in group.members:
            axis = (member.module, member.axis)
            if axis in graph.widths and not group.protected:
                row = rows.setdefault(axis, np.zeros(len(graph.groups) + 1, dtype=np.int64))
                row[column] += len(member.positions[0])
    sizes = np.array([*(group.size for group in graph.groups), 0], dtype=np.int64)
    for axis, row in rows.items():
        row[-1] = graph.widths[axis] - int(row @ sizes)
    return rows


def _heads_row(rows: dict, graph: ChannelGraph, name: str) -> np.ndarray:
    """Row of the heads of the attention that a module carries out; the constant 1 where none of its heads can go."""
    stated = (row for (holder, axis), row in rows.items() if holder == name and axis.startswith("heads:"))
    constant = np.zeros(len(graph.groups) + 1, dtype=np.int64)
    constant[-1] = 1
    return next(stated, constant)


def _row(rows: dict, graph: ChannelGraph, module: nn.Module, name: str, axis: str) -> np.ndarray:
    """Row of an axis; of a grouped layer's input what one kernel reads: a fixed number where whole groups go."""
    constant = np.zeros(len(graph.groups) + 1, dtype=np.int64)
    grouped = axis == "in" and getattr(module, "groups", 1) > 1
    if grouped and not axes.is_depthwise(module) and not axes.goes_by_group(module) and (name, axis) in rows:
        return rows[name, axis] // module.groups
    fixed = grouped
    constant[-1] = 1 if fixed else axes.width(module, axis)
    return constant if fixed else rows.get((name, axis), constant)


def _parameter_terms(model: nn.Module, name: str, parameter: Tensor, rows: dict, graph: ChannelGraph) -> np.ndarray:
    """Number of values of one parameter as a matrix: weights are bilinear, all other channel parameters linear."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    unit = np.zeros(len(graph.groups) + 1, dtype=np.int64)
    unit[-1] = 1
    sizes = np.array([group.size for group in graph.groups], dtype=np.int64)
    if axes.is_weighted(module) and key == "weight":
        out, inner = _row(rows, graph, module, owner, "out"), _row(rows, graph, module, owner, "in")
    else:
        cuttable = axes.is_weighted(module) or axes.is_channelwise(module) or axes.is_layer_norm(module)
        places = [(owner if cuttable else name, "out"), *((name, f"dim:{dim}") for dim in range(parameter.dim()))]
        out, inner = ([rows[place] for place in places if place in rows] + [unit, unit])[:2]
    return parameter.numel() // _dense(out, inner, sizes) * np.outer(out, inner)
