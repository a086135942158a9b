"""How a network is run without leaving a trace on it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._C import DisableTorchFunction
from torch.utils._python_dispatch import _disable_current_modes
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
        InputError: a TorchScript module, an exported program, a compiled forward, a wrapper of parallel copies, or
            weights that are no plain real numbers (quantised, complex, sharded, made under inference mode).
    """
    modules = list(model.modules())
    hidden = None
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        hidden = "a TorchScript module hides its layers; give the nn.Module that it was made from"
    elif isinstance(model, torch.fx.GraphModule) and "eval" in vars(model):  # torch.export puts its own there
        hidden = "an exported program has one mode and no layers; give the nn.Module that it was made from"
    elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        hidden = f"{type(model).__name__} holds copies of a network; give its .module"
    elif any(map(_has_compiled_forward, modules)):
        hidden = "a forward in it is compiled code that goes on with this network; compile after it is cut"
    elif any(".quantized." in f"{type(module).__module__}." for module in modules):
        hidden = QUANTISED
    hidden = hidden or next(filter(None, map(_odd_weights, modules)), None)
    if hidden:
        raise InputError(f"model: {hidden}")


COMPILED = "_orig_mod"  # where torch.compile keeps the module that it wraps
QUANTISED = "its layers are quantised, and integers cannot be solved again; prune before it is quantised"
FOREIGN = ("torchao.", "torch.distributed.")  # where the kinds of tensors are from that cannot be cut
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _has_compiled_forward(module: nn.Module) -> bool:
    """Whether compiled code stands in the place of a module's own forward; a wrapper of torch.compile has its own."""
    return not hasattr(module, COMPILED) and hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")


def _odd_weights(module: nn.Module) -> str:
    """Why the parameters of a module are not what layers are solved for and cut as, or ""."""
    name, is_layer = type(module).__name__, isinstance(module, (*CONVOLUTIONS, nn.Linear))
    for parameter in module.parameters(recurse=False):
        if isinstance(parameter, nn.UninitializedParameter):
            continue
        if parameter.is_inference():
            return "its weights were made under torch.inference_mode(), which allows no gradients; make it outside"
        if is_layer and parameter.is_complex():
            return f"a {name} in it computes in complex numbers, which is not supported; take real layers"
        kind = type(parameter.data)
        if kind.__module__.startswith(FOREIGN):
            sharded = "give the whole network, on one device" if "DTensor" in kind.__name__ else "prune before that"
            return f"the weights of a {name} in it are held as {kind.__name__}; {sharded}"
        if is_layer and not parameter.is_floating_point():
            return QUANTISED
    return ""


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
    """No mode of torch sees what is computed inside; kinds of tensors keep their own ways of computing."""
    with DisableTorchFunction(), _disable_current_modes():
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
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """On exit every buffer has the values that it had: some networks write to theirs in evaluation mode too.

    One that has got another shape, such as a table of positions for longer inputs, stays: what else the network keeps
    may say that it is there.
    """
    tables = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    held = {id(buffer): buffer for _, buffers in tables for buffer in buffers.values() if buffer is not None}
    plain = [b for b in held.values() if b.layout == torch.strided and not (b.is_meta or b.is_inference())]
    values = [buffer.detach().clone() for buffer in plain]
    try:
        yield
    finally:
        for table, before in tables:
            same = {name for name, now in table.items() if _same_form(before.get(name), now)}
            table.update((name, before[name]) for name in same)
        with torch.no_grad():
            for buffer, value in zip(plain, values, strict=True):
                if _same_form(buffer, value) and not torch.equal(buffer, value):
                    buffer.copy_(value)


def _same_form(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both are tensors of one shape and type."""
    return one is not None and other is not None and (one.shape, one.dtype) == (other.shape, other.dtype)


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile wraps a module, or compiled its call in place."""
    return hasattr(module, COMPILED) or getattr(module, "_compiled_call_impl", None) is not None


class _Once:
    """In the place of the reentrant checkpoint's function of autograd: the function itself."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


def _nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    """In the place of what the other checkpoint does before and after its function."""
    yield


@contextmanager
def replaced(holder: Any, **others: Any) -> Iterator[None]:
    """Inside, attributes of a class or module of somebody else's are others; the one place where such are changed."""
    own = {name: vars(holder)[name] for name in others if name in vars(holder)}
    try:
        for name, other in others.items():
            setattr(holder, name, other)
        yield
    finally:
        for name in others:
            if name in own:
                setattr(holder, name, own[name])
            else:
                delattr(holder, name)


@contextmanager
def run_once() -> Iterator[None]:
    """Inside, what `torch.utils.checkpoint` wraps is run once, its graph kept, wherever the name was imported from.

    Else layers run again during the backward pass, and hooks see them twice; the reentrant form runs them without a
    graph and takes no `torch.autograd.grad`.
    """
    names: dict[str, Any] = {"CheckpointFunction": _Once}
    names |= {f"_checkpoint_without_reentrant_generator{end}": _nothing for end in ("", "_impl")}
    there = names.keys() & vars(torch.utils.checkpoint).keys()  # versions of torch differ in the last
    with replaced(torch.utils.checkpoint, **{name: names[name] for name in there}):
        yield


@contextmanager
def undisturbed(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Evaluation mode inside, nothing recomputed or compiled; train flags and random state are put back on exit.

    The random state matters because merely iterating a DataLoader draws from torch's global generator.
    """
    cuda_devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    with (
        modes_kept(model),
        torch.random.fork_rng(devices=cuda_devices),
        torch.inference_mode(False),
        run_once(),
        torch.compiler.set_stance("force_eager") if any(map(is_compiled, model.modules())) else nullcontext(),
        torch.set_grad_enabled(gradients),
    ):
        model.eval()
        yield
