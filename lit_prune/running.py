"""How a network is run without leaving a trace on it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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

    Args:
        model: the network.
        gradients: whether autograd is on inside.
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
