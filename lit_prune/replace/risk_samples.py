"""Collector of what affine stand-ins are fitted to and scored by: second-order risk, sample by sample."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.measurement.passes import InputGradients
from lit_prune.replace.curvature import loss_parts
from lit_prune.replace.patches import PositionSample, output_rows
from lit_prune.replace.risk import RiskRows
from lit_prune.task import Task


class RiskSamples(InputGradients):
    """Values, gradients and Gauss-Newton curvature of the loss at the input of every layer that is named.

    The curvature is that of `Task.curvature_terms`. Positions count as independent (the diagonal approximation); where
    there are many, a seeded sample of each image is taken, and
    `RiskRows.images` is scaled so that sums over rows estimate sums over all positions.

    Args:
        model: any network.
        layers: names of convolutions and linear layers.
        task: what the loss is.
        seed: of what is drawn.
        per_image: most positions of an image.
        most_rows: images beyond these many samples of a layer are not differentiated.
    """

    losses = True

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        task: Task,
        seed: int = 0,
        per_image: int = 8,
        most_rows: int = 4096,
    ) -> None:
        super().__init__(model, layers, seed)
        self.task = task
        self.most_rows = most_rows
        self.modules = {name: model.get_submodule(name) for name in layers}
        self.parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.images: dict[str, float] = {}
        self.sample = PositionSample(per_image, seed)

    def add(self, output: Any, batch: Any) -> None:
        """See `passes.Collector`."""
        taken = {name: sum(len(part[0]) for part in parts) for name, parts in self.parts.items()}
        size = self.task.size(batch)
        wanted = [name for name in self.inputs if taken.get(name, 0) < self.most_rows]
        if not wanted:
            self.inputs.clear()
            return
        chosen = {name: [self._draw(name, v, size, not k) for k, v in enumerate(self.inputs[name])] for name in wanted}
        values = {name: self._rows(name, self.inputs[name], chosen[name]) for name in wanted}
        gradient = {name: torch.zeros_like(rows) for name, rows in values.items()}
        curvature = {name: torch.zeros_like(rows) for name, rows in values.items()}
        for part in loss_parts(self.task, output, batch, self.generator):
            gradients = self.gradients_of(part.values)
            for name in wanted:
                rows = self._rows(name, gradients[name], chosen[name])
                if part.is_loss:
                    gradient[name] = rows
                else:
                    curvature[name] += self._weights(name, part.weights, chosen[name])[:, None] * rows.square()
        for name in wanted:
            part_of = (values[name].cpu(), gradient[name].cpu(), curvature[name].cpu())
            self.parts.setdefault(name, []).append(part_of)
        self.inputs.clear()

    def _draw(self, name: str, inputs: Tensor, size: int, first: bool) -> Tensor | None:
        """Sampled positions; counts the images at the first call, less by the share of positions left out."""
        width = inputs.shape[-1 if isinstance(self.modules[name], nn.Linear) else 1]
        positions = inputs.numel() // len(inputs) // width
        chosen = self.sample.draw(len(inputs), positions)
        share = 1.0 if chosen is None else chosen.shape[1] / positions
        self.images[name] = self.images.get(name, 0.0) + (share * size if first else 0.0)
        return chosen

    def _rows(self, name: str, calls: Sequence[Tensor], chosen: Sequence[Tensor | None]) -> Tensor:
        """Values at the sampled positions of all calls, float64 [rows, C]."""
        pairs = zip(calls, chosen, strict=True)
        return torch.cat([output_rows(self.modules[name], v.detach(), places).double() for v, places in pairs])

    def _weights(self, name: str, weights: Tensor, chosen: Sequence[Tensor | None]) -> Tensor:
        """The samples' weights at the rows of `_rows`."""
        lengths = (len(self._rows(name, [v], [p])) for v, p in zip(self.inputs[name], chosen, strict=True))
        return torch.cat([weights.double().repeat_interleave(length // len(weights)) for length in lengths])

    def result(self) -> dict[str, RiskRows]:
        """Layer -> samples."""
        found = {}
        for name, parts in self.parts.items():
            values, gradient, curvature = (torch.cat(column) for column in zip(*parts, strict=True))
            found[name] = RiskRows(values, gradient, curvature, self.images[name], "gauss_newton")
        return found
