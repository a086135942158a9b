"""Scores from the class label and pooled values."""

from collections.abc import Callable

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.measurement import labels as information
from lit_prune.measurement.inputs import reads
from lit_prune.scores.evidence import Evidence
from lit_prune.scores.method import register_score
from lit_prune.scores.units import to_layers

Rule = Callable[[Tensor, Tensor], Tensor]  # pooled values [n, N] and kinds [n] -> scores [N]


@register_score("target", "labels", defaults=("output",), needs=("pooled",))
def label_information(evidence: Evidence, read: str) -> dict[str, Tensor]:
    """I(bin(Ȳ_i); label) in nats, 10 quantile bins; without classes the label is the task variable's bin.

    `read`: where Ȳ is read, see `conditional_information`.
    """
    return _read_at(evidence, read, information.binned_information)


@register_score("target", "labels", defaults=("output",), needs=("pooled",))
def conditional_information(evidence: Evidence, read: str) -> dict[str, Tensor]:
    """(N - position)/N, position from 0 in the greedy order of what a channel adds to those before it.

    Args:
        evidence: network and labelled data.
        read: `output`, each layer's own raw output, so that layers coupled by a residual add have an order each, which
            are averaged; `reader`, what the last layer to read the coupled channels is given: the trunk behind all
            adds, one order for the group (layers that nothing reads are left out).

    Raises:
        InputError: another word for `read`.

    Source: M2M-DC section 3.2, which does not say where.
    """
    return _read_at(evidence, read, _places)


def _places(values: Tensor, kinds: Tensor) -> Tensor:
    labels = information.as_classes(kinds)
    sums = information.ClassSums.of(values, labels, int(labels.max()) + 1)
    order, _ = information.conditional_order(sums)
    scores = torch.zeros(len(order), dtype=torch.float64)
    scores[order] = torch.arange(len(order), 0, -1, dtype=torch.float64) / len(order)
    return scores


def _read_at(evidence: Evidence, read: str, rule: Rule) -> dict[str, Tensor]:
    """The rule's scores by layer, from what is read there."""
    if read == "output":
        outputs, kinds = evidence.collected("pooled")
        return {name: rule(values, kinds) for name, values in outputs.items()}
    if read != "reader":
        raise InputError(f"score: read={read!r} is none of output, reader")
    inputs, kinds = evidence.collected("pooled_inputs")
    units = {}
    for group in evidence.read_groups:
        positions = {m.module: torch.tensor(m.positions) for m in group.members if reads(group, m)}
        last = next((name for name in reversed(inputs) if name in positions), None)
        if last is not None:
            units[group.name] = rule(inputs[last][:, positions[last]].mean(2), kinds)
    return to_layers(evidence, units)
