"""Multiply-adds and parameters as arithmetic on the widths of groups; what is counted is said in `cost`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from lit_prune.structure import axes
from lit_prune.structure.cost import LayerCost, cost
from lit_prune.structure.groups import ChannelGraph
from lit_prune.structure.layers import layer_type
from lit_prune.structure.opened import opened
from lit_prune.structure.widths import Price


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
        measured: what is known of a measured cost at these widths, int64 [G]; see `plan_measured`.
    """

    names: tuple[str, ...]
    sizes: np.ndarray
    macs_matrix: np.ndarray
    params_matrix: np.ndarray
    measured: Price | None = None

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
            if layer.kind == "attention" or not (axes.is_weighted(module) or axes.is_mixing(module)):
                inner = rows.get((f"{name}.in_proj_weight", "dim:1"))
                projections = 0 if inner is None else _projections(module, layer)
                macs[-1] += _attention_row(rows, graph, module, name, layer.macs - projections)
                if inner is not None:
                    width = int(inner @ np.append(sizes, 1))
                    macs += np.outer(_attention_row(rows, graph, module, name, projections // width), inner)
                continue
            out, read = _row(rows, graph, module, name, "out"), _row(rows, graph, module, name, "in")
            macs += layer.macs // _dense(out, read, sizes) * np.outer(out, read)
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


def layer_rows(model: nn.Module, graph: ChannelGraph, example_input: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows of the output and input axis, int64 [G+1] each, of the layers whose two widths may be cut apart.

    Convolutions of one group, depthwise ones (whose widths are one) and linear layers; see `CostModel`.
    """
    with opened(model):
        counted = cost(model, example_input)
        rows = _axis_rows(graph)
        found = {}
        for name in counted.layers:
            module = model.get_submodule(name)
            plain = axes.is_weighted(module) and (getattr(module, "groups", 1) == 1 or axes.is_depthwise(module))
            if plain:
                found[name] = _row(rows, graph, module, name, "out"), _row(rows, graph, module, name, "in")
    return found


def _projections(module: Any, layer: LayerCost) -> int:
    """What the four projections take of `h·(LE + SE + LS)` multiply-adds; h = width of queries and values of all heads.

    L and S are the numbers of queries and keys.
    """
    inner, width, queries = module.num_heads * module.head_dim, module.embed_dim, layer.positions
    inner += module.out_proj.in_features
    keys = (layer.macs // inner - queries * width) // (width + queries)
    return inner * width * (queries + keys)


def _form(matrix: np.ndarray, widths: np.ndarray) -> int:
    extended = np.append(widths, 1)
    return int(extended @ (matrix @ extended))


def _dense(out: np.ndarray, inner: np.ndarray, sizes: np.ndarray) -> int:
    extended = np.append(sizes, 1)
    return int(out @ extended) * int(inner @ extended)


def _axis_rows(graph: ChannelGraph) -> dict[axes.AxisKey, np.ndarray]:
    """Row a of each axis that belongs to groups: positions for each unit, then what belongs to none."""
    rows: dict[axes.AxisKey, np.ndarray] = {}
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


def _attention_row(rows: dict, graph: ChannelGraph, module: Any, name: str, macs: int) -> np.ndarray:
    """Row of `c · (maps · width of queries and keys + heads · width of values)` multiply-adds, one map for each head.

    Talking heads alone have other numbers of maps and heads, and only the heads go. Heads and widths of heads are never
    cut by one plan (`selected_groups`), so the products need one factor to vary.
    """
    unit = np.zeros(len(graph.groups) + 1, dtype=np.int64)
    unit[-1] = 1
    found = next(((axis, row) for (holder, axis), row in rows.items() if holder == name and axis[:6] == "heads:"), None)
    heads = unit * getattr(module, "value_heads", 1) if found is None else found[1]
    mixed = hasattr(module, "value_heads") or (found is not None and found[0] == "heads:value_heads")
    maps = unit * module.num_heads if mixed else heads
    sizes = np.array([*(group.size for group in graph.groups), 1])
    widths = [graph.by_name.get(f"{name or 'attention'}.{part}") for part in ("query_key", "values")]
    numbers = [0 if group is None else group.size for group in widths]
    numbers = numbers if sum(numbers) else [0, 1]
    dense = [int(maps @ sizes), int(heads @ sizes)]
    each = macs // (numbers[0] * dense[0] + numbers[1] * dense[1])
    total = each * (numbers[0] * maps + numbers[1] * heads)
    for group, number in zip(widths, dense, strict=True):
        if group is not None and not group.protected:
            total[graph.groups.index(group)] += each * number
            total[-1] -= each * number * group.size
    return total


def _row(rows: dict, graph: ChannelGraph, module: nn.Module, name: str, axis: str) -> np.ndarray:
    """Row of an axis; of a grouped layer's input what one kernel reads: a fixed number where whole groups go."""
    constant = np.zeros(len(graph.groups) + 1, dtype=np.int64)
    grouped = axis == "in" and getattr(module, "groups", 1) > 1
    if grouped and not axes.is_depthwise(module) and not axes.goes_by_group(module) and (name, axis) in rows:
        return rows[name, axis] // module.groups
    constant[-1] = 1 if grouped else axes.width(module, axis)
    return constant if grouped else rows.get((name, axis), constant)


def _parameter_terms(model: nn.Module, name: str, parameter: Tensor, rows: dict, graph: ChannelGraph) -> np.ndarray:
    """Number of values of one parameter as a matrix: weights are bilinear, all other channel parameters linear."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    unit = np.zeros(len(graph.groups) + 1, dtype=np.int64)
    unit[-1] = 1
    sizes = np.array([group.size for group in graph.groups], dtype=np.int64)
    layer = layer_type(module)
    if layer is not None and layer.sort != "closed" and key in layer.bilinear and parameter.dim() > 1:
        out, inner = _row(rows, graph, module, owner, "out"), _row(rows, graph, module, owner, "in")
    else:
        own = owner if axes.is_cuttable(module) else name
        places = [(own, "out"), *((name, f"dim:{dim}") for dim in range(parameter.dim()))]
        out, inner = ([rows[place] for place in places if place in rows] + [unit, unit])[:2]
    return parameter.numel() // _dense(out, inner, sizes) * np.outer(out, inner)
