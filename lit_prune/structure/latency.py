"""Measured speed and size of a network."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lit_prune.errors import InputError
from lit_prune.structure.cost import cost
from lit_prune.structure.example import Example

Inputs = Sequence[int] | Example  # shape of one image, or what a network is called with


def measure_latency(model: nn.Module, input_shape: Inputs, batch_size: int = 1, repeats: int = 20) -> float:
    """Median seconds of one forward pass of `model`; see `compare_latencies`."""
    return compare_latencies([model], input_shape, batch_size, repeats)[0]


def compare_latencies(
    models: Sequence[nn.Module], input_shape: Inputs, batch_size: int = 1, repeats: int = 20
) -> list[float]:
    """Median seconds of one forward pass of each network in evaluation mode, on its device, after a warm-up.

    The networks take turns, so that whatever else the machine does falls on all of them alike.

    Args:
        models: the networks; their train/eval flags are as before afterwards.
        input_shape: shape of one image, (C, H, W), or the arguments for one sample.
        batch_size: samples in a pass.
        repeats: timed passes of each; three more are run first and not timed.

    Raises:
        InputError: fewer than one image or pass.
    """
    if batch_size < 1 or repeats < 1:
        raise InputError(f"batch_size={batch_size} and repeats={repeats} must both be at least 1")
    modes = [(module, module.training) for model in models for module in model.modules()]
    inputs = [_arguments(model, input_shape, batch_size) for model in models]
    try:
        with torch.inference_mode():
            for model in models:
                model.eval()
            rounds = [
                [_time_pass(model, example) for model, example in zip(models, inputs, strict=True)]
                for _ in range(repeats + 3)
            ][3:]
    finally:
        for module, training in modes:
            module.training = training
    return [sorted(seconds)[len(seconds) // 2] for seconds in zip(*rounds, strict=True)]


def profile(model: nn.Module, example_input: Tensor, accuracy: float | None = None) -> dict[str, float | int | None]:
    """Figures of one network; see `compare_profiles`."""
    return compare_profiles([model], example_input, [accuracy])[0]


def compare_profiles(
    models: Sequence[nn.Module], example_input: Tensor | Example, accuracies: Sequence[float | None]
) -> list[dict[str, float | int | None]]:
    """Figures of networks, as in `report.json` of a compact folder; their times are measured in turns.

    Args:
        models: the networks.
        example_input: [B, C, H, W], which gives the image shape, or the arguments for one sample.
        accuracies: one a network, 0 to 1, passed through.

    Returns:
        For each: `accuracy`, `macs` and `params` (see `cost`), `latency_ms` (batch 1), `throughput` (images/s at batch
        64), `bytes` (size of the weights as safetensors).
    """
    shape = tuple(example_input.shape[1:]) if isinstance(example_input, Tensor) else example_input
    single = compare_latencies(models, shape, repeats=60)
    batched = compare_latencies(models, shape, batch_size=64, repeats=3)
    figures = []
    for model, accuracy, latency, seconds in zip(models, accuracies, single, batched, strict=True):
        counted = cost(model, example_input)
        figures.append(
            {
                "accuracy": accuracy,
                "macs": counted.macs,
                "params": counted.params,
                "latency_ms": 1000 * latency,
                "throughput": 64 / seconds,
                "bytes": len(save(own_tensors(model))),
            }
        )
    return figures


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict on the CPU, contiguous; of tensors that share memory only the first name."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return tensors


def _arguments(model: nn.Module, inputs: Inputs, batch_size: int) -> Example:
    """Arguments for so many samples, on the device and in the precision of the network's parameters."""
    parameter = next(model.parameters(), torch.empty(0))
    if not isinstance(inputs, Example):
        return Example((torch.zeros(batch_size, *inputs, device=parameter.device, dtype=parameter.dtype),))

    def repeated(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        one = value.ndim and len(value) == 1
        return value.repeat(batch_size, *[1] * (value.ndim - 1)) if one else value

    return Example(*tree_map(repeated, (inputs.args, inputs.kwargs)))


def _time_pass(model: nn.Module, example: Example) -> float:
    device = next(model.parameters(), torch.empty(0)).device
    start = time.perf_counter()
    model(*example.args, **example.kwargs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
