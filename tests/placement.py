"""Tests that say nothing of a device, carried out on one: what a test builds is put there, what it compares comes back.

Tensors and networks that a test makes (also through torchvision, timm and `lit_prune.models`) are made on the CPU with
the CPU's random numbers and moved, so that their values are those of the test on the CPU. An operation of the test's
own between two devices is done on the CPU. Nothing of this holds below a frame of the library: there a mistake in
placement raises.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map

LIBRARY, BUILDERS = "lit_prune", "lit_prune.models"
DRAWN = {getattr(torch.Tensor, name) for name in ("uniform_", "normal_", "random_", "bernoulli_")}
DRAWN |= {getattr(torch.Tensor, name) for name in ("exponential_", "log_normal_", "geometric_", "cauchy_")}
DRAWN |= {getattr(torch.nn.init, name) for name in ("uniform_", "normal_", "kaiming_uniform_")}  # below no mode sees it
READ = {torch.Tensor.numpy, torch.Tensor.__array__}
PLACED = {torch.Tensor.__setitem__, torch.Tensor.__getitem__}  # what is put in, or says where, goes to the tensor
MOVES = {torch.Tensor.to, torch.Tensor.copy_, torch.Tensor.cpu, torch.Tensor.data.__set__}  # `module.cpu()` sets data
NUMBERS_TOO = {torch.stack, torch.cat, torch.equal}  # others take a number from any device


def library_frames() -> Iterator[str]:
    """Modules of the library on the stack, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.split(".")[0] == LIBRARY:
            yield name
        frame = frame.f_back


def by_test() -> bool:
    """Whether a test itself carries out what is being done, not the library."""
    return next(library_frames(), None) is None


def built_by_test() -> bool:
    """As `by_test`, or through the library's builders of networks alone."""
    return all(name.startswith(BUILDERS) for name in library_frames())


class OnDevice(TorchFunctionMode):
    """While it lasts, a test's tensors are made on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.constructors = _device_constructors()

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if func in self.constructors:
            if kwargs.get("device") is None and built_by_test():
                return self.constructed(func, args, kwargs)
        elif func in DRAWN:
            return self.drawn(func, args, kwargs)
        elif func in READ:
            if args[0].device == self.device and by_test():
                return func(args[0].cpu(), *args[1:], **kwargs)
        elif func in PLACED and mixed(args, kwargs) and by_test():
            args = (args[0], *tree_map(lambda value: _put(value, args[0].device), args[1:]))
        elif func not in MOVES and mixed(args, kwargs, func in NUMBERS_TOO) and by_test():
            args, kwargs = tree_map(_on_cpu, args), tree_map(_on_cpu, kwargs)
        return func(*args, **kwargs)

    def drawn(self, func, args, kwargs) -> torch.Tensor:
        """The tensor, filled with the CPU's random numbers where it is on the device."""
        tensor = args[0] if args else kwargs["tensor"]
        args, kwargs = args[1:], {name: value for name, value in kwargs.items() if name != "tensor"}
        if tensor.device != self.device or not built_by_test():
            return func(tensor, *args, **kwargs)
        near = func(torch.empty(tensor.shape, dtype=tensor.dtype), *args, **kwargs)
        with torch.no_grad():
            return tensor.copy_(near)

    def constructed(self, func, args, kwargs) -> torch.Tensor:
        requires_grad = kwargs.get("requires_grad", False)
        made = func(*args, **{**kwargs, "requires_grad": False}) if "requires_grad" in kwargs else func(*args, **kwargs)
        if not isinstance(made, torch.Tensor) or kwargs.get("out") is not None:
            return made
        return made.to(self.device).requires_grad_(requires_grad)


def mixed(args: tuple, kwargs: dict, numbers: bool = False) -> bool:
    """Whether there are tensors with a dimension (or without one, with `numbers`) on two devices."""
    leaves = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and (numbers or leaf.ndim))
    return len({leaf.device for leaf in leaves if not leaf.is_meta}) > 1


def _on_cpu(value: Any) -> Any:
    return _put(value, torch.device("cpu"))


def _put(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
