"""Which layers a measurement looks at, and how a model is run without leaving a trace on it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_prune.errors import InputError
from lit_prune.structure.example import Example
from lit_prune.task.running import undisturbed

Batches = Iterable[Any]  # see `lit_prune.task`
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


def following_norms(model: nn.Module, example: Example) -> dict[str, str]:
    """Name of the norm that reads each layer's output, found by running the model once.

    A norm follows a layer when the very tensor that the layer returned, unchanged since, is the norm's input; names and
    module order are not looked at. A layer that no norm follows is absent.

    Args:
        model: any network.
        example: what it is called with, on its device; one sample is enough.
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
        model(*example.args, **example.kwargs)
    return norms
