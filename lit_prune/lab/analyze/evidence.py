"""What one forward pass over the calibration images leaves behind for all extras."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.lab.analyze.request import AnalyzeRequest
from lit_prune.measurement import local_axis
from lit_prune.measurement.activations import Recording, record
from lit_prune.measurement.channel_table import channel_table, target_correlations, target_deviation
from lit_prune.measurement.layers import Batches, following_norms, position_view, removing, select_layers
from lit_prune.measurement.sums import ActivationSums, LayerSums
from lit_prune.running import undisturbed
from lit_prune.structure.example import Example
from lit_prune.task import Task, peek, settle

SAMPLED = ("broja", "ksg")


@dataclass
class Pass:
    """Sums and values of one pass.

    Attributes:
        sums: of all layers, with the task variables of every target side by side.
        columns: target to its columns in the sums.
        logits: the predictions, [n, K] for classes, on the CPU.
        labels: the targets, int64 [n] for classes.
        target: the requested task variable, float64 [n, V].
        pooled: layer to its outputs averaged over positions [m, N], of the first `samples` images, where wanted.
        prefixes: number of images to the sums of so many first images.
    """

    sums: ActivationSums
    columns: dict[str, slice] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.zeros(0))
    labels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    target: Tensor = field(default_factory=lambda: torch.zeros(0, 1, dtype=torch.float64))
    pooled: dict[str, Tensor] = field(default_factory=dict)
    prefixes: dict[int, ActivationSums] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerFacts:
    """Correlations of one layer; rows and columns of dead channels are NaN.

    Attributes:
        correlations: ρ over images and positions, [N, N].
        between: correlations of the pooled outputs, [N, N].
        task: correlations of the pooled outputs with T, [N].
        dead: boolean [N].
    """

    correlations: Tensor
    between: Tensor
    task: Tensor
    dead: Tensor


def cut_batches(batches: Batches, task: Task, limit: int | None = None, cuts: Sequence[int] = ()) -> Iterator[Any]:
    """The first `limit` images in the same order, in batches that also end at each of `cuts`."""
    seen = 0
    ends = sorted({*cuts, *([limit] if limit else [])})
    for batch in batches:
        start, count = 0, task.size(batch)
        while start < count:
            stops = [end - seen for end in ends if end > seen]
            size = min([count - start, *stops[:1]])
            yield task.take(batch, slice(start, start + size))
            start, seen = start + size, seen + size
            if seen == limit:
                return


def target_columns(sums: ActivationSums, columns: slice) -> ActivationSums:
    """The same sums with some of the task variables."""
    layers = {
        name: replace(part, cross=part.cross[:, columns], target_first=part.target_first[columns])
        for name, part in sums.layers.items()
    }
    first, second = sums.target_first[columns], sums.target_second[columns]
    return ActivationSums(layers, sums.images, first, second, sums.left_out)


class Analysis:
    """A network, its calibration images and what was asked; evidence and tables are made on first use.

    Args:
        model: any network; left as found.
        batches: what the task reads; a list or a DataLoader, because several extras read them again.
        request: what to compute.
        lesions: table with layer, channel and `damage`, for the extra `damage`.
        watch: wraps each iteration over the batches, given a description; a progress bar hooks in here.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        request: AnalyzeRequest,
        lesions: pd.DataFrame | None = None,
        watch: Callable[[Iterable, str], Iterable] = lambda batches, _: batches,
    ) -> None:
        if iter(batches) is batches:
            raise InputError("batches: an iterator can be read only once; give a list or a DataLoader")
        self.model, self.request, self.lesions = model, request, lesions
        self._batches, self._watch = batches, watch

    def batches(self, description: str, cuts: Sequence[int] = (), limit: int | None = None) -> Batches:
        """The calibration images once more, the first `limit` (default: the request's) of them."""
        limit = limit or self.request.limit
        return cut_batches(self._watch(self._batches, description), self.task, limit, cuts)

    @cached_property
    def task(self) -> Task:
        """What a batch and an output mean."""
        return settle(None, self.model, self._batches)[0]

    @property
    def example(self) -> Example:
        """What the network is called with for one calibration image, on its device."""
        return self.task.inputs(self.task.to(self.task.take(peek(self._batches)[0], 1), self.model))

    @cached_property
    def evidence(self) -> Pass:
        """What the pass over the images leaves behind."""
        request, task = self.request, self.task  # recognised before anything watches the network
        sizes = request.sizes if "calibration_sizes" in request.extras else ()
        keep = request.samples if set(SAMPLED) & set(request.extras) else 0
        names = task.variables if "targets" in request.extras else (request.target,)
        evidence = Pass(ActivationSums())
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        with undisturbed(self.model), self.recording() as recording, self._pooling(keep) as evidence.pooled:
            evidence.sums = recording.sums
            for batch in self.batches("forward pass", sizes):
                batch = task.to(batch, self.model)
                output = task.run(self.model, batch)
                variables = {name: task.variable(output, batch, name) for name in names}
                recording.add_target(torch.cat(list(variables.values()), 1))
                values = task.prediction(output), task.target(batch), variables[request.target]
                kept.append(tuple(value.cpu() for value in values))
                if evidence.sums.images in sizes:
                    evidence.prefixes[evidence.sums.images] = recording.sums.copy()
        if not kept:
            raise InputError("batches: there is no batch in it; give at least one")
        evidence.logits, evidence.labels, evidence.target = (torch.cat(parts) for parts in zip(*kept, strict=True))
        evidence.columns = _places({name: value.shape[1] for name, value in variables.items()})
        evidence.pooled = {name: torch.cat(parts)[:keep] for name, parts in evidence.pooled.items()}
        return evidence

    def recording(self) -> AbstractContextManager[Recording]:
        """Records the layers asked for while it lasts, as the protocol says."""
        example = self.example if self.request.protocol.hook_point == "post_bn" else None
        return record(self.model, self.request.layers, self.request.protocol, example)

    @contextmanager
    def _pooling(self, limit: int) -> Iterator[dict[str, list[Tensor]]]:
        """Hooks that keep the pooled outputs of the first `limit` images."""
        kept: dict[str, list[Tensor]] = {}

        def keep(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
            parts = kept.setdefault(name, [])
            if sum(map(len, parts)) < limit:
                values = position_view(module, output.detach(), self.request.protocol.token)
                parts.append(values.mean(1, dtype=torch.float32).cpu())

        norms = {}
        if limit and self.request.protocol.hook_point == "post_bn":
            norms = following_norms(self.model, self.example)
        chosen = select_layers(self.model, self.request.layers) if limit else {}
        modules = {name: self.model.get_submodule(norms.get(name, name)) for name in chosen}
        with removing([module.register_forward_hook(partial(keep, name)) for name, module in modules.items()]):
            yield kept

    @cached_property
    def sums(self) -> ActivationSums:
        """Sums with the requested target alone."""
        evidence = self.evidence
        return target_columns(evidence.sums, evidence.columns[self.request.target])

    @cached_property
    def channels(self) -> pd.DataFrame:
        """The channel table without extras."""
        return channel_table(self.model, self.sums, self.request.protocol)

    @cached_property
    def target(self) -> Tensor:
        """T of every image, float64 [n]."""
        return self.evidence.target[:, 0]

    @property
    def layers(self) -> list[str]:
        """Measured layers in forward order."""
        return list(self.sums.layers)

    def facts(self, layer: str) -> LayerFacts:
        """Correlations of one layer."""
        return layer_facts(self.sums.layers[layer].to("cpu"), target_deviation(self.sums), self.request)

    def rows(self, layer: str) -> pd.DataFrame:
        """One layer's rows of the channel table."""
        return self.channels[self.channels["layer"] == layer]


def layer_facts(sums: LayerSums, deviation: Tensor, request: AnalyzeRequest) -> LayerFacts:
    """Correlations of one layer from its sums on the CPU."""
    dead = local_axis.dead_channels(local_axis.signal_power(sums.outputs))
    correlations = local_axis.correlation_matrix(sums.outputs.covariance())
    task, between = target_correlations(sums, deviation, request.protocol)
    dead = dead | ~between.diagonal().isfinite()
    either = dead[:, None] | dead
    return LayerFacts(
        correlations=correlations.masked_fill(either, torch.nan),
        between=between.masked_fill(either, torch.nan),
        task=task[:, 0].masked_fill(dead, torch.nan),
        dead=dead,
    )


def _places(widths: dict[str, int]) -> dict[str, slice]:
    """Where blocks of these widths lie side by side."""
    places, start = {}, 0
    for name, width in widths.items():
        places[name] = slice(start, start + width)
        start += width
    return places
