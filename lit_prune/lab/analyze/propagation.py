"""How a layer's channel metrics reach the next layer through its weights.

Source: the two-axis paper, Eq. 13 and appendix L.
"""

import pandas as pd
import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.measurement.summaries import rank_correlations

METRICS = ("input_capture", "peer_overlap", "task_information", "target_excess")


def routing_norms(weight: Tensor, sources: int, groups: int = 1) -> Tensor:
    """Kernel norms ‖W_ji‖_F from source channel i to destination channel j, float64 [out, sources].

    Args:
        weight: of a convolution [out, sources/groups, kh, kw], or of a linear layer [out, sources·k]; after a flatten
            k is the number of positions, and source i owns the columns i·k to (i+1)·k-1.
        sources: number of source channels.
        groups: of the convolution; norms between different groups are 0.

    Raises:
        InputError: sizes that do not divide.
    """
    weight = weight.detach().double()
    destinations, inputs = weight.shape[:2]
    if weight.ndim == 2:
        if inputs % sources:
            raise InputError(f"sources: {sources} channels do not divide the {inputs} columns of the linear layer")
        return weight.view(destinations, sources, -1).norm(dim=2)
    if inputs * groups != sources or destinations % groups:
        raise InputError(f"weight: shape {tuple(weight.shape)} with {groups} groups does not read {sources} channels")
    norms = weight.flatten(2).norm(dim=2).view(groups, destinations // groups, inputs)
    return torch.block_diag(*norms)


def route(norms: Tensor, metrics: Tensor) -> Tensor:
    """Source metrics as they reach each destination, m̄_s(j) = Σ_i ‖W_ji‖_F·m(i) / Σ_i ‖W_ji‖_F, [out, M].

    Args:
        norms: from `routing_norms`, [out, sources].
        metrics: [sources, M]; a source with NaN is left out of both sums. NaN where no weight is left.
    """
    metrics = metrics.double()
    defined = metrics.isfinite()
    total = norms @ defined.double()
    return torch.where(total > 0, norms @ metrics.nan_to_num(0.0) / total, torch.nan)


def propagation_matrix(norms: Tensor, source: pd.DataFrame, destination: pd.DataFrame) -> pd.DataFrame:
    """Spearman correlations of routed source metrics with the destination's metrics, 4×4.

    Rows are source metrics, columns destination metrics, over (I_X, R̄_X, I_T, Syn). NaN where not defined.

    Args:
        norms: from `routing_norms`, [out, sources].
        source: the source layer's rows of the channel table, in channel order.
        destination: those of the destination layer.

    Raises:
        InputError: tables whose lengths do not fit the norms.
    """
    if norms.shape != (len(destination), len(source)):
        sizes = f"{len(source)} source and {len(destination)} destination channels"
        raise InputError(f"norms: shape {tuple(norms.shape)} for {sizes}; give the two layers that it connects")
    names = list(METRICS)
    routed = route(norms.cpu(), torch.from_numpy(source[names].to_numpy(dtype="float64", copy=True)))
    correlations = rank_correlations(routed.numpy(), destination[names].to_numpy(dtype="float64"))
    return pd.DataFrame(correlations, index=names, columns=names)
