"""Activations of named layers as streaming sums: `with record(model) as recording`, then one forward pass."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.layers import (
    following_norms,
    other_weights,
    position_view,
    removing,
    say_left_out,
    select_layers,
    without_gradients,
)
from lit_prune.measurement.moments import Moments, picked
from lit_prune.measurement.pointwise import Source, pointwise_input, weight_state
from lit_prune.measurement.protocol import DEFAULT_PROTOCOL, Protocol
from lit_prune.measurement.sums import ActivationSums, LayerSums
from lit_prune.running import MATMUL, full_float32
from lit_prune.structure.example import Example


class Recording:
    """What `record` yields: `sums` so far, and `add_target` to call after each forward pass.

    Pooled values wait for `add_target` in memory; where there are no task variables, give it [B, 0].

    A layer that runs more than once in a pass, or whose network is called more than once before `add_target`, adds a
    sample of each image every time, with the same T. Calls on more samples than there are images (windows, frames) are
    averaged over those of an image for the target axis.
    """

    def __init__(self, protocol: Protocol) -> None:
        self._sums = ActivationSums()
        self._protocol = protocol
        self._sources: dict[str, Source] = {}
        self._pooled: dict[str, list[Tensor]] = {}  # since `add_target`, [B, N] of each call
        self._images: int | None = None  # of the batch that is running
        self._generator = torch.Generator().manual_seed(protocol.seed)
        self._batch = -1
        self._drawn: dict[tuple[int, int], Tensor] = {}  # of the batch that is running

    @property
    def sums(self) -> ActivationSums:
        """The sums so far; layers appear in the order in which they first ran. Read seldom: it adds what is pending."""
        self._check_finite()
        for name in list(self._sources):
            self._take_source(name)
        return self._sums

    def add_target(self, target: Tensor) -> None:
        """Adds the task variables [B, V] of the batch that has just run."""
        self._check_finite()
        with without_gradients():
            for name, calls in self._pooled.items():
                for pooled in calls:
                    if len(pooled) == len(target):
                        self._sums.layers[name].add_target(pooled, target)
                    else:
                        self._sums.left_out.setdefault(name, "does not have one sample an image: no target axis")
            self._sums.add_target(target)
        self._pooled = {}

    def start_batch(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model."""
        self._check_finite()
        self._drawn = {}
        self._images = images_in((*args, *kwargs.values()))
        self._batch += 1
        if self._images == 0:
            raise InputError(f"batches: batch {self._batch} holds no images; leave it out")

    def observe(self, name: str, layer: nn.Module, inputs: tuple | None, output: Tensor) -> None:
        """Adds one output of the layer `name`, by way of its input where that is cheaper.

        Args:
            name: of the layer.
            layer: it.
            inputs: what it was called with; None where `output` is that of the norm that follows it.
            output: [B, ...].
        """
        with exact_sums(output.device.type):
            values = position_view(layer, output.detach(), self._protocol.token)
            narrow = None if inputs is None or values.shape[1] == 1 else pointwise_input(layer, inputs, output)
            sums = self._layer(name, values)
            if narrow is None:
                pooled = self._add(sums.outputs, sums.pooled, values)
            else:
                narrow = position_view(layer, narrow.detach(), self._protocol.token)
                source = self._source(name, layer, narrow)
                pooled = source.outputs(self._add(source.inputs, source.pooled, narrow), sums.pooled.shift)
            self._pooled.setdefault(name, []).append(pooled)

    def _add(self, moments: Moments, means: Moments, values: Tensor) -> Tensor:
        """Adds values [B, P, n] at the positions that the protocol asks for, and their means to `means`.

        Returns:
            Shifted means, one sample an image, [B, n].
        """
        places = self._places(*values.shape[:2])
        if places is not None:
            places = places.to(values.device)
            if self._protocol.target_pooling == "match":
                values, places = picked(values, places), None
        pooled = moments.add(values, places).unflatten(0, (-1, self._windows(values))).mean(1)
        if means is not moments:
            means.add_shifted(pooled)
        return pooled

    def _layer(self, name: str, values: Tensor) -> LayerSums:
        """The layer's sums, begun around its first outputs where there are none yet."""
        one_position = values.shape[1] == self._windows(values) == 1
        if name not in self._sums.layers:
            self._sums.layers[name] = LayerSums.around(values, one_position)
        sums = self._sums.layers[name]
        if sums.pooled is sums.outputs and not one_position:
            sums.pooled = sums.outputs.copy()
        return sums

    def _source(self, name: str, layer: nn.Module, values: Tensor) -> Source:
        """What the layer's inputs [B, P, C] are added to; begun anew where its weights have changed."""
        if name in self._sources and self._sources[name].state != weight_state(layer):
            self._take_source(name)
        if name not in self._sources:
            self._sources[name] = Source.of(layer, values)
        return self._sources[name]

    def _take_source(self, name: str) -> None:
        """Adds the outputs that a layer's inputs stand for to its sums."""
        source, sums = self._sources.pop(name), self._sums.layers[name]
        with exact_sums(source.weight.device.type):
            sums.outputs = sums.outputs + source.inputs.mapped(source.weight, source.bias)
            sums.pooled = sums.pooled + source.pooled.mapped(source.weight, source.bias)

    def _windows(self, values: Tensor) -> int:
        """Samples of an image in values [B, P, N]; 1 where they are not equally many of each."""
        images = self._images or len(values)
        return len(values) // images if len(values) % images == 0 else 1

    def _check_finite(self) -> None:
        """Raises if the batch that is running has met a value that is not a number; asks the device once."""
        if self._pooled:
            totals = torch.stack([torch.stack([p.sum() for p in calls]).sum() for calls in self._pooled.values()])
            for name, finite in zip(self._pooled, totals.isfinite().tolist(), strict=True):
                if not finite:
                    self._pooled = {}
                    raise InputError(f"batches: batch {self._batch} makes NaN or infinite values in layer {name!r}")

    def _places(self, images: int, positions: int) -> Tensor | None:
        """Random positions of each image, [B, k], or None for all of them; one draw serves all layers of a map size."""
        wanted = self._protocol.positions
        if wanted == "all" or wanted >= positions:
            return None
        if (images, positions) not in self._drawn:
            keys = torch.rand(images, positions, generator=self._generator)
            smallest = keys.topk(wanted, 1, largest=False, sorted=False).indices
            self._drawn[images, positions] = smallest.sort(1).values  # the order of memory
        return self._drawn[images, positions]


def images_in(values: Sequence[Any]) -> int | None:
    """Number of images in the arguments of a network; None where there is no tensor.

    It is the length of the first tensor, or of a list of images [C, H, W].
    """
    for value in values:
        if isinstance(value, Mapping):
            value = list(value.values())
        elif isinstance(value, list | tuple) and value and all(isinstance(v, Tensor) and v.ndim == 3 for v in value):
            return len(value)
        found = images_in(value) if isinstance(value, list | tuple) else None
        if isinstance(value, Tensor) and value.ndim:
            found = len(value)
        if found is not None:
            return found
    return None


@contextmanager
def exact_sums(device_type: str) -> Iterator[None]:
    """Neither gradients nor inference mode inside, no autocast, and products of float32 in float32."""
    with full_float32(MATMUL), without_gradients(), torch.autocast(device_type, enabled=False):
        yield


@contextmanager
def record(
    model: nn.Module,
    layers: Sequence[str] | str | None = None,
    protocol: Protocol = DEFAULT_PROTOCOL,
    example: Example | None = None,
) -> Iterator[Recording]:
    """Hooks at the named layers; each forward pass of `model` inside adds to `recording.sums`. Hooks vanish on exit.

    What has weights and is not recorded is in `recording.sums.left_out`, and is said in one line.

    Args:
        model: any network.
        layers: names or fnmatch patterns; None takes every convolution and linear layer.
        protocol: hook point, positions per image, pooling, token.
        example: what the model is called with; needed for hook point `post_bn` alone, to find the norms.

    Raises:
        InputError: a pattern without a match; while running: NaN or infinite activations (layer and batch are named).
    """
    recording = Recording(protocol)
    chosen, modules = select_layers(model, layers), dict(model.named_modules())
    norms = _norms(model, protocol, example)

    def observer(name: str, layer: nn.Module):
        if name in norms:
            return lambda module, inputs, output: recording.observe(name, layer, None, output)
        return lambda module, inputs, output: recording.observe(name, layer, inputs, output)

    handles = [model.register_forward_pre_hook(recording.start_batch, with_kwargs=True)]
    for name, layer in chosen.items():
        handles.append(modules[norms.get(name, name)].register_forward_hook(observer(name, layer)))
    with removing(handles):
        yield recording
    sums = recording.sums  # complete, for whoever holds them
    if sums.layers:
        sums.left_out |= {name: "does not run in a forward pass" for name in chosen if name not in sums.layers}
    if layers is None:
        sums.left_out |= {name: f"is a {kind}" for name, kind in other_weights(model).items()}
    say_left_out(sums.left_out)


def _norms(model: nn.Module, protocol: Protocol, example: Example | None) -> dict[str, str]:
    """The norms whose outputs are recorded in place of those of the layers before them."""
    if protocol.hook_point != "post_bn":
        return {}
    if example is None:
        raise InputError("example: hook point post_bn needs what the model is called with, to find the norms; give it")
    return following_norms(model, example)
