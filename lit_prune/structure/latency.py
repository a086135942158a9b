"""Measured speed and size of a network."""

import time
from collections.abc import Sequence

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.structure.cost import cost


def measure_latency(model: nn.Module, input_shape: Sequence[int], batch_size: int = 1, repeats: int = 20) -> float:
    """Median seconds of one forward pass of `model`; see `compare_latencies`."""
    return compare_latencies([model], input_shape, batch_size, repeats)[0]


def compare_latencies(
    models: Sequence[nn.Module], input_shape: Sequence[int], batch_size: int = 1, repeats: int = 20
) -> list[float]:
    """Median seconds of one forward pass of each network in evaluation mode, on its device, after a warm-up.

    The networks take turns, so that whatever else the machine does falls on all of them alike.

    Args:
        models: the networks; their train/eval flags are as before afterwards.
        input_shape: shape of one image, (C, H, W).
        batch_size: images in a pass.
        repeats: timed passes of each; three more are run first and not timed.

    Raises:
        InputError: fewer than one image or pass.
    """
    if batch_size < 1 or repeats < 1:
        raise InputError(f"batch_size={batch_size} and repeats={repeats} must both be at least 1")
    modes = [(module, module.training) for model in models for module in model.modules()]
    inputs = [_images(model, (batch_size, *input_shape)) for model in models]
    try:
        with torch.inference_mode():
            for model in models:
                model.eval()
            rounds = [
                [_time_pass(model, images) for model, images in zip(models, inputs, strict=True)]
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
    models: Sequence[nn.Module], example_input: Tensor, accuracies: Sequence[float | None]
) -> list[dict[str, float | int | None]]:
    """Figures of networks, as in `report.json` of a compact folder; their times are measured in turns.

    Args:
        models: the networks.
        example_input: [B, C, H, W]; gives the image shape.
        accuracies: one a network, 0 to 1, passed through.

    Returns:
        For each: `accuracy`, `macs` and `params` (see `cost`), `latency_ms` (batch 1), `throughput` (images/s at batch
        64), `bytes` (size of the weights as safetensors).
    """
    shape = tuple(example_input.shape[1:])
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


def _images(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """Zeros on the device and in the precision of the network's parameters."""
    parameter = next(model.parameters(), torch.empty(0))
    return torch.zeros(*shape, device=parameter.device, dtype=parameter.dtype)


def _time_pass(model: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start
