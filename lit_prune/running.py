"""How a network is run without leaving a trace on it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._C import DisableTorchFunction
from torch.utils._mode_utils import no_dispatch
from torch.utils.hooks import RemovableHandle

from lit_prune.errors import InputError

CUDNN: Any = torch.backends.cudnn  # both put their settings there as they are imported
MKLDNN: Any = torch.backends.mkldnn
MATMUL = (torch.backends.cuda.matmul, MKLDNN.matmul)  # what may compute in less than float32
OTHERS = tuple(getattr(kind, name) for kind in (CUDNN, MKLDNN) for name in ("conv", "rnn") if hasattr(kind, name))
PRECISION, EXACT = (  # name of their setting, its values that mean float32; the first of them is the one to set
    ("fp32_precision", ("ieee", "none")) if hasattr(MKLDNN.matmul, "fp32_precision") else ("allow_tf32", (False,))
)


@contextmanager
def full_float32(backends: Sequence[Any] = (*MATMUL, *(OTHERS or (CUDNN,)))) -> Iterator[None]:
    """Inside, float32 is computed in float32, not in TF32 or bfloat16, whatever is allowed outside.

    On CUDA convolutions take TF32 unless they are told not to, and many programs allow it for products: two forms of
    one network then differ by a thousandth of their outputs.

    Args:
        backends: whose products; default: every product and convolution.
    """
    found = {backend: getattr(backend, PRECISION, EXACT[0]) for backend in backends}
    lowered = {backend: value for backend, value in found.items() if value not in EXACT}
    try:
        for backend in lowered:
            setattr(backend, PRECISION, EXACT[0])
        yield
    finally:
        for backend, value in lowered.items():
            setattr(backend, PRECISION, value)


def check_visible(model: nn.Module) -> None:
    """Refuses networks whose layers cannot be seen, run apart or put together anew.

    Raises:
        InputError: a TorchScript module, an exported program, quantised layers, or a wrapper of parallel copies.
    """
    modules = list(model.modules())
    hidden = None
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        hidden = "a TorchScript module hides its layers; give the nn.Module that it was made from"
    elif isinstance(model, torch.fx.GraphModule) and "eval" in vars(model):  # torch.export puts its own there
        hidden = "an exported program has one mode and no layers; give the nn.Module that it was made from"
    elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        hidden = f"{type(model).__name__} holds copies of a network; give its .module"
    elif any(".quantized." in f"{type(module).__module__}." for module in modules):
        hidden = "its layers are quantised, and integers cannot be solved again; prune before it is quantised"
    if hidden:
        raise InputError(f"model: {hidden}")


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes the hooks in `handles` on exit, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def unwatched() -> Iterator[None]:
    """No mode of torch sees what is computed inside."""
    with DisableTorchFunction(), no_dispatch():
        yield


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """On exit every module trains or not as it did before."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def undisturbed(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Evaluation mode inside; on exit the train flags and the random state are what they were.

    The random state matters because merely iterating a DataLoader draws from torch's global generator.
    """
    cuda_devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    with (
        modes_kept(model),
        torch.random.fork_rng(devices=cuda_devices),
        torch.inference_mode(False),
        torch.set_grad_enabled(gradients),
    ):
        model.eval()
        yield
