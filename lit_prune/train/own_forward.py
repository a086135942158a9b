"""The network that a LightningModule itself is: its layers lie in the module, its `forward` is the module's."""

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from lit_prune.structure.hooks import TABLES
from lit_prune.structure.record import ATTRIBUTE

SHARED = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
_MODULE = "lit_prune_module"
_OWN = frozenset({ATTRIBUTE, _MODULE})
_networks: "weakref.WeakKeyDictionary[nn.Module, nn.Module]" = weakref.WeakKeyDictionary()


def has_forward(module: nn.Module) -> bool:
    """Whether a module says what its call does."""
    return type(module).forward not in (LightningModule.forward, nn.Module.forward)


def own_network(module: nn.Module) -> nn.Module:
    """The network that `module` is: an object of its class without trainer, with the same parts.

    It has hooks of its own, which run when the module's step calls `self(...)`, and copies of it are networks like any
    other. What the module holds otherwise it holds too, as it is now.
    """
    network = _networks.get(module)
    if network is None:
        network = object.__new__(_class_of(type(module)))
        vars(network).update(vars(nn.Module()))
        _bind(module, network)
    held = (key for key in vars(module) if key not in TABLES | _OWN and not _wraps(module, key))
    vars(network).update({key: _of(network, module, vars(module)[key]) for key in held})
    vars(network).update({"_trainer": None, "_fabric": None})
    vars(module).setdefault("forward", _Through(module))
    return network


def put_own_network(module: nn.Module, network: nn.Module) -> None:
    """Gives the module the parts of `network`, a copy of its own one, which is its own from now on.

    Lists and tables of parts that the module keeps beside them follow; its metrics stay the objects that they are, by
    which Lightning knows them.
    """
    for name, part in list(module.named_modules()):
        if isinstance(part, Metric):
            network.set_submodule(name, part)
    listed = {key: value for key, value in vars(network).items() if key not in TABLES | _OWN and _holds_parts(value)}
    vars(module).update({name: vars(network)[name] for name in SHARED} | listed)
    _bind(module, network)


def release(module: nn.Module) -> None:
    """The module's call is its own again, so that the module can be written to a file; what is known of it stays."""
    if module in _networks:
        vars(module).pop("forward", None)


def _bind(module: nn.Module, network: nn.Module) -> None:
    vars(network).update({name: vars(module)[name] for name in SHARED} | {_MODULE: weakref.ref(module)})
    _networks[module] = network


def _of(network: nn.Module, module: nn.Module, value: Any) -> Any:
    """A value that the module holds, as the network holds it: methods of the module are the network's own."""
    own = isinstance(value, MethodType) and value.__self__ is module
    return MethodType(value.__func__, network) if own else value


def _holds_parts(value: Any) -> bool:
    return any(isinstance(leaf, nn.Module | nn.Parameter) for leaf in tree_leaves(value))


def _wraps(module: nn.Module, key: str) -> bool:
    """Whether what the module holds under a name stands before a method of its class, as a wrapper of it does."""
    return callable(vars(module)[key]) and callable(getattr(type(module), key, None))


class _Through:
    """In the place of a module's `forward`: calls its network, whose hooks run."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module()
        assert module is not None  # it is what calls
        network = own_network(module)
        with _mode(network, module.training):
            return network(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Through":
        module = self.module()
        assert module is not None  # it is what is copied
        return _Through(memo.get(id(module), module))


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """The module trains or not inside; its parts are left as they are."""
    before = module.training
    vars(module)["training"] = training
    try:
        yield
    finally:
        vars(module)["training"] = before


def _class_of(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        module: nn.Module | None = vars(self)[_MODULE]()
        if module is not None and _networks.get(module) is self:
            with _mode(module, self.training):
                return kind.forward(module, *args, **kwargs)  # what it leaves in the module is there afterwards
        return kind.forward(self, *args, **kwargs)  # of a copy

    named = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), named | {"forward": functools.wraps(kind.forward)(forward)})
