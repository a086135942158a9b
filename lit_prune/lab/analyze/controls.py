"""Controls on the target axis and on the calibration set: other targets, partners, permuted labels, fewer images."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from scipy.stats import kendalltau
from sklearn.metrics import silhouette_score

from lit_prune.lab.analyze.evidence import Analysis, target_columns
from lit_prune.lab.analyze.extras import Frames, register_extra
from lit_prune.measurement.channel_table import channel_table, target_correlations, target_deviation
from lit_prune.measurement.summaries import coupling, live_rows, rank_correlation
from lit_prune.measurement.target_axis import task_information
from lit_prune.running import undisturbed
from lit_prune.scores.groupings import (
    CLUSTERS,
    LOCAL_FEATURES,
    adjusted_rand_index,
    group_channels,
    grouping_agreement,
    standardise,
)

CALIBRATED = ("input_capture", "peer_overlap", "task_information", "target_excess")


def kendall(first: np.ndarray | pd.Series, second: np.ndarray | pd.Series) -> float:
    """Kendall's τ-b over the entries where both are finite; NaN for fewer than three or a constant."""
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    both = np.isfinite(first) & np.isfinite(second)
    if both.sum() < 3 or np.ptp(first[both]) == 0 or np.ptp(second[both]) == 0:
        return float("nan")
    return float(kendalltau(first[both], second[both]).statistic)


def by_layer(table: pd.DataFrame, statistic: Callable[[pd.DataFrame], float]) -> float:
    """Mean of a statistic over the layers where it is defined."""
    values = [statistic(rows) for _, rows in live_rows(table).groupby("layer", sort=False)]
    defined = [value for value in values if np.isfinite(value)]
    return float(np.mean(defined)) if defined else float("nan")


@register_extra("channels", "table", settings=("seed",))
def targets(analysis: Analysis) -> Frames:
    """All task variables.

    Channel columns: task_information_<target>. Table `targets`, one row a target: coupling ρ(I_X, I_T), rand_index of
    the local and the target grouping (NaN for one_vs_rest), and tau_<other>, Kendall's τ with each target's ranking of
    the channels; means over layers.

    Source: the two-axis paper, tables 4 and 5.
    """
    tables = {name: _table_of_target(analysis, name) for name in analysis.task.variables}
    columns = {name: table["task_information"].to_numpy() for name, table in tables.items()}
    channels = analysis.channels[["layer", "channel"]].assign(
        **{f"task_information_{name}": values for name, values in columns.items()}
    )
    joined = analysis.channels[["layer", "dead"]].assign(**columns)
    rows = []
    for name, table in tables.items():
        taus = {f"tau_{other}": by_layer(joined, lambda r, a=name, b=other: kendall(r[a], r[b])) for other in tables}
        agreement = by_layer(table, lambda r: grouping_agreement(r, analysis.request.seed).rand_index)
        rows.append({"target": name, "coupling": by_layer(table, coupling), "rand_index": agreement, **taus})
    return {"channels": channels, "table": pd.DataFrame(rows)}


def _table_of_target(analysis: Analysis, name: str) -> pd.DataFrame:
    """Channel table of one target; of many variables (one_vs_rest) I_T alone, their mean."""
    sums = target_columns(analysis.evidence.sums, analysis.evidence.columns[name])
    if sums.target_first.shape[0] == 1:
        return channel_table(analysis.model, sums, analysis.request.protocol)
    table = analysis.channels.assign(target_redundancy=np.nan, target_excess=np.nan)
    values = []
    for layer in analysis.layers:
        task, _ = target_correlations(sums.layers[layer].to("cpu"), target_deviation(sums), analysis.request.protocol)
        values.append(task_information(task).nanmean(1))
    information = torch.cat(values).masked_fill(torch.from_numpy(table["dead"].to_numpy(copy=True)), torch.nan)
    return table.assign(task_information=information.numpy())


@register_extra("table", settings=("seed", "partner_counts"))
def partners(analysis: Analysis) -> Frames:
    """Table `partners`: the target excess under each rule for choosing partners and each number of them.

    Columns: rule, partners, capture_excess ρ(I_X, Syn), task_excess ρ(I_T, Syn), tau (Kendall, with the protocol's own
    rule and number), rand_index; means over layers.

    Source: the two-axis paper, table 6.
    """
    request = analysis.request
    settings = [("task", count) for count in request.partner_counts]
    settings += [(rule, request.protocol.partners) for rule in ("joint", "excess", "random")]
    rows = []
    for rule, count in settings:
        protocol = replace(request.protocol, partner_rule=rule, partners=count, seed=request.seed)
        table = channel_table(analysis.model, analysis.sums, protocol)
        table["reference"] = analysis.channels["target_excess"]
        rows.append(
            {
                "rule": rule,
                "partners": count,
                "capture_excess": by_layer(table, lambda r: rank_correlation(r["input_capture"], r["target_excess"])),
                "task_excess": by_layer(table, lambda r: rank_correlation(r["task_information"], r["target_excess"])),
                "tau": by_layer(table, lambda r: kendall(r["reference"], r["target_excess"])),
                "rand_index": by_layer(table, lambda r: grouping_agreement(r, request.seed).rand_index),
            }
        )
    return {"table": pd.DataFrame(rows)}


@register_extra("table", settings=("seed",))
def label_permutation(analysis: Analysis) -> Frames:
    """Table `label_permutation`: a second pass in which the task variable belongs to the wrong images.

    Two controls: `labels` computes T from permuted labels (a margin then still depends on the images' own logits),
    `pairing` gives each image another image's T. Columns: control, layer, task_information (mean over channels),
    ratio (of the unpermuted mean to it), largest_change (of I_X and R̄_X over the channels, nats; 0 to the last bit).

    Source: the two-axis paper, appendix E, control C3.
    """
    request, evidence = analysis.request, analysis.evidence
    order = torch.randperm(len(evidence.labels), generator=torch.Generator().manual_seed(request.seed))
    wrong, mixed = evidence.labels[order], analysis.target[order]
    seen = 0
    with undisturbed(analysis.model), analysis.recording() as recording:
        running = recording.sums
        for batch in analysis.batches("permuted labels", request.sizes if evidence.prefixes else ()):
            batch = analysis.task.to(batch, analysis.model)
            place = slice(seen, seen + analysis.task.size(batch))
            output = analysis.task.run(analysis.model, batch)
            from_labels = analysis.task.variable(output, analysis.task.relabelled(batch, wrong[place]), request.target)
            recording.add_target(torch.cat([from_labels, mixed[place, None].to(from_labels)], 1))
            seen = place.stop
            if running.images in evidence.prefixes:
                recording.sums.copy()  # settled where the first pass was, and so the same to the last bit
    rows = []
    for place, control in enumerate(("labels", "pairing")):
        sums = target_columns(recording.sums, slice(place, place + 1))
        rows += _permuted_rows(analysis, channel_table(analysis.model, sums, request.protocol), control)
    return {"table": pd.DataFrame(rows)}


def _permuted_rows(analysis: Analysis, table: pd.DataFrame, control: str) -> list[dict[str, float | str]]:
    rows = []
    for layer in analysis.layers:
        before, after = (live_rows(part[part["layer"] == layer]) for part in (analysis.channels, table))
        local = ["input_capture", "peer_overlap"]
        means = [part["task_information"].mean() for part in (before, after)]
        rows.append(
            {
                "control": control,
                "layer": layer,
                "task_information": means[1],
                "ratio": means[0] / means[1] if means[1] > 0 else np.nan,
                "largest_change": float((before[local] - after[local]).abs().max().max()),
            }
        )
    return rows


@register_extra("table", settings=("seed", "sizes"))
def calibration_sizes(analysis: Analysis) -> Frames:
    """Table `calibration_sizes`: what fewer calibration images (the first of all) leave of the rankings.

    Columns: images, layer, tau_<metric> (Kendall, with all images), rand_index (of the local groups with those of all
    images), silhouette (of the local groups), coupling.

    Source: the two-axis paper, table 1.
    """
    request, rows = analysis.request, []
    everything = analysis.evidence.sums
    for size, sums in sorted({**analysis.evidence.prefixes, everything.images: everything}.items()):
        of_target = target_columns(sums, analysis.evidence.columns[request.target])
        table = channel_table(analysis.model, of_target, request.protocol)
        for layer in analysis.layers:
            some, every = table[table["layer"] == layer], analysis.rows(layer)
            taus = {f"tau_{metric}": kendall(some[metric], every[metric]) for metric in CALIBRATED}
            groups = _local_agreement(some, every, request.seed)
            rows.append({"images": size, "layer": layer, **taus, **groups, "coupling": coupling(some)})
    return {"table": pd.DataFrame(rows)}


def _local_agreement(some: pd.DataFrame, every: pd.DataFrame, seed: int) -> dict[str, float]:
    """Adjusted Rand index of the local groups of two tables of a layer, and the silhouette of the first."""
    features = [rows[list(LOCAL_FEATURES)].to_numpy(dtype=float) for rows in (some, every)]
    defined = np.isfinite(features[0]).all(1) & np.isfinite(features[1]).all(1)
    features = [part[defined] for part in features]
    if min(len(np.unique(part, axis=0)) for part in features) <= CLUSTERS:
        return {"rand_index": float("nan"), "silhouette": float("nan")}
    first, second = (group_channels(part, seed) for part in features)
    return {
        "rand_index": float(adjusted_rand_index(first, second)),
        "silhouette": float(silhouette_score(standardise(features[0]), first)),
    }
