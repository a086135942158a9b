"""Multiply-adds and parameters of a network, counted from its layers.

What is counted, for one image: the multiply-adds of convolutions and linear layers, and of the products in
attention (queries times keys, weights times values). Nothing else: no norm, activation, pooling, bias or addition.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.running import removing
from lit_prune.structure.example import Example
from lit_prune.structure.hollow import Hollow, for_shapes
from lit_prune.structure.layers import LayerCost, layer_type
from lit_prune.structure.tracing import one_sample, run, traceable


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
    with traceable(model):
        layers = for_shapes(partial(_counted, model, one_sample(model, example_input)), model)
    return Cost(sum(layer.macs for layer in layers.values()), sum(p.numel() for p in model.parameters()), layers)


def _counted(model: nn.Module, sample: Example, hollow: bool) -> dict[str, LayerCost]:
    """The cost of every layer in one pass."""
    counter = _Counter()
    handles = [handle for name, module in model.named_modules() for handle in counter.watch(name, module)]
    shapes = Hollow(sample.tensors, skips=hollow)
    with removing(handles), counter, shapes.guarding(), shapes, torch.no_grad():
        run(model, sample)
    return counter.layers


class _Counter(TorchFunctionMode):
    """Counts layers by forward hooks, and the products between them by looking at the functions called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[str, LayerCost] = {}
        self.calling: list[tuple[str, bool]] = []  # (module, whether its hook counts everything inside)

    def watch(self, name: str, module: nn.Module) -> list:
        """Hooks on one module."""
        layer = layer_type(module)
        whole = layer is not None and layer.counts

        def enter(*_: object) -> None:
            self.calling.append((name, whole))

        def leave(_: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            self.calling.pop()
            if layer is not None and whole and not any(counted for _, counted in self.calling):
                self._add(name, layer.count(module, args, kwargs, output))

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


def _count_attention(args: tuple, kwargs: dict, output: Tensor) -> tuple[int, str]:
    """Queries [.., L, E] times keys [.., S, E], then [.., L, S] times values [.., S, V] = output [.., L, V]."""
    query, key = (*args, *(kwargs[name] for name in ("query", "key") if name in kwargs))[:2]
    return (math.prod(query.shape) + output.numel()) * key.shape[-2], "attention"


def _count_product(args: tuple, kwargs: dict, output: Tensor) -> tuple[int, str]:
    """[.., M, K] times [.., K, N] = [.., M, N]: K multiply-adds for each value of the output."""
    left, right = (*args, *kwargs.values())[-2:] if len(args) < 2 else args[:2]
    learned = isinstance(left, nn.Parameter) or isinstance(right, nn.Parameter)
    return output.numel() * left.shape[-1], "linear" if learned else "attention"


def _count_convolution(args: tuple, kwargs: dict, values: Tensor) -> tuple[int, str]:
    """One kernel, a row of the weight, for each of the values: outputs, or inputs of a transposed convolution."""
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    return values.numel() * weight[0].numel(), "conv"


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
    F.linear: lambda args, kwargs, output: (output.numel() * args[0].shape[-1], "linear"),
    torch.einsum: _count_einsum,
    torch.tensordot: _count_tensordot,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _count_convolution),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), lambda a, k, _: _count_convolution(a, k, a[0])
    ),
    **dict.fromkeys(
        (torch.baddbmm, torch.addmm, Tensor.baddbmm, Tensor.addmm),
        lambda a, k, output: _count_product(a[1:], k, output),
    ),
    **dict.fromkeys(
        (torch.matmul, torch.bmm, torch.mm, torch.mv, torch.linalg.matmul, Tensor.matmul, Tensor.bmm, Tensor.mm)
        + (Tensor.mv, Tensor.__matmul__, Tensor.__rmatmul__),
        _count_product,
    ),
}
