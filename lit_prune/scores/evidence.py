"""What a score may look at, computed once and on demand."""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement import local_axis
from lit_prune.measurement.channel_table import NO_TARGET, TARGET_COLUMNS, channel_table
from lit_prune.measurement.inputs import InputMoments, UnitMoments
from lit_prune.measurement.layers import Batches, following_norms, out_channels, select_layers
from lit_prune.measurement.passes import Collector, run_pass
from lit_prune.measurement.sums import ActivationSums
from lit_prune.replace.curvature import CurvatureSums
from lit_prune.replace.risk import RiskSamples
from lit_prune.scores.collectors import Pooled, PooledInputs, Saliency, Sums
from lit_prune.scores.independence import Independence
from lit_prune.structure.example import Example
from lit_prune.structure.groups import ChannelGraph, Group, trace_groups
from lit_prune.task import Task, peek, settle

Couplings = dict[str, list[tuple[str, Tensor]]]
Found = TypeVar("Found")


class Evidence:
    """A network, calibration batches and a channel table (either may be absent), with what follows from them.

    Attributes:
        model: the network.
        layers: its scored layers by name, in module order.
        seed: of random scores and of clusterings.
        passes: how often the batches have been run through `gather`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches | None,
        table: pd.DataFrame | None = None,
        seed: int = 0,
        task: Task | str | None = None,
    ) -> None:
        self.model = model
        self.layers = select_layers(model)
        self.seed = seed
        self._batches = list(batches) if isinstance(batches, Iterator) else batches  # it may be read more than once
        self._table, self._task = table, task
        self.passes = 0
        self._collected: dict[str, Any] = {}
        self._known: dict[tuple, Any] = {}

    def once(self, function: Callable[..., Found], *parameters: object) -> Found:
        """`function(evidence, *parameters)`, computed at the first call and remembered."""
        key = (function, *parameters)
        if key not in self._known:
            self._known[key] = function(self, *parameters)
        return self._known[key]

    def last(self, function: Callable[..., Found], *parameters: object) -> Found:
        """As `once`, and forgotten: what is large and not needed again."""
        found = self.once(function, *parameters)
        del self._known[function, *parameters]
        return found

    @property
    def batches(self) -> Batches:
        """The calibration batches. InputError: none were given."""
        if self._batches is None:
            raise InputError("batches: None, but this score looks at data; give an iterable of batches")
        return self._batches

    @cached_property
    def task(self) -> Task:
        """What a batch and an output mean: what was given, else recognised."""
        return settle(self._task, self.model, self.batches)[0]

    @cached_property
    def example(self) -> Example:
        """What the network is called with for the first sample."""
        return self.task.inputs(self.task.to(self.task.take(peek(self.batches)[0], 1), self.model))

    @cached_property
    def graph(self) -> ChannelGraph:
        """The groups of coupled channels."""
        return trace_groups(self.model, self.example)

    @cached_property
    def bare_heads(self) -> frozenset[str]:
        """Groups of heads, and of their widths, that no layer writes: the projections are tensors of the attention."""
        groups = () if self._batches is None else self.graph.groups
        return frozenset(group.name for group in groups if group.of_heads and not group.producers)

    @cached_property
    def read_groups(self) -> tuple[Group, ...]:
        """The groups that some layer reads."""
        return tuple(group for group in self.graph.groups if group.consumers)

    @property
    def readers(self) -> tuple[str, ...]:
        """The layers that read a group, in module order."""
        reading = {name for group in self.read_groups for name in group.consumers}
        return tuple(name for name, _ in self.model.named_modules() if name in reading)

    @cached_property
    def couplings(self) -> Couplings:
        """Group name -> its scored layers, each with the positions of every unit, int64 [size, positions].

        Without batches nothing can be traced: then each layer is a group of its own.
        """
        if self._batches is None:
            return {name: [(name, torch.arange(out_channels(layer))[:, None])] for name, layer in self.layers.items()}
        found: Couplings = {}
        for group in self.graph.groups:
            members = [m for m in group.members if m.axis == "out" and m.module in self.layers]
            found[group.name] = [(member.module, torch.tensor(member.positions)) for member in members]
        return {name: parts for name, parts in found.items() if parts}

    def gather(self, needs: Iterable[str]) -> None:
        """Collects what is not there yet of the needs (keys of `COLLECTORS`), all of it in one pass.

        "table" stands for the sums behind a channel table with its target axis, where no table was given. Sums with a
        task variable serve where sums are needed.
        """
        tables = [] if self._table is not None else ["task_sums"]
        needs = [found for need in needs for found in (tables if need == "table" else [need])]
        known = {*self._collected, *needs}
        needs = [need for need in needs if need != "sums" or "task_sums" not in known]
        missing = [need for need in dict.fromkeys(needs) if need not in self._collected]
        if missing:
            collectors = {need: COLLECTORS[need](self) for need in missing}
            run_pass(self.model, self.batches, list(collectors.values()), self.task)
            self.passes += 1
            self._collected |= {need: collector.result() for need, collector in collectors.items()}

    def collected(self, need: str) -> Any:
        """Result of one collector; a pass of its own if `gather` has not been told of it before."""
        self.gather([need])
        return self._collected[need]

    @property
    def sums(self) -> ActivationSums:
        """Sums of all layers' raw outputs, with the task variable where it has been asked for."""
        return self.collected("task_sums" if "task_sums" in self._collected else "sums")

    @cached_property
    def table(self) -> pd.DataFrame:
        """The channel table: the one given, else measured with the default protocol and the task's own variable."""
        return self._table if self._table is not None else channel_table(self.model, self.collected("task_sums"))

    @cached_property
    def _local_table(self) -> pd.DataFrame:
        """The channel table where nothing of the target axis is read, so that no labels are needed."""
        return self._table if self._table is not None else channel_table(self.model, self.sums)

    @cached_property
    def norms(self) -> dict[str, Tensor]:
        """|γ| of the norm that follows each layer, float64 [N], for the layers that have one."""
        modules = dict(self.model.named_modules())
        found = {layer: modules[norm].weight for layer, norm in following_norms(self.model, self.example).items()}
        return {layer: gamma.detach().double().abs().cpu() for layer, gamma in found.items() if gamma is not None}

    @property
    def needs_sums(self) -> bool:
        """Whether dead channels are told from a pass, because no table was given."""
        return self._table is None and self._batches is not None

    def column(self, name: str) -> dict[str, Tensor]:
        """A column of the channel table by layer, each float64 [N] in channel order.

        Raises:
            InputError: a table that was given has no such column.
        """
        table = self.table if name in TARGET_COLUMNS else self._local_table
        missing = [wanted for wanted in ("layer", "channel", name) if wanted not in table]
        if missing:
            raise InputError(f"table: it has no column {missing[0]!r}; give one that lit_prune.measure returned")
        frames = table.sort_values("channel", kind="stable").groupby("layer", sort=False)
        return {layer: torch.tensor(frame[name].to_numpy(), dtype=torch.float64) for layer, frame in frames}

    def dead(self) -> dict[str, Tensor]:
        """Dead channels by layer, boolean [N]; empty when there is neither a table nor data to tell from."""
        if self._table is not None:
            return {layer: values.bool() for layer, values in self.column("dead").items()}
        if not self.needs_sums:
            return {}
        powers = {layer: local_axis.signal_power(sums.outputs).cpu() for layer, sums in self.sums.layers.items()}
        return {layer: local_axis.dead_channels(power) for layer, power in powers.items()}


COLLECTORS: dict[str, Callable[[Evidence], Collector]] = {
    "sums": lambda evidence: Sums(evidence.model, evidence.task, NO_TARGET),
    "task_sums": lambda evidence: Sums(evidence.model, evidence.task),
    "pooled": lambda evidence: Pooled(evidence.model, evidence.task),
    "pooled_inputs": lambda evidence: PooledInputs(evidence.model, evidence.task, evidence.readers),
    "saliency": lambda evidence: Saliency(evidence.model, evidence.task),
    "input_variances": lambda evidence: InputMoments(evidence.model, evidence.readers, diagonal=True),
    "unit_moments": lambda evidence: UnitMoments(evidence.model, evidence.read_groups),
    "curvatures": lambda evidence: CurvatureSums(evidence.model, evidence.readers, evidence.task, evidence.seed),
    "risk_rows": lambda evidence: RiskSamples(evidence.model, evidence.readers, evidence.task, evidence.seed),
    "independence": lambda evidence: Independence(evidence.model, evidence.task),
}
"""What a pass can collect, by the name that `Score.needs` uses."""
