"""Running somebody's network once without leaving a mark on it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.structure.example import Example

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Takes the forward and backward hooks off every module of `model` and puts them back on exit.

    Recorders must not see probe images, and a copy must not drag a trainer along. The hooks of torch.nn.utils
    (weight norm, spectral norm, masks) stay: without them their layers do not compute.
    """
    taken = []
    for module in model.modules():
        for table in _HOOK_TABLES:
            hooks = getattr(module, table)
            if hooks:
                kept = {key: hook for key, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils")}
                taken.append((module, table, hooks))
                module.__dict__[table] = type(hooks)(kept)
    try:
        yield
    finally:
        for module, table, hooks in taken:
            module.__dict__[table] = hooks


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, autograd on, every floating-point parameter requiring grad, no hooks; all put back on exit.

    Works inside `torch.no_grad()`, `torch.inference_mode()` and autocast. The train/eval flag of each module, the
    `requires_grad` flag of each parameter and the random state of torch are as before afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    device = _device(model)
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        without_hooks(model),
    ):
        try:
            model.eval()
            for parameter, _ in flags:
                parameter.requires_grad_(parameter.is_floating_point())
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, required in flags:
                parameter.requires_grad_(required)


def one_image(model: nn.Module, example_input: Tensor) -> Tensor:
    """First image of `example_input` [B, ...] as [1, ...], a copy on the device and in the precision of `model`.

    Raises:
        InputError: `example_input` is no tensor with a batch dimension.
    """
    if isinstance(example_input, Example) and len(example_input.args) == 1 and not example_input.kwargs:
        example_input = example_input.args[0]
    if not isinstance(example_input, Tensor) or example_input.dim() < 2 or len(example_input) == 0:
        got = tuple(example_input.shape) if isinstance(example_input, Tensor) else type(example_input).__name__
        raise InputError(f"example_input is {got}; give a tensor with a batch dimension, such as [1, 3, 32, 32]")
    image = example_input[:1].detach().clone()
    parameter = next((p for p in model.parameters() if p.is_floating_point()), image)
    return image.to(parameter.device, parameter.dtype if image.is_floating_point() else None)


def run(model: nn.Module, image: Tensor) -> object:
    """Output of `model` for `image`; a failure is an InputError that names the shape.

    Raises:
        InputError: the network does not take an image of that shape.
    """
    try:
        return model(image)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"the network does not take example_input of shape {list(image.shape)}: {reason}"
        raise InputError(message) from error


def copy_network(model: nn.Module) -> nn.Module:
    """Deep copy of `model` without the hooks (and so without the trainer) that are attached to it."""
    with without_hooks(model):
        return copy.deepcopy(model)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
