"""What a score may look at, computed once and on demand."""

from collections.abc import Callable, Iterator
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor, nn

from lit_prune.activations import pooled_outputs
from lit_prune.errors import InputError
from lit_prune.information import local_axis
from lit_prune.layers import Batches, following_norms, peek, select_layers
from lit_prune.measure import channel_table, collect_sums
from lit_prune.moments import ActivationSums
from lit_prune.protocol import Protocol
from lit_prune.structure.groups import ChannelGraph, trace_groups

Couplings = dict[str, list[tuple[str, Tensor]]]


class Evidence:
    """A network, calibration batches and a channel table (either may be absent), with what follows from them.

    Attributes:
        model: the network.
        layers: its scored layers by name, in module order.
        seed: of random scores and of clusterings.
    """

    def __init__(
        self, model: nn.Module, batches: Batches | None, table: pd.DataFrame | None = None, seed: int = 0
    ) -> None:
        self.model = model
        self.layers = select_layers(model)
        self.seed = seed
        self._batches = list(batches) if isinstance(batches, Iterator) else batches  # it may be read more than once
        self._table = table
        self._known: dict[tuple, dict[str, Tensor]] = {}

    def once(self, function: Callable[..., dict[str, Tensor]], *parameters: object) -> dict[str, Tensor]:
        """`function(evidence, *parameters)`, computed at the first call and remembered."""
        key = (function, *parameters)
        if key not in self._known:
            self._known[key] = function(self, *parameters)
        return self._known[key]

    @property
    def batches(self) -> Batches:
        """The calibration batches.

        Raises:
            InputError: none were given.
        """
        if self._batches is None:
            raise InputError("batches: None, but this score looks at data; give an iterable of (images, labels)")
        return self._batches

    @cached_property
    def example(self) -> Tensor:
        """The first batch of images."""
        return peek(self.batches)[0]

    @cached_property
    def graph(self) -> ChannelGraph:
        """The groups of coupled channels."""
        return trace_groups(self.model, self.example)

    @cached_property
    def couplings(self) -> Couplings:
        """Group name -> its scored layers, each with the positions of every unit, int64 [size, positions].

        Without batches nothing can be traced: then each layer is a group of its own.
        """
        if self._batches is None:
            return {name: [(name, torch.arange(len(layer.weight))[:, None])] for name, layer in self.layers.items()}
        found: Couplings = {}
        for group in self.graph.groups:
            members = [m for m in group.members if m.axis == "out" and m.module in self.layers]
            found[group.name] = [(member.module, torch.tensor(member.positions)) for member in members]
        return {name: parts for name, parts in found.items() if parts}

    @cached_property
    def sums(self) -> ActivationSums:
        """Sums of all layers' raw outputs, with the true margin as task variable if the channel table is not given."""
        return collect_sums(self.model, self.batches, target=None if self._table is not None else "true_margin")

    @cached_property
    def table(self) -> pd.DataFrame:
        """The channel table: the one given, else measured with the default protocol."""
        return self._table if self._table is not None else channel_table(self.model, self.sums)

    @cached_property
    def norms(self) -> dict[str, Tensor]:
        """|γ| of the norm that follows each layer, float64 [N], for the layers that have one."""
        modules = dict(self.model.named_modules())
        found = {layer: modules[norm].weight for layer, norm in following_norms(self.model, self.example).items()}
        return {layer: gamma.detach().double().abs().cpu() for layer, gamma in found.items() if gamma is not None}

    @cached_property
    def pooled(self) -> tuple[dict[str, Tensor], Tensor]:
        """Pooled raw outputs [n, N] of each layer (the first token of a token layer), and labels [n]; n ≤ 5000."""
        return pooled_outputs(self.model, tuple(self.layers), self.batches, token=Protocol().token)

    def column(self, name: str) -> dict[str, Tensor]:
        """A column of the channel table by layer, each float64 [N] in channel order."""
        frames = self.table.sort_values("channel", kind="stable").groupby("layer", sort=False)
        return {layer: torch.tensor(frame[name].to_numpy(), dtype=torch.float64) for layer, frame in frames}

    def dead(self) -> dict[str, Tensor]:
        """Dead channels by layer, boolean [N]; empty when there is neither a table nor data to tell from."""
        if self._table is not None:
            return {layer: values.bool() for layer, values in self.column("dead").items()}
        if self._batches is None:
            return {}
        powers = {layer: local_axis.signal_power(sums).cpu() for layer, sums in self.sums.layers.items()}
        return {layer: local_axis.dead_channels(power) for layer, power in powers.items()}
