"""Measured speed and size of a network."""

import time
from collections.abc import Sequence

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.structure.cost import cost


def measure_latency(model: nn.Module, input_shape: Sequence[int], batch_size: int = 1, repeats: int = 20) -> float:
    """Median seconds of one forward pass in evaluation mode, on the model's device, after a warm-up.

    Args:
        model: the network; its train/eval flags are as before afterwards.
        input_shape: shape of one image, (C, H, W).
        batch_size: images in a pass.
        repeats: timed passes; three more are run first and not timed.

    Raises:
        InputError: fewer than one image or pass.
    """
    if batch_size < 1 or repeats < 1:
        raise InputError(f"batch_size={batch_size} and repeats={repeats} must both be at least 1")
    modes = [(module, module.training) for module in model.modules()]
    parameter = next(model.parameters(), torch.empty(0))
    images = torch.zeros(batch_size, *input_shape, device=parameter.device, dtype=parameter.dtype)
    try:
        with torch.inference_mode():
            model.eval()
            seconds = [_time_pass(model, images) for _ in range(repeats + 3)][3:]
    finally:
        for module, training in modes:
            module.training = training
    return sorted(seconds)[len(seconds) // 2]


def profile(model: nn.Module, example_input: Tensor, accuracy: float | None = None) -> dict[str, float | int | None]:
    """Figures of one network, as in `report.json` of a compact folder.

    Args:
        model: the network.
        example_input: [B, C, H, W]; gives the image shape.
        accuracy: 0 to 1, passed through.

    Returns:
        `accuracy`, `macs` and `params` (see `cost`), `latency_ms` (batch 1), `throughput` (images/s at batch 64),
        `bytes` (size of the weights as safetensors).
    """
    counted = cost(model, example_input)
    shape = tuple(example_input.shape[1:])
    return {
        "accuracy": accuracy,
        "macs": counted.macs,
        "params": counted.params,
        "latency_ms": 1000 * measure_latency(model, shape),
        "throughput": 64 / measure_latency(model, shape, batch_size=64, repeats=3),
        "bytes": len(save(own_tensors(model))),
    }


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


def _time_pass(model: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start
