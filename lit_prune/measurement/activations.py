"""Activations of named layers as streaming sums: `with record(model) as recording`, then one forward pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.layers import (
    Batches,
    following_norms,
    removing,
    select_layers,
    without_gradients,
)
from lit_prune.measurement.moments import ActivationSums
from lit_prune.measurement.pointwise import affine_map, loses_digits, pointwise_input, weight_state
from lit_prune.measurement.protocol import DEFAULT_PROTOCOL, Protocol
from lit_prune.measurement.streaming import Blocks, LayerStream
from lit_prune.structure.example import Example
from lit_prune.task import Task, settle
from lit_prune.task.running import undisturbed

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # that may multiply in less than float32
PRECISION, EXACT = (  # name of their setting, its values that mean float32; the first of them is the one to set
    ("fp32_precision", ("ieee", "none")) if hasattr(BACKENDS[1], "fp32_precision") else ("allow_tf32", (False,))
)


class Recording:
    """What `record` yields: `sums` so far, and `add_target` to call after each forward pass."""

    def __init__(self, protocol: Protocol) -> None:
        self._sums = ActivationSums()
        self._streams: dict[str, LayerStream] = {}
        self._protocol = protocol
        self._blocks = Blocks()
        self._pooled: dict[str, Tensor] = {}  # of the batch that is running, [B, N]
        self._weights: dict[str, tuple[int, ...]] = {}  # of the layers that are read at their inputs
        self._generator = torch.Generator().manual_seed(protocol.seed)
        self._batch = -1
        self._drawn: dict[int, Tensor] = {}  # of the batch that is running
        self._lowered: dict[object, str | bool] = {}  # while it runs

    @property
    def sums(self) -> ActivationSums:
        """The sums so far; layers appear in the order in which they first ran. Read seldom: it adds what is pending."""
        self._check_finite()
        lowered = lowered_precision()
        for stream in self._streams.values():
            with exact_sums(lowered, stream.shift.device.type):
                stream.flush()
        return self._sums

    def add_target(self, target: Tensor) -> None:
        """Adds the task variables [B, V] of the batch that has just run."""
        self._check_finite()
        with without_gradients():
            for name, pooled in self._pooled.items():
                self._sums.layers[name].add_target(pooled, target)
            self._sums.add_target(target)
        self._pooled = {}

    def start_batch(self, *_: object) -> None:
        """Forward pre-hook of the whole model."""
        self._check_finite()
        self._pooled, self._drawn = {}, {}
        self._lowered = lowered_precision()
        self._batch += 1

    def observe(self, name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        """Adds one output of the layer `name`, by way of its input where that is exact and cheaper."""
        if name in self._pooled:
            raise InputError(f"layers: {name!r} runs more than once in a forward pass; leave it out with layers=")
        with exact_sums(self._lowered, output.device.type):
            outputs = position_view(module, output.detach(), self._protocol.token)
            source = self._source(name, module, inputs, output)
            stream = self._stream(name, module, source, outputs)
            values = outputs if stream.affine is None else source
            places = self._places(*values.shape[:2])
            places = None if places is None else places.to(values.device)
            self._pooled[name] = stream.add(values, places, self._protocol.target_pooling == "match", outputs)

    def _source(self, name: str, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        """The layer's input as [B, P, C] if its moments give the output's exactly and its weights are as they were."""
        known = self._weights.get(name)
        if self._protocol.hook_point != "pre_bn" or (known and known != weight_state(module)):
            return None
        source = pointwise_input(module, inputs, output)
        return None if source is None else position_view(module, source.detach(), self._protocol.token)

    def _stream(self, name: str, module: nn.Module, source: Tensor | None, outputs: Tensor) -> LayerStream:
        """The layer's stream; one that was fed inputs goes over to outputs, for good, where those no longer do."""
        stream = self._streams.get(name)
        if stream is None:
            if not len(outputs):
                raise InputError(f"batches: batch {self._batch} holds no images; leave it out")
            if source is None:
                stream = LayerStream.start(outputs, self._blocks)
            else:
                dtype = torch.float64 if loses_digits(module, source, outputs) else source.dtype
                stream = LayerStream.start(source, self._blocks, affine_map(module, dtype))
                self._weights[name] = weight_state(module)
        elif stream.affine is not None and source is None:
            stream.flush()
            shift = stream.sums.shift.to(torch.promote_types(outputs.dtype, torch.float32))
            stream = LayerStream(stream.sums.reshift(shift), shift, self._blocks)
        self._streams[name], self._sums.layers[name] = stream, stream.sums
        return stream

    def _check_finite(self) -> None:
        """Raises if the batch that is running has met a value that is not a number; asks the device once."""
        if self._pooled:
            totals = torch.stack([self._sums.layers[name].pooled_first.sum() for name in self._pooled])
            for name, finite in zip(self._pooled, totals.isfinite().tolist(), strict=True):
                if not finite:
                    self._pooled = {}
                    raise InputError(f"batches: batch {self._batch} makes NaN or infinite values in layer {name!r}")

    def _places(self, images: int, positions: int) -> Tensor | None:
        """Random positions of each image, [B, k], or None for all of them; one draw serves all layers of a map size."""
        wanted = self._protocol.positions
        if wanted == "all" or wanted >= positions:
            return None
        if positions not in self._drawn:
            keys = torch.rand(images, positions, generator=self._generator)
            smallest = keys.topk(wanted, 1, largest=False, sorted=False).indices
            self._drawn[positions] = smallest.sort(1).values  # the order of memory
        return self._drawn[positions]


def position_view(module: nn.Module, output: Tensor, token: int | None) -> Tensor:
    """A layer's output as [B, P, N] (images, positions, channels), without a copy.

    Conv2d: P = H·W. Linear on [B, N]: P = 1; on tokens [B, T, N]: the chosen token alone (P = 1), or all of them with
    `token=None`; on [B, H, W, N]: P = H·W.

    Raises:
        InputError: not a tensor of 2 to 4 dimensions, or no such token.
    """
    if not isinstance(output, Tensor) or not 2 <= output.ndim <= 4:
        raise InputError(f"model: the output of a {type(module).__name__} is not one tensor of 2 to 4 dimensions")
    if output.ndim == 2:
        return output[:, None]
    if output.ndim == 3:
        if token is None:
            return output
        if not -output.shape[1] <= token < output.shape[1]:
            raise InputError(f"token: {token} is not one of the {output.shape[1]} tokens; give a smaller index or None")
        return output[:, token][:, None]
    if isinstance(module, nn.Linear):
        return output.flatten(1, 2)
    return output.flatten(2).transpose(1, 2)


def lowered_precision() -> dict[object, str | bool]:
    """Backends that may multiply float32 matrices in less than float32, as TF32 or bfloat16, and their settings."""
    found = {backend: getattr(backend, PRECISION, EXACT[0]) for backend in BACKENDS}
    return {backend: value for backend, value in found.items() if value not in EXACT}


@contextmanager
def exact_sums(lowered: dict[object, str | bool], device_type: str) -> Iterator[None]:
    """Neither gradients nor inference mode inside, no autocast, and products of float32 in float32.

    Args:
        lowered: backends whose precision was lowered, from `lowered_precision`.
        device_type: the device whose autocast is switched off.
    """
    cast = torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
    try:
        for backend in lowered:
            setattr(backend, PRECISION, EXACT[0])
        with without_gradients(), cast:
            yield
    finally:
        for backend, value in lowered.items():
            setattr(backend, PRECISION, value)


@contextmanager
def record(
    model: nn.Module,
    layers: Sequence[str] | str | None = None,
    protocol: Protocol = DEFAULT_PROTOCOL,
    example: Example | None = None,
) -> Iterator[Recording]:
    """Hooks at the named layers; each forward pass of `model` inside adds to `recording.sums`. Hooks vanish on exit.

    Args:
        model: any network.
        layers: names or fnmatch patterns; None takes every Conv2d and Linear with more than one output channel.
        protocol: hook point, positions per image, pooling, token.
        example: what the model is called with; needed for hook point `post_bn` alone, to find the norms.

    Raises:
        InputError: a pattern without a match; while running: NaN or infinite activations (layer and batch are named),
            a layer that runs twice in a forward pass.
    """
    recording = Recording(protocol)
    modules = dict(model.named_modules())
    norms = following_norms(model, example) if protocol.hook_point == "post_bn" else {}

    def observer(name: str, layer: nn.Module):
        return lambda module, inputs, output: recording.observe(name, layer, inputs, output)

    handles = [model.register_forward_pre_hook(recording.start_batch)]
    for name, layer in select_layers(model, layers).items():
        handles.append(modules[norms.get(name, name)].register_forward_hook(observer(name, layer)))
    with removing(handles):
        yield recording
    _ = recording.sums  # complete, for whoever holds them


def pooled_outputs(
    model: nn.Module,
    modules: Sequence[str],
    batches: Batches,
    limit: int = 5000,
    token: int | None = None,
    task: Task | str | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs of the named modules averaged over positions, image by image, with what says which kind an image is.

    Feature maps [B, C, H, W] are averaged over H and W, tokens [B, T, C] over T unless `token` picks one.

    Args:
        model: any network; left as found.
        modules: qualified names, of any module type that returns one tensor.
        batches: read until `limit` images are there.
        limit: most images to keep.
        token: index of the token, or None for the mean.
        task: what a batch and an output mean; None recognises it.

    Returns:
        Name to float32 [n, C] on the CPU (modules that never ran are absent), and the task's `kinds` [n].
    """
    kept: dict[str, list[Tensor]] = {}
    kinds: list[Tensor] = []
    task, batches = settle(task, model, batches)

    def keeper(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            values = position_view(module, output, token).mean(1, dtype=torch.float32)
            kept.setdefault(name, []).append(values.cpu())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keeper(name)) for name in modules]
    seen = 0
    with removing(handles), undisturbed(model):
        for batch in batches:
            for piece in task.pieces(batch):
                piece = task.to(piece, model)
                kinds.append(task.kinds(task.run(model, piece), piece).cpu())
                seen += len(kinds[-1])
            if seen >= limit:
                break
    if not seen:
        raise InputError("batches: there is no batch in it; give at least one")
    return {name: torch.cat(parts)[:limit] for name, parts in kept.items()}, torch.cat(kinds)[:limit]
