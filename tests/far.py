"""A device that is not there: tensors with values that live apart from the CPU's, to run tests of placement anywhere.

A `Far` tensor holds a tensor of the CPU and says that it is on `PLACE`. Operations between it and a tensor of the CPU
raise as they do on an accelerator; what crosses (`to`, `cpu`, `copy_`, `item`, indices, numbers without a dimension)
is what crosses there. Autograd, optimizers, copies and `torch.save` work. The type is "lazy", the one of torch's that
has no kernels in any wheel and whose backward pass needs no thread of its own.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from placement import by_test
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

PLACE = torch.device("lazy", 0)
aten = torch.ops.aten
CROSSING = {aten.copy_.default, aten._to_copy.default, aten._local_scalar_dense.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Far(torch.Tensor):
    """A tensor on `PLACE`."""

    near: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> "Far":
        form = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        far = torch.Tensor._make_wrapper_subclass(cls, near.size(), **form, layout=near.layout, device=PLACE)
        far.near = near
        return far

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["near"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> "Far":
        return Far(inner["near"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> Any:
        return carry_out(func, args, kwargs or {})

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.near.untyped_storage()

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        value, required = value.detach().to(PLACE), self.requires_grad
        parameter = isinstance(self, torch.nn.Parameter)
        torch.utils.swap_tensors(
            self, torch.nn.Parameter(value, required) if parameter else value.requires_grad_(required)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            near = self.detach().near.clone()
            memo[id(self)] = _moved(near, self.requires_grad, isinstance(self, torch.nn.Parameter))
        return memo[id(self)]

    def __format__(self, form: str) -> str:
        return format(self.near.detach(), form)

    def tolist(self) -> Any:
        return self.near.tolist()

    def numpy(self, *dtype: Any, **settings: Any) -> Any:
        if by_test():
            return self.near.detach().__array__(*dtype, **settings)
        raise TypeError(f"can't convert {PLACE} device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def __reduce_ex__(self, protocol: int) -> tuple:
        return (_moved, (self.detach().near, self.requires_grad, isinstance(self, torch.nn.Parameter)))


def _moved(near: torch.Tensor, requires_grad: bool, parameter: bool) -> torch.Tensor:
    far = Far(near).requires_grad_(requires_grad)
    return torch.nn.Parameter(far, requires_grad) if parameter else far


def carry_out(func: Any, args: tuple, kwargs: dict) -> Any:
    """One operation, on the CPU's tensors inside; its result is where the operation's operands are."""
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    far = any(isinstance(operand, Far) for operand in operands)
    if far and func not in CROSSING and not together(func, args, operands):
        places = ", ".join(str(operand.device) for operand in operands)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {places}")
    asked = kwargs.get("device")
    if asked is not None:
        far = torch.device(asked).type == PLACE.type
        kwargs = {**kwargs, "device": "cpu" if far else asked}
    elif func is aten.copy_.default:
        far = isinstance(args[0], Far)
    if "pin_memory" in kwargs:
        kwargs = {**kwargs, "pin_memory": False}
    result = func(*tree_map(_near, args), **tree_map(_near, kwargs))
    if not far:
        return args[0] if func is aten.copy_.default else result
    with torch.inference_mode(False):  # a wrapper that was made in it has no version that its views could share
        result = tree_map(lambda leaf: Far(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)
        return result if asked is not None else return_and_correct_aliasing(func, args, kwargs, result)


def together(func: Any, args: tuple, operands: list[torch.Tensor]) -> bool:
    """Whether an operation takes operands that are where these are; a tensor there can be indexed from the CPU."""
    if func in INDEXING:
        if not isinstance(args[0], Far):
            return False
        operands = [operand for operand in operands if all(operand is not index for index in args[1])]
    return all(isinstance(operand, Far) or not operand.ndim for operand in operands)


def _near(value: Any) -> Any:
    return value.near if isinstance(value, Far) else value


class FarDevice(TorchDispatchMode):
    """While it lasts, in the thread that began it, `PLACE` is a device like another."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        return carry_out(func, args, kwargs or {})


AUTOCAST, RUN = torch.autocast.__init__, threading.Thread.run


def _autocast(self: torch.autocast, device_type: str, *args: Any, **settings: Any) -> None:
    AUTOCAST(self, "cpu" if device_type == PLACE.type else device_type, *args, **settings)


def _run(self: threading.Thread) -> None:
    torch._C._set_only_lift_cpu_tensors(True)  # of this thread
    with FarDevice():
        RUN(self)


@contextmanager
def far_device() -> Iterator[None]:
    """As `FarDevice`, in every thread, with autocast and with networks whose parameters stay the same objects."""
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=PLACE) is made here and then moved
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.autocast.__init__, threading.Thread.run = _autocast, _run
    try:
        with torch.serialization.safe_globals([_moved]), FarDevice():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(False)
        torch.autocast.__init__, threading.Thread.run = AUTOCAST, RUN


class FarAccelerator(CPUAccelerator):
    """Lightning's way to `PLACE`."""

    def setup_device(self, device: torch.device) -> None:
        pass

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [PLACE]

    @staticmethod
    def name() -> str:
        return "far"
