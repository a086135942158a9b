"""Extras that need values and not only sums: BROJA atoms and the KSG estimator."""

import pandas as pd
import torch
from sklearn.feature_selection import mutual_info_regression
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.lab.analyze.broja import best_peer_pairs, decompose, irrecoverable_loss, joint_counts
from lit_prune.lab.analyze.evidence import Analysis
from lit_prune.lab.analyze.extras import Frames, register_extra
from lit_prune.measurement.summaries import rank_correlation

ATOMS = ("shared", "unique", "synergy", "irrecoverable_loss")
NEIGHBOURS = 3


@register_extra("channels", "layers", settings=("samples", "bins"))
def broja(analysis: Analysis) -> Frames:
    """BROJA atoms of each channel with its best peer (the other channel of largest I_T).

    Channel columns (nats): broja_shared, broja_unique, broja_synergy, broja_irrecoverable_loss (in [0, 1]); NaN for
    dead channels. Layer columns: <atom>_task and <atom>_overlap, Spearman correlations with I_T and R̄_X, loss_capture
    (irrecoverable loss with I_X), shared_over_synergy, the ratio of the mean atoms, and broja_gap, the largest duality
    gap.

    Source: the two-axis paper, section 2.4 and appendix N.
    """
    target, channels, layers = analysis.target, [], []
    for layer in analysis.layers:
        values, rows = analysis.evidence.pooled[layer], analysis.rows(layer)
        information = torch.from_numpy(rows["task_information"].to_numpy(copy=True))
        pairs = best_peer_pairs(information)
        found = decompose(joint_counts(target[: len(values)], values, pairs, analysis.request.bins))
        atoms = {"shared": found.shared, "unique": found.unique_first, "synergy": found.synergy}
        atoms["irrecoverable_loss"] = irrecoverable_loss(found)
        columns = rows[["layer", "channel"]].reset_index(drop=True)
        for name, atom in atoms.items():
            columns[f"broja_{name}"] = torch.full_like(information, torch.nan).index_copy(0, pairs[:, 0], atom).numpy()
        channels.append(columns)
        gap = float(found.gap.max()) if len(pairs) else float("nan")  # a lone live channel has no peer
        layers.append({"layer": layer, **_broja_ranks(columns, rows), "broja_gap": gap})
    return {"channels": pd.concat(channels, ignore_index=True), "layers": pd.DataFrame(layers)}


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
    channels, layers = [], []
    for layer in analysis.layers:
        values, rows = analysis.evidence.pooled[layer], analysis.rows(layer)
        found = ksg_information(analysis.target[: len(values)], values, seed=analysis.request.seed).numpy()
        columns = rows[["layer", "channel"]].reset_index(drop=True).assign(task_information_ksg=found)
        columns.loc[rows["dead"].to_numpy(), "task_information_ksg"] = float("nan")
        channels.append(columns)
        tie = rank_correlation(columns["task_information_ksg"], rows["task_information"])
        layers.append({"layer": layer, "ksg_task": tie})
    return {"channels": pd.concat(channels, ignore_index=True), "layers": pd.DataFrame(layers)}


def ksg_information(
    target: Tensor, values: Tensor, *, neighbours: int = NEIGHBOURS, seed: int = 0, jobs: int | None = None
) -> Tensor:
    """I(T;Y_i) of every channel by nearest neighbours, nats, float64 [N]; NaN for a constant channel or T.

    I = ψ(n) + ψ(k) - ⟨ψ(n_T + 1) + ψ(n_Y + 1)⟩, the first estimator of the source, on variables scaled to unit
    variance with seeded noise of 1e-10 that breaks ties. Nearly unbiased at independence, but half of the independent
    channels come out negative and scikit-learn clips them at 0, so their mean is above 0 (0.006 nats for n = 2000). No
    Gaussian assumption; ranks of weak channels are noisy. 5000 samples take some 40 ms a channel.

    Args:
        target: T [n].
        values: pooled outputs [n, N].
        neighbours: k, default 3.
        seed: of the tie-breaking noise.
        jobs: processes to spread the channels over, None for one.

    Raises:
        InputError: shapes that do not fit, too few samples, NaN.

    Source: Kraskov, Stögbauer and Grassberger 2004, Eq. 8, as in scikit-learn's `mutual_info_regression`.
    """
    if values.ndim != 2 or target.shape != values.shape[:1]:
        raise InputError(f"target, values: shapes {tuple(target.shape)}, {tuple(values.shape)}; give [n] and [n, N]")
    if len(target) <= neighbours:
        raise InputError(f"values: {len(target)} samples for {neighbours} neighbours; give more than that")
    if not bool(target.isfinite().all() & values.isfinite().all()):
        raise InputError("target, values: NaN or infinite; mend the network or the data")
    target, values = target.double().cpu(), values.double().cpu()
    varying = (values != values[0]).any(0) & (target != target[0]).any()
    information = torch.full_like(values[0], torch.nan)
    if varying.any():
        found = mutual_info_regression(
            values[:, varying].numpy(), target.numpy(), n_neighbors=neighbours, random_state=seed, n_jobs=jobs
        )
        information[varying] = torch.from_numpy(found).double()  # whole numbers where all are clipped at 0
    return information
