"""Scores from the class label and pooled outputs."""

import torch
from torch import Tensor

from lit_prune.measurement import labels as information
from lit_prune.scores.evidence import Evidence


def label_information(evidence: Evidence) -> dict[str, Tensor]:
    """I(bin(Ȳ_i); label) in nats, 10 quantile bins; without classes the label is the task variable's bin."""
    pooled, kinds = evidence.collected("pooled")
    return {name: information.binned_information(values, kinds) for name, values in pooled.items()}


def conditional_information(evidence: Evidence) -> dict[str, Tensor]:
    """(N - position)/N, position from 0 in the greedy order of what a channel adds to those before it."""
    pooled, kinds = evidence.collected("pooled")
    labels = information.as_classes(kinds)
    classes = int(labels.max()) + 1
    scores = {}
    for name, values in pooled.items():
        order, _ = information.conditional_order(information.ClassSums.of(values, labels, classes))
        channels = len(order)
        scores[name] = torch.zeros(channels, dtype=torch.float64)
        scores[name][order] = torch.arange(channels, 0, -1, dtype=torch.float64) / channels
    return scores
