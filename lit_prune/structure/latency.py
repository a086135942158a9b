"""Measured speed and size of a network."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lit_prune.errors import InputError
from lit_prune.running import modes_kept
from lit_prune.structure.cost import cost
from lit_prune.structure.example import Example
from lit_prune.structure.labelled import key_of
from lit_prune.structure.runtimes import Runtime
from lit_prune.timing import Timing, best_times, time_runs

SINGLE, BATCHED = 60, 3  # timed passes of `compare_profiles` at the most with one image, and with a batch
LARGEST = 64  # images of a batch
PASS_SECONDS, SINGLE_SECONDS = 2.0, 10.0  # most for a pass of one batch, and for all passes with one image
BEST = 1.5  # seconds of passes of `best_latencies`
Inputs = Sequence[int] | Example  # shape of one image, or what a network is called with


def compare_latencies(
    models: Sequence[nn.Module], input_shape: Inputs, batch_size: int = 1, repeats: int = 20
) -> list[float]:
    """Median seconds of one forward pass of each network; see `time_networks`."""
    return [timing.median / 1000 for timing in time_networks(models, input_shape, batch_size, repeats)]


def time_networks(
    models: Sequence[nn.Module], input_shape: Inputs, batch_size: int = 1, repeats: int = 20
) -> list[Timing]:
    """Time of one forward pass of each network in evaluation mode, on its device, after a warm-up.

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
    runs = [_pass(model, _arguments(model, input_shape, batch_size)) for model in models]
    with modes_kept(*models), torch.inference_mode():
        for model in models:
            model.eval()
        return time_runs(runs, repeats, seconds=0.0)


def best_latencies(models: Sequence[nn.Module], images: Tensor, runtime: Runtime) -> list[float]:
    """Seconds of the quickest of some passes of each network, which take turns.

    Args:
        models: the networks; their train/eval flags are as before afterwards.
        images: what they are called with.
        runtime: what runs them.
    """
    with modes_kept(*models), torch.inference_mode():
        for model in models:
            model.eval()
        return [best.seconds for best in best_times([runtime.network(model, images) for model in models], BEST)]


def compare_profiles(
    models: Sequence[nn.Module], example_input: Tensor | Example, accuracies: Sequence[float | None]
) -> list[dict[str, Any]]:
    """Figures of networks, as in `report.json` of a compact folder; their times are measured in turns.

    Args:
        models: the networks.
        example_input: [B, C, H, W], which gives the image shape, or the arguments for one sample.
        accuracies: one a network, 0 to 1, passed through.

    Returns:
        For each: `accuracy`, `macs` and `params` (see `cost`), `latency_ms` (batch 1), `throughput` (images/s),
        `throughput_batch` (images in its batch: 64, or as many as the slowest network takes in 2 s), `bytes` (size of
        the weights as safetensors), `latency_spread_ms` (interquartile range), `noisy` (whether the times are worth
        little).
    """
    shape = tuple(example_input.shape[1:]) if isinstance(example_input, Tensor) else example_input
    seconds = compare_latencies(models, shape, repeats=1)
    passes = max(min(SINGLE, BATCHED), min(SINGLE, int(SINGLE_SECONDS / sum(seconds))))
    single = time_networks(models, shape, repeats=passes)
    batch = _batch_within(PASS_SECONDS / max(seconds))
    batched = time_networks(models, shape, batch_size=batch, repeats=BATCHED)
    figures = []
    for model, accuracy, one, many in zip(models, accuracies, single, batched, strict=True):
        counted = cost(model, example_input)
        figures.append(
            {
                "accuracy": accuracy,
                "macs": counted.macs,
                "params": counted.params,
                "latency_ms": one.median,
                "throughput": 1000 * batch / many.median,
                "throughput_batch": batch,
                "bytes": len(save(own_tensors(model))),
                "latency_spread_ms": one.spread,
                "noisy": one.noisy or many.noisy,
            }
        )
    return figures


def _batch_within(images: float) -> int:
    """The largest power of two up to `LARGEST` of so many images."""
    batch = LARGEST
    while batch > max(images, 1):
        batch //= 2
    return batch


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict on the CPU, contiguous; of tensors that share memory only the first name."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.numel() and key_of(tensor) in seen:
            continue
        seen.add(key_of(tensor))
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


def _pass(model: nn.Module, example: Example) -> Callable[[], None]:
    device = next(model.parameters(), torch.empty(0)).device

    def run() -> None:
        model(*example.args, **example.kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run
