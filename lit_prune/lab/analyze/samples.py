"""Extras that need values and not only sums: BROJA atoms and the KSG estimator."""

import pandas as pd
import torch

from lit_prune.lab.analyze.broja import best_peer_pairs, decompose, irrecoverable_loss, joint_counts
from lit_prune.lab.analyze.evidence import Analysis
from lit_prune.lab.analyze.extras import Frames, register_extra
from lit_prune.lab.analyze.ksg import ksg_information
from lit_prune.measurement.summaries import rank_correlation

ATOMS = ("shared", "unique", "synergy", "irrecoverable_loss")


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
