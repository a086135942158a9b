"""What a pass can collect for scores: sums of all layers, saliencies, pooled outputs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement import target_axis
from lit_prune.measurement.activations import Recording, record
from lit_prune.measurement.layers import out_channels, position_view, removing, select_layers
from lit_prune.measurement.moments import ActivationSums
from lit_prune.measurement.protocol import DEFAULT_PROTOCOL

POOLED_IMAGES = 5000


class Sums:
    """Sums of all layers' raw outputs, with the true margin as task variable (see `collect_sums`)."""

    gradients = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.recording = Recording(DEFAULT_PROTOCOL)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See `Collector`."""
        with record(self.model) as self.recording:
            yield

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """See `Collector`."""
        self.recording.add_target(target_axis.task_variable("true_margin", logits.detach(), labels))

    def result(self) -> ActivationSums:
        """The sums."""
        return self.recording.sums


class Saliency:
    """Σ over images of |Σ_p a·∂L/∂a| at every layer's raw output, L the image's cross-entropy.

    The sum runs over all positions (all tokens of a token layer).
    """

    gradients = True

    def __init__(self, model: nn.Module) -> None:
        self.layers = select_layers(model)
        self.outputs: list[tuple[str, Tensor]] = []
        self.totals = {name: torch.zeros(out_channels(m), dtype=torch.float64) for name, m in self.layers.items()}
        self.count = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See `Collector`."""

        def keeper(name: str):
            def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
                self.outputs.append((name, output))
                return output.clone()  # what follows may overwrite its input in place

            return hook

        with removing([module.register_forward_hook(keeper(name)) for name, module in self.layers.items()]):
            yield

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """See `Collector`.

        Raises:
            InputError: a loss that is not finite.
        """
        loss = nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum")
        if not torch.isfinite(loss):
            raise InputError("batches: the loss is NaN or infinite; mend the network or the data")
        kept = [output for _, output in self.outputs]
        gradients = torch.autograd.grad(loss, kept, allow_unused=True, retain_graph=True)
        for (name, output), gradient in zip(self.outputs, gradients, strict=True):
            if gradient is not None:
                product = position_view(self.layers[name], output.detach() * gradient, token=None)
                self.totals[name] += product.float().sum(1).abs().sum(0).double().cpu()
        self.outputs.clear()
        self.count += len(logits)

    def result(self) -> dict[str, Tensor]:
        """The mean over images, float64 [N] a layer."""
        return {name: total / self.count for name, total in self.totals.items()}


class Pooled:
    """Raw outputs of all layers averaged over positions (the first token of a token layer), and labels."""

    gradients = False

    def __init__(self, model: nn.Module) -> None:
        self.layers = select_layers(model)
        self.kept: dict[str, list[Tensor]] = {}
        self.labels: list[Tensor] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See `Collector`."""

        def keeper(name: str):
            def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
                if sum(map(len, self.labels)) < POOLED_IMAGES:
                    values = position_view(module, output.detach(), DEFAULT_PROTOCOL.token)
                    self.kept.setdefault(name, []).append(values.mean(1, dtype=torch.float32).cpu())

            return hook

        with removing([module.register_forward_hook(keeper(name)) for name, module in self.layers.items()]):
            yield

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """See `Collector`."""
        if sum(map(len, self.labels)) < POOLED_IMAGES:
            self.labels.append(labels.cpu())

    def result(self) -> tuple[dict[str, Tensor], Tensor]:
        """Layer -> float32 [n, N], and int64 labels [n]; n ≤ 5000."""
        values = {name: torch.cat(parts)[:POOLED_IMAGES] for name, parts in self.kept.items()}
        return values, torch.cat(self.labels)[:POOLED_IMAGES]
