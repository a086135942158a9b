"""Collector of what affine stand-ins are fitted to and scored by: second-order risk, sample by sample."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.measurement.passes import InputGradients
from lit_prune.replace.curvature import Part, loss_parts
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
        wanted = {name: v for name, v in self.inputs.items() if taken.get(name, 0) < self.most_rows}
        if not wanted:
            return
        chosen = {name: self._draw(name, inputs) for name, inputs in wanted.items()}
        values = {
            name: output_rows(self.modules[name], v.detach(), chosen[name]).double() for name, v in wanted.items()
        }
        gradient = {name: torch.zeros_like(rows) for name, rows in values.items()}
        curvature = {name: torch.zeros_like(rows) for name, rows in values.items()}
        for part in loss_parts(self.task, output, batch, self.generator):
            for name, rows in self._gradients(part, wanted, chosen).items():
                if part.is_loss:
                    gradient[name] = rows
                else:
                    weights = part.weights.double().repeat_interleave(len(rows) // len(part.weights))
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

    def _gradients(self, part: Part, wanted: Mapping[str, Tensor], chosen: Mapping) -> dict:
        found = torch.autograd.grad(part.values.sum(), list(wanted.values()), retain_graph=True, allow_unused=True)
        pairs = ((n, torch.zeros_like(v) if g is None else g) for (n, v), g in zip(wanted.items(), found, strict=True))
        return {name: output_rows(self.modules[name], g, chosen[name]).double() for name, g in pairs}

    def result(self) -> dict[str, RiskRows]:
        """Layer -> samples."""
        columns = {
            name: [torch.cat(column) for column in zip(*parts, strict=True)] for name, parts in self.parts.items()
        }
        return {name: RiskRows(*rows, self.images[name], "gauss_newton") for name, rows in columns.items()}
