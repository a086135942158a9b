"""The classifier's inputs as the place of a reduction: everything is done on features computed once."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.lab.reduce.attention import seeded_scores
from lit_prune.lab.reduce.classifier_head import (
    Features,
    Head,
    HeadEvidence,
    compile_head,
    interchange_heads,
    read_features,
)
from lit_prune.lab.reduce.images import Batches
from lit_prune.replace import Interchange, Replacement, Swaps
from lit_prune.replace.stand_ins import affine_risks
from lit_prune.scores import score
from lit_prune.structure import Budget, Group, Plan, apply_plan, trace_groups
from lit_prune.structure.ranking import group_scores

FEATURE_SCORES: dict[str, Callable[[HeadEvidence, int], Tensor]] = {
    "variance": lambda evidence, seed: evidence.moments.variances(),
    "cmr_logit": lambda evidence, seed: evidence.moments.variances() * evidence.head.weight.square().sum(0),
    "cmr_const": lambda evidence, seed: evidence.softmax.curvature().scores(),
    "cmr_curvature": lambda evidence, seed: evidence.softmax.curvature().without_gradient().scores(),
    "cmr_affine": lambda evidence, seed: affine_risks(evidence.softmax.rows(), evidence.head.weight),
    "random": lambda evidence, seed: seeded_scores(len(evidence.head.kept), seed),
}
"""Scores that follow from the features and the head."""

COLUMN_SCORES = {**FEATURE_SCORES, "magnitude": lambda evidence, seed: evidence.head.weight.norm(dim=0)}
"""The same where the units have no weights of their own to look at: magnitude is the norm of the head's column."""


@dataclass(frozen=True)
class HeadState:
    """A head on its way down, with the calibration images for scores that need the network."""

    batches: Batches
    evidence: HeadEvidence
    report: dict[str, Any]

    @property
    def kept(self) -> tuple[int, ...]:
        """Columns of the original head that are left."""
        return self.evidence.head.kept


@dataclass(frozen=True)
class HeadSite:
    """The units that the classifier reads.

    Where a layer of the network produces them for the classifier alone (`group`), it loses them too. Else they are what
    a pooled trunk offers, which other layers share: the classifier then reads fewer of them (`KeptInputs`).

    Attributes:
        model: the original.
        reader: its classifier.
        group: the group of the units, or None.
        example: [1, C, H, W].
    """

    model: nn.Module
    reader: str
    group: Group | None
    example: Tensor
    curvature_method: str = "exact"

    @property
    def size(self) -> int:
        """Number of units."""
        return self.model.get_submodule(self.reader).in_features

    def begin(self, batches: Batches) -> HeadState:
        """One pass for the features."""
        features = read_features(self.model, self.reader, batches)
        return HeadState(batches, HeadEvidence(Head.of(self.model, self.reader), features), {})

    def rank(self, state: HeadState, name: str, seed: int) -> Tensor:
        """Scores from the features where they suffice, else by `lit_prune.score` on the original network.

        Raises:
            InputError: a score that needs a producing layer where there is none.
        """
        table = COLUMN_SCORES if self.group is None else FEATURE_SCORES
        if name in table:
            return table[name](state.evidence, seed)
        if self.group is None:
            raise InputError(
                f"score={name!r}: no single layer produces the inputs of {self.reader!r}; use {', '.join(table)}"
            )
        ranks = score(self.model, name, state.batches, seed=seed)
        graph = trace_groups(self.model, self.example)
        values = group_scores(graph, ranks, Budget(only=(self.group.name,)))[0][self.group.name]
        return torch.as_tensor(values)[list(state.kept)]

    def reduce(self, state: HeadState, kept: Sequence[int], kind: str, settings: Replacement) -> HeadState:
        """Folds stand-ins into the head."""
        head = compile_head(state.evidence, kept, kind, settings)
        return HeadState(state.batches, HeadEvidence(head, state.evidence.features), head.report)

    def test(self, batches: Batches) -> Features:
        """Features of the test images."""
        return read_features(self.model, self.reader, batches)

    def verify(self, state: HeadState, test: Features, swaps: Swaps) -> tuple[float, Interchange]:
        """Accuracy and interchange, by the heads alone."""
        found = interchange_heads(Head.of(self.model, self.reader), state.evidence.head, test, swaps)
        top = state.evidence.head.logits(test.values).argmax(1)
        return float((top == test.labels).double().mean()), found

    def network(self, state: HeadState) -> tuple[nn.Module, Plan | None]:
        """The smaller network."""
        head = state.evidence.head
        if self.group is None:
            smaller, plan = copy.deepcopy(self.model), None
            parent, _, child = self.reader.rpartition(".")
            linear = head.module().to(next(smaller.get_submodule(self.reader).parameters()))
            module = KeptInputs(head.kept, linear.requires_grad_(True)).to(linear.weight.device)
            setattr(smaller.get_submodule(parent), child, module)
            return smaller.eval(), plan
        name = self.group.name
        bare = self.model.get_submodule(self.reader).bias is None
        plan = Plan((), {name: head.kept}, {name: self.size}, added_biases=(self.reader,) if bare else ())
        smaller = apply_plan(self.model, plan, self.example)
        module = smaller.get_submodule(self.reader)
        with torch.no_grad():
            module.weight.copy_(head.weight)
            module.bias.copy_(head.bias)
        return smaller.eval(), plan


class KeptInputs(nn.Module):
    """`linear(x[..., kept])`: a smaller dense layer behind a gather.

    What is read of a residual trunk is wider than what one reader needs; the trunk's own channels stay for the blocks
    that share them.
    """

    def __init__(self, kept: Sequence[int], linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("kept", torch.tensor(list(kept)))
        self.linear = linear

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., C] to [..., O]."""
        return self.linear(inputs[..., self.kept])
