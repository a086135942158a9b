"""Networks that were traced a moment ago: the groups of a copy are those of the network that it was copied from.

Planning, surgery, stand-ins and saving each ask for the groups of one network or of its copies. They are found once:
networks are the same where types, attributes and the bytes of all tensors agree, and what they are called with too. One
that has hooks, or holds anything else than values, is the same as no other.
"""

import hashlib
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from lit_prune.structure.example import Example
from lit_prune.structure.hooks import TABLES
from lit_prune.tensor_files import tensor_bytes

_ROOM = 4  # networks: a dense one, two of its stages and a teacher
_HOOKS = tuple(name for name in TABLES if name.endswith("_hooks"))
_last: OrderedDict[Hashable, Any] = OrderedDict()
Found = TypeVar("Found")


def once(model: nn.Module, sample: Example, find: Callable[[], Found]) -> Found:
    """What `find` finds, or found for this network called with this sample, or for one that is the same."""
    key = _identity(model, sample)
    found = _last[key] if key in _last else find()
    _last[key] = found
    _last.move_to_end(key)
    while len(_last) > _ROOM:
        _last.popitem(last=False)
    return found


def _identity(model: nn.Module, sample: Example) -> Hashable:
    """Equal for equal networks and samples."""
    called = [_known(leaf) for leaf in tree_leaves((sample.args, sample.kwargs))]
    return built(model, values=True), tuple(called), tuple(sample.kwargs)


def built(model: nn.Module, values: bool = False) -> Hashable:
    """Equal for networks that are built alike: the same modules, attributes, and tensors of whole numbers or none.

    Args:
        model: the network.
        values: whether the values of floating-point tensors are to be equal too.
    """
    seen = _known if values else _form
    tensors = {name: seen(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    modules = [
        (name, type(module), type(module).forward, _held(module))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    hooked = any(getattr(module, name) for module in model.modules() for name in _HOOKS)
    return tuple(modules), tuple(tensors.items()), _Alone() if hooked else None


def _held(module: nn.Module) -> Hashable:
    """The attributes of a module."""
    return tuple((key, _known(value)) for key, value in sorted(vars(module).items()) if key not in TABLES)


def called_with(values: Any) -> Hashable:
    """Equal for arguments of one form: nested alike, tensors of the same shapes, one where the other has one."""
    leaves, spec = tree_flatten(values)
    first = {id(leaf): place for place, leaf in reversed(list(enumerate(leaves)))}
    return spec, tuple((first[id(leaf)], _form(leaf)) for leaf in leaves)


class _Alone:
    """Equal to nothing else: what it stands for may change unseen."""


def _form(value: Any) -> Hashable:
    """As `_known`, but floating-point tensors by their form alone."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided:
        return value.dtype, value.device, tuple(value.shape)
    return _known(value)


def _known(value: Any) -> Hashable:
    """Equal for equal values; functions are themselves, and anything else is like nothing."""
    if isinstance(value, Tensor):
        return value.dtype, value.device, tuple(value.shape), _digest(value)
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_known, value))
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(map(_known, value))
    if isinstance(value, dict):
        return type(value), tuple((_known(key), _known(one)) for key, one in value.items())
    if isinstance(value, _VALUES):
        return type(value), value
    if is_dataclass(value) and not isinstance(value, type):  # configurations take attributes beside their fields
        own = tuple(_known(getattr(value, field.name)) for field in fields(value))
        return type(value), own, _known(getattr(value, "__dict__", None))
    return _Alone()


def _digest(tensor: Tensor) -> Hashable:
    """Of all bytes: the order of an index says which channels go together; weights, which say less, by a quick sum."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or type(tensor) not in _PLAIN:
        return _Alone()
    values = tensor_bytes(tensor)
    return zlib.crc32(values) if tensor.is_floating_point() else hashlib.sha256(values).digest()


_VALUES = (bool, int, float, str, bytes, type(None), type, FunctionType, BuiltinFunctionType, torch.dtype, torch.device)
_PLAIN: tuple[type, ...] = (Tensor, nn.Parameter, nn.Buffer)
