"""The heads of an attention as the place of a reduction."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.lab.reduce.images import TASK, Batches
from lit_prune.replace import Interchange, Replacement, Swaps
from lit_prune.replace.heads import HEAD_SCORES, attention_with_heads, head_columns, measure_heads, remove_heads
from lit_prune.replace.interchange import swap_units
from lit_prune.replace.pairs import gather_images
from lit_prune.train.evaluation import evaluate


@dataclass(frozen=True)
class NetworkState:
    """A network with the units `kept` of the original, the calibration images, and what the last step reported."""

    batches: Batches
    model: nn.Module
    kept: tuple[int, ...]
    report: dict[str, Any]
    added_biases: tuple[str, ...] = ()


def seeded_scores(units: int, seed: int) -> Tensor:
    """Uniform on [0, 1), [units]."""
    return torch.rand(units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class AttentionSite:
    """The heads of one attention module."""

    model: nn.Module
    name: str
    curvature_method: str = "gauss_newton"

    @cached_property
    def size(self) -> int:
        """Number of heads."""
        return attention_with_heads(self.model, self.name).num_heads

    def begin(self, batches: Batches) -> NetworkState:
        """The original network."""
        return NetworkState(batches, self.model, tuple(range(self.size)), {})

    def rank(self, state: NetworkState, name: str, seed: int) -> Tensor:
        """Scores of `HEAD_SCORES`. InputError: another name."""
        if name not in HEAD_SCORES:
            raise InputError(f"score={name!r} is not for attention heads; use one of {', '.join(HEAD_SCORES)}")
        if name == "random":
            return seeded_scores(len(state.kept), seed)
        moments = measure_heads(state.model, self.name, state.batches, seed)
        if name == "cmr_const":
            return moments.risk(moments.foldable_constants())
        if name == "cmr_logit":
            return moments.distortion(attention_with_heads(state.model, self.name).proj.weight)
        return moments.removal_scores() if name == "head_removal" else moments.variance()

    def reduce(self, state: NetworkState, kept: Sequence[int], kind: str, settings: Replacement) -> NetworkState:
        """Removes heads; "constant" puts foldable constants in their place. InputError: another kind or objective."""
        if kind not in ("delete", "constant") or settings.objective not in ("distortion", "loss"):
            raise InputError(f"kind={kind!r}, objective={settings.objective!r}: heads can be deleted or made constant")
        removed = [place for place, unit in enumerate(state.kept) if unit not in set(kept)]
        constants = None
        if kind == "constant":
            constants = measure_heads(state.model, self.name, state.batches, settings.seed).foldable_constants(
                settings.objective
            )
        smaller = remove_heads(state.model, self.name, removed, constants)
        return NetworkState(state.batches, smaller, tuple(sorted(kept)), {"kind": kind})

    def test(self, batches: Batches) -> Batches:
        """The images themselves."""
        return batches

    def verify(self, state: NetworkState, test: Batches, swaps: Swaps) -> tuple[float, Interchange]:
        """Runs both networks; a unit is a head's output at all positions."""
        wide = attention_with_heads(self.model, self.name).head_dim
        columns = [
            [head_columns([head], wide).tolist() for head in heads] for heads in (state.kept, range(len(state.kept)))
        ]
        images = gather_images(test, swaps.images, TASK)
        found = swap_units((self.model, state.model), f"{self.name}.proj", columns, images, swaps)
        return evaluate(state.model, test).figure, found

    def network(self, state: NetworkState) -> tuple[nn.Module, None]:
        """The network of the state; heads are outside of what a plan can say."""
        return state.model, None
