"""Collector of what the affine score of causal mechanism reduction reads: second-order risk, sample by sample."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_prune.layers import removing
from lit_prune.mechanisms.curvature import Labels, label_parts
from lit_prune.mechanisms.patches import PositionSample, output_rows
from lit_prune.mechanisms.risk import RiskRows

MOST_ROWS = 4096
PER_IMAGE = 8


class RiskSamples:
    """Values, gradients and Gauss-Newton curvature of the loss at the input of every layer that reads a group.

    Up to ten classes every label counts with its softmax probability, above one is drawn for an image. Images beyond
    the first `MOST_ROWS` samples of a layer are not differentiated.
    """

    gradients = True

    def __init__(self, model: nn.Module, readers: Sequence[str], seed: int) -> None:
        self.modules = {name: model.get_submodule(name) for name in readers}
        self.inputs: dict[str, Tensor] = {}
        self.parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.images: dict[str, float] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self.sample = PositionSample(PER_IMAGE, seed)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See `passes.Collector`."""

        def keeper(name: str):
            return lambda module, args: self.inputs.__setitem__(name, args[0])

        with removing([module.register_forward_pre_hook(keeper(name)) for name, module in self.modules.items()]):
            yield
        self.inputs.clear()

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """See `passes.Collector`."""
        wanted = {n: v for n, v in self.inputs.items() if sum(len(p[0]) for p in self.parts.get(n, [])) < MOST_ROWS}
        if not wanted:
            return
        chosen = {name: self._draw(name, inputs) for name, inputs in wanted.items()}
        values = {
            name: output_rows(self.modules[name], v.detach(), chosen[name]).double() for name, v in wanted.items()
        }
        gradient = {name: torch.zeros_like(rows) for name, rows in values.items()}
        curvature = {name: torch.zeros_like(rows) for name, rows in values.items()}
        for part in label_parts(logits, labels, self.generator):
            for name, rows in self._gradients(logits, part, wanted, chosen).items():
                if part.true:
                    gradient[name] = rows
                else:
                    weights = part.weights.double().repeat_interleave(len(rows) // len(logits))
                    curvature[name] += weights[:, None] * rows.square()
        for name in wanted:
            rows = tuple(table[name].cpu() for table in (values, gradient, curvature))
            self.parts.setdefault(name, []).append(rows)

    def _draw(self, name: str, inputs: Tensor) -> Tensor | None:
        """Sampled positions; counts the images, less by the share of positions left out."""
        width = inputs.shape[-1 if isinstance(self.modules[name], nn.Linear) else 1]
        positions = inputs.numel() // len(inputs) // width
        chosen = self.sample.draw(len(inputs), positions)
        share = 1.0 if chosen is None else chosen.shape[1] / positions
        self.images[name] = self.images.get(name, 0.0) + share * len(inputs)
        return chosen

    def _gradients(self, logits: Tensor, part: Labels, wanted: Mapping[str, Tensor], chosen: Mapping) -> dict:
        loss = F.cross_entropy(logits, part.values, reduction="sum")
        found = torch.autograd.grad(loss, list(wanted.values()), retain_graph=True, allow_unused=True)
        pairs = ((n, torch.zeros_like(v) if g is None else g) for (n, v), g in zip(wanted.items(), found, strict=True))
        return {name: output_rows(self.modules[name], g, chosen[name]).double() for name, g in pairs}

    def result(self) -> dict[str, RiskRows]:
        """Layer -> samples."""
        columns = {
            name: [torch.cat(column) for column in zip(*parts, strict=True)] for name, parts in self.parts.items()
        }
        return {name: RiskRows(*rows, self.images[name], "gauss_newton") for name, rows in columns.items()}
