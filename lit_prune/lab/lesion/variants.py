"""Losses of many networks that differ in one channel of one layer, with the part before the layer computed once.

The layer's edit is a function of a variant's values, and `torch.func.vmap` maps the network over them: all that
happens before the layer does not depend on the variant, so it stays as it is and runs once for a batch of images;
all that comes after, skip connections included, runs for all variants as one large batch. No architecture is known
here. Where a network does what vmap cannot map, the variants run one by one instead.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lit_prune.measurement.layers import Batches, removing
from lit_prune.running import full_float32, undisturbed
from lit_prune.task import Task, settle

LOGGER = logging.getLogger(__name__)
CPU_VALUES = 2**19  # 2 MB: what follows each other stays in the cache; larger batches are up to 2.5 times slower
DEVICE_VALUES = 2**26
ROWS = 16  # variants at once at the least: the part before the layer then costs a sixteenth of itself for each
TOLERANCE = 1e-3  # of the largest logit; rounding stays far below, a network that vmap changes does not
IN_PLACE = {
    written: plain
    for name in ("add", "sub", "mul", "div", "truediv")
    for written, plain in ((f"{name}_", name), (f"__i{name}__", f"__{name}__"))
}
NORM_ARGUMENTS = inspect.signature(F.batch_norm)


@dataclass(frozen=True)
class Variants:
    """Networks in which one channel i of a layer has the value Σ_p weight[p]·y_p + bias of the layer's raw outputs y.

    Weights and bias of zero are the lesion.

    Attributes:
        channels: int64 [V].
        weights: [V, N].
        bias: [V].
    """

    channels: Tensor
    weights: Tensor
    bias: Tensor

    @classmethod
    def lesions(cls, channels: Sequence[int] | Tensor, width: int) -> Variants:
        """Each of the channels of a layer with `width` channels set to zero."""
        channels = torch.as_tensor(channels, dtype=torch.long)
        zeros = torch.zeros(len(channels), width + 1, dtype=torch.float64)
        return cls(channels, zeros[:, :-1], zeros[:, -1])

    @classmethod
    def whole(cls, width: int) -> Variants:
        """The network as it is: the first of `width` channels in its own place."""
        weights = torch.zeros(1, width, dtype=torch.float64)
        weights[0, 0] = 1
        return cls(torch.zeros(1, dtype=torch.long), weights, torch.zeros(1, dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.channels)

    def __add__(self, other: Variants) -> Variants:
        pairs = ((self.channels, other.channels), (self.weights, other.weights), (self.bias, other.bias))
        return Variants(*(torch.cat(pair) for pair in pairs))

    def rows(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which channel as boolean [V, N], weights [V, N], bias [V], in the precision and on the device of `like`."""
        chosen = F.one_hot(self.channels, self.weights.shape[1]).bool()
        return chosen.to(like.device), self.weights.to(like), self.bias.to(like)


def edit_output(layer: nn.Module, output: Tensor, row: Sequence[Tensor]) -> Tensor:
    """The layer's output with one channel replaced.

    Args:
        layer: Conv2d (channels in dimension 1) or Linear (channels last).
        output: what it returned.
        row: chosen, boolean [N]; weight [N]; bias [].
    """
    chosen, weight, bias = row
    place = 1 if isinstance(layer, nn.Conv2d) else output.ndim - 1
    value = output.movedim(place, -1) @ weight + bias
    return torch.where(chosen.view(-1, *[1] * (output.ndim - 1 - place)), value.unsqueeze(place), output)


def variant_losses(
    model: nn.Module,
    layer: str,
    variants: Variants,
    batches: Batches,
    values: int | None = None,
    watch: Callable[[Iterable, str], Iterable] = lambda items, _: items,
    task: Task | str | None = None,
) -> Tensor:
    """Loss of each variant on each image, nats for a classifier, float64 [V, images].

    Args:
        model: any network; runs in eval mode and is left as found.
        layer: name of a Conv2d or Linear.
        variants: what to run.
        batches: what the task reads.
        values: bound on the values in the largest activation from the layer on; None: 2^19 on the CPU, 2^26 elsewhere.
            `ROWS` variants of one image run at once even where these have more.
        watch: wraps the loop over batches, for a progress bar.
        task: what a batch and an output mean; None recognises it.
    """
    task, batches = settle(task, model, batches)
    target = model.get_submodule(layer)
    found: list[Tensor] = []
    shared = None
    with undisturbed(model), full_float32():  # losses are subtracted
        for batch in watch(batches, layer):
            batch = task.to(batch, model)
            if shared is None:
                at_once = _at_once(model, target, partial(task.run, model, task.take(batch, 1)), values)
                run = shared = _choose_run(model, target, variants, batch, task)
            found.append(_batch_losses(run, variants.rows(target.weight.detach()), batch, at_once, task))
    return torch.cat(found, 1)


Forward = Callable[[], Tensor]  # runs the network on a batch: its prediction [B, ...]
Run = Callable[[tuple[Tensor, Tensor, Tensor], Any], Tensor]


def _predicting(model: nn.Module, task: Task, batch: Any) -> Forward:
    return lambda: task.prediction(task.run(model, batch))


def _choose_run(model: nn.Module, layer: nn.Module, variants: Variants, batch: Any, task: Task) -> Run:
    """All at once if that gives the same logits for the first variants on the first images, else one by one."""
    first = tuple(part[:2] for part in variants.rows(layer.weight.detach()))
    forward = _predicting(model, task, task.take(batch, 2))
    expected = _run_one_by_one(layer, first, forward)
    try:
        found = _run_together(layer, first, forward)
        error = float((found - expected).abs().max())
        if error <= TOLERANCE * float(expected.abs().max()):
            return lambda rows, part: _run_together(layer, rows, _predicting(model, task, part))
        reason = f"logits differ by {error:.1e}"
    except (RuntimeError, ValueError, TypeError) as failure:
        reason = str(failure).splitlines()[0]
    LOGGER.warning("lesions run one by one, without a shared prefix: this network cannot be mapped (%s)", reason)
    return lambda rows, part: _run_one_by_one(layer, rows, _predicting(model, task, part))


def _run_one_by_one(layer: nn.Module, rows: Sequence[Tensor], forward: Forward) -> Tensor:
    """Predictions [V, B, ...]."""
    return torch.stack([_run_edited(layer, row, forward) for row in zip(*rows, strict=True)])


def _run_together(layer: nn.Module, rows: Sequence[Tensor], forward: Forward) -> Tensor:
    """Predictions [V, B, ...], what comes before the layer computed once."""
    with _Mappable(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no rule for a further dimension
        return torch.func.vmap(lambda *row: _run_edited(layer, row, forward), randomness="same")(*rows)


def _run_edited(layer: nn.Module, row: Sequence[Tensor], forward: Forward) -> Tensor:
    hook = layer.register_forward_hook(lambda module, _, output: edit_output(module, output, row), prepend=True)
    with removing([hook]):
        return forward()


class _Mappable(TorchFunctionMode):
    """Rewrites what vmap maps slowly or not at all.

    A norm with running statistics becomes one multiply-add a channel (vmap would move the variants into the channels
    and back, two copies). `out += skip` with a shared `out` becomes `out = out + skip`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._affine: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Called for every torch function."""
        kwargs = kwargs or {}
        if func is F.batch_norm:
            call = NORM_ARGUMENTS.bind(*args, **kwargs)
            call.apply_defaults()
            if not call.arguments["training"]:
                return self._normalise(call.arguments)
        try:
            return func(*args, **kwargs)
        except RuntimeError:  # it fails before it writes
            plain = IN_PLACE.get(getattr(func, "__name__", ""))
            if plain is None:
                raise
            return getattr(Tensor, plain)(*args, **kwargs)

    def _normalise(self, call: dict) -> Tensor:
        values, mean = call["input"], call["running_mean"]
        if id(mean) not in self._affine:
            scale = torch.rsqrt(call["running_var"] + call["eps"])
            scale = scale if call["weight"] is None else scale * call["weight"]
            shift = -mean * scale if call["bias"] is None else call["bias"] - mean * scale
            self._affine[id(mean)] = scale, shift
        shape = (-1, *[1] * (values.ndim - 2))
        scale, shift = (part.view(shape) for part in self._affine[id(mean)])
        return torch.addcmul(shift, values, scale)


def _batch_losses(run: Run, rows: Sequence[Tensor], batch: Any, at_once: int, task: Task) -> Tensor:
    """Losses [V, B] of one batch, `at_once` pairs of variant and image together."""
    height = min(len(rows[0]), max(ROWS, at_once // task.size(batch)))
    columns = []
    width = max(1, at_once // max(height, 1))
    for start in range(0, task.size(batch), width):
        part = task.take(batch, slice(start, start + width))
        losses = []
        for some in zip(*(row.split(height) for row in rows), strict=True):
            losses += [task.losses(prediction.double(), part) for prediction in run(some, part)]
        columns.append(torch.stack(losses).cpu())
    return torch.cat(columns, 1)


def _at_once(model: nn.Module, layer: nn.Module, forward: Callable[[], Any], values: int | None) -> int:
    """How many pairs of variant and image may run together."""
    if values is None:
        values = CPU_VALUES if layer.weight.device.type == "cpu" else DEVICE_VALUES
    sizes: list[int] = []

    def note(module: nn.Module, inputs: tuple, output: object) -> None:
        if (sizes or module is layer) and isinstance(output, Tensor):
            sizes.append(output.numel())

    with removing([module.register_forward_hook(note) for module in model.modules()]):
        forward()
    return max(1, values // max(sizes))
