"""Activations of named layers as streaming sums: `with record(model) as recording`, then one forward pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.layers import Batches, following_norms, removing, select_layers, to_model, undisturbed
from lit_prune.moments import Accumulator, ActivationSums, LayerSums
from lit_prune.protocol import DEFAULT_PROTOCOL, Protocol


class Recording:
    """What `record` yields: `sums` so far, and `add_target` to call after each forward pass."""

    def __init__(self, protocol: Protocol) -> None:
        self._sums = ActivationSums()
        self._accumulators: dict[str, Accumulator] = {}
        self._protocol = protocol
        self._pooled: dict[str, Tensor] = {}  # of the batch that is running, [B, N]
        self._workspace = torch.empty(0)  # one block of memory for all layers: no page faults after the first batch
        self._generator = torch.Generator().manual_seed(protocol.seed)
        self._batch = -1
        self._drawn: dict[int, Tensor] = {}  # of the batch that is running

    @property
    def sums(self) -> ActivationSums:
        """The sums so far; layers appear in the order in which they first ran. Read seldom: it adds what is pending."""
        for accumulator in self._accumulators.values():
            accumulator.flush()
        return self._sums

    def add_target(self, target: Tensor) -> None:
        """Adds the task variables [B, V] of the batch that has just run."""
        for name, pooled in self._pooled.items():
            self._sums.layers[name].add_target(pooled, target)
        self._sums.add_target(target)
        self._pooled = {}

    def start_batch(self, *_: object) -> None:
        """Forward pre-hook of the whole model."""
        self._pooled, self._drawn = {}, {}
        self._batch += 1

    def observe(self, name: str, module: nn.Module, output: Tensor) -> None:
        """Adds one output of the layer `name`."""
        if name in self._pooled:
            raise InputError(f"layers: {name!r} runs more than once in a forward pass; leave it out with layers=")
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False), _full_precision():
            values = position_view(module, output.detach(), self._protocol.token)
            if name not in self._accumulators:
                sums = self._sums.layers[name] = LayerSums.zeros(values.mean((0, 1), dtype=torch.float32))
                self._accumulators[name] = Accumulator(sums)
            accumulator = self._accumulators[name]
            samples, pooled = self._shifted(values, accumulator.sums.shift)
            if not torch.isfinite(pooled).all():
                raise InputError(f"batches: batch {self._batch} makes NaN or infinite values in layer {name!r}")
            accumulator.add(samples.flatten(0, 1), pooled)
            self._pooled[name] = pooled

    def _shifted(self, values: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Shifted samples [B, P or k, N] and shifted means over positions [B, N]."""
        precision = torch.promote_types(values.dtype, torch.float32)
        shift = shift.to(precision)
        wanted = self._protocol.positions
        if wanted == "all" or wanted >= values.shape[1]:
            samples = torch.sub(values, shift, out=self._buffer(values, precision))
            return samples, samples.mean(1)
        index = self._places(*values.shape[:2]).to(values.device)[..., None].expand(-1, -1, values.shape[2])
        samples = values.gather(1, index) - shift
        if self._protocol.target_pooling == "match":
            return samples, samples.mean(1)
        return samples, torch.sub(values, shift, out=self._buffer(values, precision)).mean(1)

    def _places(self, images: int, positions: int) -> Tensor:
        """Random positions of each image, [B, k]; one draw serves all layers of one map size, for sorting is dear."""
        if positions not in self._drawn:
            order = torch.rand(images, positions, generator=self._generator).argsort(1)
            self._drawn[positions] = order[:, : self._protocol.positions]
        return self._drawn[positions]

    def _buffer(self, values: Tensor, precision: torch.dtype) -> Tensor:
        """A reused block of memory shaped like `values` [B, P, N], in the memory order that makes the pass fast."""
        block = self._workspace
        if (block.device, block.dtype) != (values.device, precision) or block.numel() < values.numel():
            block = self._workspace = torch.empty(values.numel(), dtype=precision, device=values.device)
        flat = block[: values.numel()]
        images, positions, channels = values.shape
        if values.stride(2) == 1:  # channels last, tokens
            return flat.view(images, positions, channels)
        return flat.view(channels, images, positions).permute(1, 2, 0)


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


@contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 products in float32 inside, although the trainer may have allowed TF32 or bfloat16 ones."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    name, exact = ("fp32_precision", "ieee") if hasattr(backends[1], "fp32_precision") else ("allow_tf32", False)
    before = {backend: getattr(backend, name) for backend in backends if hasattr(backend, name)}
    try:
        for backend in before:
            setattr(backend, name, exact)
        yield
    finally:
        for backend, value in before.items():
            setattr(backend, name, value)


@contextmanager
def record(
    model: nn.Module,
    layers: Sequence[str] | str | None = None,
    protocol: Protocol = DEFAULT_PROTOCOL,
    example: Tensor | None = None,
) -> Iterator[Recording]:
    """Hooks at the named layers; each forward pass of `model` inside adds to `recording.sums`. Hooks vanish on exit.

    Args:
        model: any network.
        layers: names or fnmatch patterns; None takes every Conv2d and Linear with more than one output channel.
        protocol: hook point, positions per image, pooling, token.
        example: images [B, C, H, W]; needed for hook point `post_bn` alone, to find the norms.

    Raises:
        InputError: a pattern without a match; while running: NaN or infinite activations (layer and batch are named),
            a layer that runs twice in a forward pass.
    """
    recording = Recording(protocol)
    modules = dict(model.named_modules())
    norms = following_norms(model, example) if protocol.hook_point == "post_bn" else {}

    def observer(name: str, layer: nn.Module):
        return lambda module, inputs, output: recording.observe(name, layer, output)

    handles = [model.register_forward_pre_hook(recording.start_batch)]
    for name, layer in select_layers(model, layers).items():
        handles.append(modules[norms.get(name, name)].register_forward_hook(observer(name, layer)))
    with removing(handles):
        yield recording
    _ = recording.sums  # complete, for whoever holds them


def pooled_outputs(
    model: nn.Module, modules: Sequence[str], batches: Batches, limit: int = 5000, token: int | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs of the named modules averaged over positions, image by image, with the labels.

    Feature maps [B, C, H, W] are averaged over H and W, tokens [B, T, C] over T unless `token` picks one.

    Args:
        model: any network; left as found.
        modules: qualified names, of any module type that returns one tensor.
        batches: (images, labels) pairs; read until `limit` images are there.
        limit: most images to keep.
        token: index of the token, or None for the mean.

    Returns:
        Name to float32 [n, C] on the CPU (modules that never ran are absent), and int64 labels [n].
    """
    kept: dict[str, list[Tensor]] = {}
    labels_seen: list[Tensor] = []

    def keeper(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            values = position_view(module, output, token).mean(1, dtype=torch.float32)
            kept.setdefault(name, []).append(values.cpu())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keeper(name)) for name in modules]
    seen = 0
    with removing(handles), undisturbed(model):
        for images, labels in batches:
            model(to_model(model, images))
            labels_seen.append(labels.cpu())
            seen += len(labels)
            if seen >= limit:
                break
    if not seen:
        raise InputError("batches: no batch of (images, labels) in it; give at least one")
    return {name: torch.cat(parts)[:limit] for name, parts in kept.items()}, torch.cat(labels_seen)[:limit]
