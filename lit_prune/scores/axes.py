"""Scores made of columns of the channel table. n(x) is x scaled to [0, 1] within its layer.

The two-axis paper leaves these recipes partly open; the formulas are this project's reading of its appendix C.
"""

import torch
from torch import Tensor

from lit_prune.scores.evidence import Evidence
from lit_prune.scores.method import register_score


def scaled(values: Tensor) -> Tensor:
    """n(x) = (x - min)/(max - min) over the defined entries; 0 where x is NaN or constant in the layer."""
    defined = values[values.isfinite()]
    if not len(defined) or defined.max() == defined.min():
        return torch.zeros_like(values)
    return ((values - defined.min()) / (defined.max() - defined.min())).nan_to_num(0.0)


def weighted_sum(evidence: Evidence, **weights: float) -> dict[str, Tensor]:
    """Σ weight·n(column) within each layer, over live channels; column names as in the channel table."""
    live = {layer: ~dead.bool() for layer, dead in evidence.column("dead").items()}
    total = {layer: torch.zeros(len(mask), dtype=torch.float64) for layer, mask in live.items()}
    for column, weight in weights.items():
        for layer, values in evidence.column(column).items():
            total[layer][live[layer]] += weight * scaled(values[live[layer]])
    return total


@register_score("local")
def composite_ix(evidence: Evidence) -> dict[str, Tensor]:
    """2.0·n(I_X) - 0.25·n(R̄_X)."""
    return weighted_sum(evidence, input_capture=2.0, peer_overlap=-0.25)


@register_score("local", defaults=(0.5,))
def ix_minus_redundancy(evidence: Evidence, beta: float) -> dict[str, Tensor]:
    """n(I_X) - β·n(R̄_X)."""
    return weighted_sum(evidence, input_capture=1.0, peer_overlap=-beta)


@register_score("local", defaults=(1.0,))
def magnitude_plus_ix(evidence: Evidence, alpha: float) -> dict[str, Tensor]:
    """n(‖w‖) + α·n(I_X)."""
    return weighted_sum(evidence, weight_norm=1.0, input_capture=alpha)


@register_score("target", "labels", needs=("table",))
def composite_pid(evidence: Evidence) -> dict[str, Tensor]:
    """n(I_T) + 0.5·n(Syn) - 0.3·n(Red_T)."""
    return weighted_sum(evidence, task_information=1.0, target_excess=0.5, target_redundancy=-0.3)


@register_score("target", "labels", needs=("table",))
def pid_no_red(evidence: Evidence) -> dict[str, Tensor]:
    """n(I_T) + 0.5·n(Syn)."""
    return weighted_sum(evidence, task_information=1.0, target_excess=0.5)
