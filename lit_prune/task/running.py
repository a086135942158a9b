"""How a network is run without leaving a trace on it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
