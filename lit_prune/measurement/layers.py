"""Which layers a measurement looks at, and how a model is run without leaving a trace on it."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_prune.errors import InputError

Batches = Iterable[tuple[Tensor, Tensor]]
CHANNEL_LAYERS = (nn.Conv2d, nn.Linear)
NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def select_layers(model: nn.Module, layers: Sequence[str] | str | None = None) -> dict[str, nn.Module]:
    """The Conv2d and Linear modules by qualified name, in module order.

    Args:
        model: any network.
        layers: names or fnmatch patterns (`layer1.*.conv?`); None takes all of them, the classifier head included.

    Raises:
        InputError: a pattern matches no layer.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, CHANNEL_LAYERS)}
    if layers is None:
        return found
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            some = ", ".join(list(found)[:4]) or "none"
            raise InputError(f"layers: no Conv2d or Linear layer matches {pattern!r}; some of the {len(found)}: {some}")
    return {n: m for n, m in found.items() if any(fnmatchcase(n, pattern) for pattern in patterns)}


def weight_rows(module: nn.Module) -> Tensor:
    """Flattened kernels w_i of a Conv2d or Linear, float64 [N, inputs], detached, on the CPU."""
    return module.weight.detach().to("cpu", torch.float64).flatten(1)


def to_model(model: nn.Module, images: Tensor) -> Tensor:
    """Images on the device and in the precision of the model's first parameter."""
    first = next(model.parameters(), images)
    return images.to(first.device, first.dtype, non_blocking=True)


@contextmanager
def undisturbed(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Evaluation mode inside; on exit the train flags and the random state are what they were.

    The random state matters because merely iterating a DataLoader draws from torch's global generator.

    Args:
        model: the network.
        gradients: whether autograd is on inside.
    """
    flags = {module: module.training for module in model.modules()}
    cuda_devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    try:
        with (
            torch.random.fork_rng(devices=cuda_devices),
            torch.inference_mode(False),
            torch.set_grad_enabled(gradients),
        ):
            model.eval()
            yield
    finally:
        for module, training in flags.items():
            module.training = training


@contextmanager
def without_gradients() -> Iterator[None]:
    """No gradients inside, and tensors that may be written to later, although inference mode is on around it."""
    with torch.inference_mode(False), torch.no_grad():  # in this order: the first switches gradients on
        yield


@contextmanager
def removing(handles: list[RemovableHandle]) -> Iterator[None]:
    """Removes the hooks in `handles` on exit, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def peek(batches: Batches) -> tuple[Tensor, Batches]:
    """The first batch of images, and batches that still contain it (an iterator is not lost).

    Raises:
        InputError: there is no batch.
    """
    with torch.random.fork_rng(devices=[]):  # see `undisturbed`
        iterator = iter(batches)
        first = next(iterator, None)
    if first is None:
        raise InputError("batches: no batch of (images, labels) in it; give at least one")
    return first[0], itertools.chain([first], iterator) if iterator is batches else batches


def following_norms(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Name of the norm that reads each layer's output, found by running the model once.

    A norm follows a layer when the very tensor that the layer returned, unchanged since, is the norm's input; names and
    module order are not looked at. A layer that no norm follows is absent.

    Args:
        model: any network.
        images: a batch, [B, C, H, W]; one image is enough.
    """
    outputs: list[tuple[str, Tensor, int]] = []  # the tensors are held, so that no identity is reused
    norms: dict[str, str] = {}

    def remember(name: str):
        return lambda module, inputs, output: outputs.append((name, output, output._version))

    def look_up(name: str):
        def hook(module: nn.Module, inputs: tuple) -> None:
            for layer, output, version in outputs:
                if inputs and inputs[0] is output and output._version == version:
                    norms[layer] = name

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, CHANNEL_LAYERS):
            handles.append(module.register_forward_hook(remember(name)))
        elif isinstance(module, NORM_LAYERS):
            handles.append(module.register_forward_pre_hook(look_up(name)))
    with removing(handles), undisturbed(model):
        model(to_model(model, images[:2]))
    return norms
