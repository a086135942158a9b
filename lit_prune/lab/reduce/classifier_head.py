"""Reduction of the units that the classifier reads, on features that are computed once.

Where the reader of a layer is the network's last affine map, scores, stand-ins, interchange and accuracy need the
features alone: nothing but the head is run again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.lab.reduce.images import TASK, Batches
from lit_prune.measurement.layers import removing
from lit_prune.measurement.moments import Moments
from lit_prune.replace import find_stand_in
from lit_prune.replace.fitting import Affine, Folding, InputEvidence
from lit_prune.replace.flow import Reader
from lit_prune.replace.interchange import Interchange
from lit_prune.replace.methods import Replacement
from lit_prune.replace.pairs import Swaps, draw_pairs
from lit_prune.replace.regression import RIDGES, PairSums, solve_held_out
from lit_prune.replace.replacement import Refit
from lit_prune.replace.risk import SoftmaxHead
from lit_prune.replace.stand_ins import fold
from lit_prune.running import undisturbed


@dataclass(frozen=True)
class Features:
    """What a classifier reads, with labels.

    Attributes:
        values: [n, C], in the precision of the network.
        labels: [n].
    """

    values: Tensor
    labels: Tensor

    def subset(self, columns: Sequence[int]) -> "Features":
        """The same samples, the named columns."""
        return replace(self, values=self.values[:, list(columns)])


@dataclass(frozen=True)
class Head:
    """The classifier of a network, or what a reduction made of it.

    Attributes:
        name: its layer.
        weight: float64 [K, kept].
        bias: float64 [K].
        kept: columns of the original classifier that it reads, ascending.
        report: of the last reduction: kind, unexplained, ridge, curvature, ...
    """

    name: str
    weight: Tensor
    bias: Tensor
    kept: tuple[int, ...]
    report: dict

    @classmethod
    def of(cls, model: nn.Module, name: str) -> "Head":
        """The classifier `name` of a network."""
        module = model.get_submodule(name)
        weight = module.weight.detach().to("cpu", torch.float64)
        bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().to(weight)
        return cls(name, weight, bias, tuple(range(weight.shape[1])), {})

    def logits(self, values: Tensor) -> Tensor:
        """Logits [n, K] of full features [n, C], in their precision."""
        return values[:, list(self.kept)] @ self.weight.T.to(values) + self.bias.to(values)

    def module(self) -> nn.Linear:
        """The map as a float64 layer on its kept columns."""
        linear = nn.Linear(len(self.kept), len(self.bias), dtype=torch.float64)
        linear.load_state_dict({"weight": self.weight, "bias": self.bias})
        return linear.requires_grad_(False)


def read_features(model: nn.Module, head: str, batches: Batches) -> Features:
    """The inputs of the classifier `head` over all batches, on the CPU; one pass, the network is left as found."""
    values: list[Tensor] = []
    labels = []
    hook = model.get_submodule(head).register_forward_pre_hook(lambda module, args: values.append(args[0].cpu()))
    with removing([hook]), undisturbed(model):
        for batch in batches:
            TASK.run(model, TASK.to(batch, model))
            labels.append(TASK.target(batch).cpu())
    return Features(torch.cat(values), torch.cat(labels))


@dataclass(frozen=True)
class HeadEvidence:
    """A head and the features it is scored on; everything else follows, once."""

    head: Head
    features: Features

    @cached_property
    def values(self) -> Tensor:
        """What the head reads now, float64 [n, kept]."""
        return self.features.values[:, list(self.head.kept)].double()

    @cached_property
    def softmax(self) -> SoftmaxHead:
        """Gradients and curvature in closed form."""
        return SoftmaxHead(self.values, self.features.labels, self.head.weight, self.head.bias)

    @cached_property
    def moments(self) -> Moments:
        """Of what the head reads."""
        moments = Moments(self.values.mean(0))
        moments.add(self.values[:, None])
        return moments

    def inputs(self, method: Folding, settings: Replacement) -> InputEvidence:
        """What `Folding.fit` needs; the risk in closed form."""
        if settings.objective == "distortion":
            return InputEvidence(self.moments)
        risk = self.softmax.rows() if isinstance(method, Affine) else self.softmax.curvature()
        return InputEvidence(self.moments, (), risk)


def compile_head(evidence: HeadEvidence, kept: Sequence[int], kind: str, settings: Replacement) -> Head:
    """The head that reads only `kept`, with stand-ins for the rest folded into it.

    Args:
        evidence: of the head as it is.
        kept: columns of the original classifier, all of them read by the head now.
        kind: as in `replace_mechanisms`.
        settings: likewise.

    Raises:
        InputError: a kind that is neither folded into its reader nor solved for.
    """
    method = find_stand_in(kind)
    method.check(settings)
    head = evidence.head
    places = [head.kept.index(column) for column in sorted(kept)]
    removed = tuple(sorted(set(range(len(head.kept))) - set(places)))
    outputs = tuple(range(len(head.bias)))
    reader = Reader(head.name, removed, tuple(places), outputs, outputs, (), "")
    weight, bias, said = head.weight[:, places], head.bias, {}
    if isinstance(method, Refit):
        weight, bias, said = _refit(evidence, places, settings)
    elif isinstance(method, Folding):
        stand_in, said = method.fit(reader, head.weight, evidence.inputs(method, settings), settings)
        folded = fold(head.module(), reader, stand_in, ())
        weight, bias = folded.weight, head.bias + folded.shift
        said = {"unexplained": stand_in.unexplained, **said}
    elif method.changes:
        raise InputError(f"kind={kind!r} is not for a classifier's inputs, which take what folds into the classifier")
    return Head(head.name, weight, bias, tuple(sorted(kept)), {"kind": kind, **said})


def _refit(evidence: HeadEvidence, places: list[int], settings: Replacement) -> tuple[Tensor, Tensor, dict]:
    values, target = evidence.values[:, places], evidence.values @ evidence.head.weight.T + evidence.head.bias
    held = int(settings.held_out * len(values) + 0.5)
    first = PairSums.zeros(values, target)
    parts = {False: first, True: first.empty()}
    parts[False].add(values[: len(values) - held], target[: len(values) - held])
    parts[True].add(values[len(values) - held :], target[len(values) - held :])
    ridges = RIDGES if settings.ridge == "held_out" else (settings.ridge,)
    fit, error = solve_held_out(parts[False], parts[True], ridges)
    return fit.weight, fit.bias, {"ridge": fit.ridge, "held_out_error": error}


def interchange_heads(low: Head, high: Head, features: Features, swaps: Swaps) -> Interchange:
    """The interchange of `lit_prune.interchange` at the classifier's input, on precomputed features.

    Args:
        low: the original classifier.
        high: the reduced one.
        features: what the original reads, of the images that pairs are drawn from.
        swaps: how many pairs, which probability, which seed.
    """
    values = features.values[: swaps.images]
    kept = list(high.kept)
    base, source, mask = draw_pairs(len(values), len(kept), swaps)
    units = values[:, kept]
    mixed = torch.where(mask, units[source], units[base])  # [R, kept]
    change = mixed - units[base]
    outer = values @ low.weight.T.to(values) + low.bias.to(values)  # the base's own logits, [n, K]
    before = outer[base] + change @ low.weight[:, [low.kept.index(column) for column in kept]].T.to(values)
    after = mixed @ high.weight.T.to(values) + high.bias.to(values)
    return Interchange(high.name, before, after)
