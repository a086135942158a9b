"""Which labels the tensors of a running network have."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_prune.structure import reasons
from lit_prune.structure.hooks import TABLES
from lit_prune.structure.labels import FIXED, Labels
from lit_prune.structure.layers import layer_type
from lit_prune.structure.operations import PRODUCTS

_BARE = 1 << 20  # values of a bare parameter or buffer that is followed; a larger one is a matrix of weights


class LabelledTensors:
    """Tensors by where they lie in memory, each with its labels.

    Attributes:
        labels: what is known of them.
        fixed: labels of what cannot go: the network's input, zeros of a padding, what is not followed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self.labels = Labels()
        self.fixed = self.labels.axis("", "fixed", FIXED)  # the network's input, zeros of a padding, the unknown
        self.labels.keep([self.fixed[:1]], reasons.INPUT)
        self.labels.keep([self.fixed[1:2]], reasons.PADDING)
        self.labels.keep([self.fixed[2:]], reasons.UNTRACKED)
        self._shadows: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._bare = {key_of(t): (name, t) for name, t in _bare_tensors(model)}

    def of(self, tensor: Tensor) -> Tensor | None:
        """Labels of a tensor, or None where it belongs to nobody."""
        found = self._shadows.get(key_of(tensor))
        if found is not None:
            return found[1]
        if key_of(tensor) in self._bare and 1 < tensor.numel() <= _BARE:
            name = self._bare[key_of(tensor)][0]
            return self.put(tensor, self.labels.axis(name, "out", tensor.numel()).view(tensor.shape))
        return None

    def shadow(self, tensor: Tensor) -> Tensor:
        """Labels of a tensor; nobody's where it has none."""
        labels = self.of(tensor)
        return torch.zeros((), dtype=torch.float64).expand(tensor.shape) if labels is None else labels

    def put(self, tensor: Tensor, labels: Tensor) -> Tensor:
        """Remembers the labels of a tensor (and the tensor, so that its memory is not given to another)."""
        self._shadows[key_of(tensor)] = (tensor, labels)
        return labels

    def is_bare(self, tensor: Tensor) -> bool:
        """Whether it is a parameter or buffer that no layer with a rule of its own holds."""
        return key_of(tensor) in self._bare

    def reason_of(self, name: str, factors: Sequence[Tensor], several: bool) -> str:
        """Why channels stay that an operation mixes, of which several tensors or but one depend on the input."""
        if name not in PRODUCTS:
            return reasons.operation(name)
        return reasons.ATTENTION if several else reasons.loose(name, *self._owner_of(factors))

    def _owner_of(self, factors: Sequence[Tensor]) -> tuple[str, bool]:
        """Who holds the weights among factors, in words, and whether that is a layer that the network does not know."""
        places = {tensor.untyped_storage().data_ptr() for tensor in factors}
        for name, held in self._bare.values():
            if held.untyped_storage().data_ptr() in places:
                return f"the parameter or buffer {name}", False
        for name, layer in _hidden_layers(self._model):
            if any(held.untyped_storage().data_ptr() in places for held in layer.parameters()):
                return f"those of a {type(layer).__name__} in the Python {name}", True
        return "they are made in the forward pass", False


def _hidden_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers in the lists, tuples and dictionaries of modules, which `parameters` does not find."""
    for prefix, module in model.named_modules():
        for key, held in vars(module).items():
            if key in TABLES or not isinstance(held, (list, tuple, dict)):
                continue
            for layer in tree_leaves(held):
                if isinstance(layer, nn.Module):
                    yield f"{type(held).__name__} {f'{prefix}.{key}' if prefix else key}", layer


def key_of(tensor: Tensor) -> tuple:
    """Where a tensor lies in memory."""
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among nested lists, tuples and dictionaries."""
    if isinstance(values, Tensor):
        return [values]
    inner = values.values() if isinstance(values, dict) else values if isinstance(values, (list, tuple)) else ()
    return [tensor for value in inner for tensor in tensors_in(value)]


def _bare_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that no layer with a rule of its own holds."""
    for prefix, module in model.named_modules():
        if layer_type(module) is None:
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor.is_floating_point():
                    yield f"{prefix}.{name}" if prefix else name, tensor
