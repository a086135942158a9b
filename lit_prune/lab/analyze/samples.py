"""Extras that need values and not only sums: BROJA atoms and the KSG estimator."""

from typing import Any

import pandas as pd
import torch
from sklearn.feature_selection import mutual_info_regression
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.lab.analyze.broja import best_peer_pairs, decompose, irrecoverable_loss, joint_counts
from lit_prune.lab.analyze.evidence import Analysis
from lit_prune.lab.analyze.extras import Frames, layer_by_layer, register_extra
from lit_prune.measurement.summaries import rank_correlation

ATOMS = ("shared", "unique", "synergy", "irrecoverable_loss")
NEIGHBOURS = 3  # k


@register_extra("channels", "layers", settings=("samples", "bins"))
def broja(analysis: Analysis) -> Frames:
    """BROJA atoms of each channel with its best peer (the other channel of largest I_T).

    Channel columns (nats): broja_shared, broja_unique, broja_synergy, broja_irrecoverable_loss (in [0, 1]); NaN for
    dead channels. Layer columns: <atom>_task and <atom>_overlap, Spearman correlations with I_T and R̄_X, loss_capture
    (irrecoverable loss with I_X), shared_over_synergy, the ratio of the mean atoms, and broja_gap, the largest duality
    gap.

    Source: the two-axis paper, section 2.4 and appendix N.
    """

    def of(layer: str) -> dict[str, dict[str, Any]]:
        values, rows = analysis.evidence.pooled[layer], analysis.rows(layer)
        information = torch.from_numpy(rows["task_information"].to_numpy(copy=True))
        pairs = best_peer_pairs(information)
        found = decompose(joint_counts(analysis.target[: len(values)], values, pairs, analysis.request.bins))
        atoms = {"shared": found.shared, "unique": found.unique_first, "synergy": found.synergy}
        atoms["irrecoverable_loss"] = irrecoverable_loss(found)
        nowhere = torch.full_like(information, torch.nan)
        columns = {f"broja_{name}": nowhere.index_copy(0, pairs[:, 0], atom).numpy() for name, atom in atoms.items()}
        gap = float(found.gap.max()) if len(pairs) else float("nan")  # a lone live channel has no peer
        return {"channels": columns, "layers": {**_broja_ranks(pd.DataFrame(columns), rows), "broja_gap": gap}}

    return layer_by_layer(analysis, of)


def _broja_ranks(columns: pd.DataFrame, rows: pd.DataFrame) -> dict[str, float]:
    ranks = {}
    for name in ATOMS[:3]:
        ranks[f"{name}_task"] = rank_correlation(columns[f"broja_{name}"], rows["task_information"])
        ranks[f"{name}_overlap"] = rank_correlation(columns[f"broja_{name}"], rows["peer_overlap"])
    ranks["loss_capture"] = rank_correlation(columns["broja_irrecoverable_loss"], rows["input_capture"])
    synergy = columns["broja_synergy"].mean()
    ranks["shared_over_synergy"] = float(columns["broja_shared"].mean() / synergy) if synergy > 0 else float("nan")
    return ranks


@register_extra("channels", "layers", settings=("samples", "seed"))
def ksg(analysis: Analysis) -> Frames:
    """Channel column task_information_ksg (nats); layer column ksg_task, its Spearman correlation with I_T.

    Source: the two-axis paper, appendix E, control C2b.
    """

    def of(layer: str) -> dict[str, dict[str, Any]]:
        values, rows = analysis.evidence.pooled[layer], analysis.rows(layer)
        found = ksg_information(analysis.target[: len(values)], values, seed=analysis.request.seed).numpy()
        found[rows["dead"].to_numpy()] = float("nan")
        tie = rank_correlation(found, rows["task_information"])
        return {"channels": {"task_information_ksg": found}, "layers": {"ksg_task": tie}}

    return layer_by_layer(analysis, of)


def ksg_information(target: Tensor, values: Tensor, *, seed: int = 0) -> Tensor:
    """I(T;Y_i) of T [n] and each pooled output [n, N] by nearest neighbours, nats, float64 [N]; NaN for constants.

    I = ψ(n) + ψ(k) - ⟨ψ(n_T + 1) + ψ(n_Y + 1)⟩, the first estimator of the source, on variables scaled to unit
    variance with seeded noise of 1e-10 that breaks ties. Nearly unbiased at independence, but half of the independent
    channels come out negative and scikit-learn clips them at 0, so their mean is above 0 (0.006 nats for n = 2000). No
    Gaussian assumption; ranks of weak channels are noisy. 5000 samples take some 40 ms a channel.

    Raises:
        InputError: shapes that do not fit, too few samples, NaN.

    Source: Kraskov, Stögbauer and Grassberger 2004, Eq. 8, as in scikit-learn's `mutual_info_regression`.
    """
    if values.ndim != 2 or target.shape != values.shape[:1]:
        raise InputError(f"target, values: shapes {tuple(target.shape)}, {tuple(values.shape)}; give [n] and [n, N]")
    if len(target) <= NEIGHBOURS:
        raise InputError(f"values: {len(target)} samples for {NEIGHBOURS} neighbours; give more than that")
    if not bool(target.isfinite().all() & values.isfinite().all()):
        raise InputError("target, values: NaN or infinite; mend the network or the data")
    target, values = target.double().cpu(), values.double().cpu()
    varying = (values != values[0]).any(0) & (target != target[0]).any()
    information = torch.full_like(values[0], torch.nan)
    if varying.any():
        drawn = {"n_neighbors": NEIGHBOURS, "random_state": seed}
        found = mutual_info_regression(values[:, varying].numpy(), target.numpy(), **drawn)
        information[varying] = torch.from_numpy(found).double()  # whole numbers where all are clipped at 0
    return information
