"""Extras on the structure of each layer: groupings, graphs, hulls, triplets, propagation, boundary of the norm."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch

from lit_prune.lab.analyze.evidence import Analysis, LayerFacts
from lit_prune.lab.analyze.extras import Frames, layer_by_layer, register_extra
from lit_prune.lab.analyze.propagation import propagation_matrix, routing_norms
from lit_prune.lab.analyze.triplets import triplet_excess
from lit_prune.measurement.summaries import live_rows, rank_correlation
from lit_prune.scores.graphs import excess_graph, greedy_modularity, redundancy_graph
from lit_prune.scores.groupings import LOCAL_FEATURES, TARGET_FEATURES, group_channels, grouping_agreement
from lit_prune.scores.hulls import greedy_hulls
from lit_prune.structure import trace_groups

SHOWN_LAYERS, SHOWN_CHANNELS = 3, 128


@register_extra("channels", "layers", settings=("seed",))
def groupings(analysis: Analysis) -> Frames:
    """Groups of channels on each axis, their agreement, and what pairs inside and between local groups share.

    Channel columns: local_group, target_group (-1 for a channel in none). Layer columns: rand_index, null_mean,
    null_95, local_silhouette, target_silhouette, redundancy_within, redundancy_between, excess_within, excess_between
    (mean nats a pair).
    """
    seed = analysis.request.seed

    def of(layer: str) -> dict[str, dict[str, Any]]:
        rows = analysis.rows(layer)
        agreement = grouping_agreement(rows, seed)
        groups = pd.DataFrame(-1, rows.index, ["local_group", "target_group"])
        if np.isfinite(agreement.rand_index):
            live = live_rows(rows).dropna(subset=[*LOCAL_FEATURES, *TARGET_FEATURES])
            for column, features in (("local_group", LOCAL_FEATURES), ("target_group", TARGET_FEATURES)):
                groups.loc[live.index, column] = group_channels(live[list(features)].to_numpy(), seed)
        columns = {name: groups[name].to_numpy() for name in groups}
        pairs = pairs_by_group(analysis.facts(layer), columns["local_group"])
        return {"channels": columns, "layers": {**asdict(agreement), **pairs}}

    return layer_by_layer(analysis, of)


def pairs_by_group(facts: LayerFacts, groups: np.ndarray) -> dict[str, float]:
    """Mean redundancy and target excess of the pairs within and between groups, nats; NaN without such pairs."""
    member = torch.from_numpy(np.array(groups))
    used = member[:, None].ge(0) & member.ge(0) & torch.ones(len(member), len(member)).triu(1).bool()
    same = member[:, None] == member
    means = {}
    for name, graph in _graphs(facts).items():
        for where, chosen in (("within", used & same), ("between", used & ~same)):
            values = graph[chosen]
            values = values[values.isfinite()]
            means[f"{name}_{where}"] = float(values.mean()) if len(values) else float("nan")
    return means


def _graphs(facts: LayerFacts) -> dict[str, torch.Tensor]:
    return {
        "redundancy": redundancy_graph(facts.correlations),
        "excess": excess_graph(facts.task, facts.between),
    }


@register_extra("channels", "layers", "table")
def graphs(analysis: Analysis) -> Frames:
    """Modularity of the redundancy graph R and the target-excess graph S of each layer.

    Channel column: redundancy_community. Layer columns: modularity_redundancy (Q_R), modularity_excess (Q_S), NaN for a
    graph without edges. Table `graphs`: layer, channel, peer, redundancy, excess of all pairs of the first 128 channels
    of an early, a middle and a late layer.
    """
    names = analysis.layers
    shown = {names[int(place)] for place in np.linspace(0, len(names) - 1, SHOWN_LAYERS)}
    pairs = []

    def of(layer: str) -> dict[str, dict[str, Any]]:
        weights = _graphs(analysis.facts(layer))
        if layer in shown:
            pairs.append(_pair_table(layer, weights))
        parts = {name: greedy_modularity(graph) for name, graph in weights.items()}
        return {
            "channels": {"redundancy_community": parts["redundancy"].communities.numpy()},
            "layers": {f"modularity_{name}": part.modularity for name, part in parts.items()},
        }

    return {**layer_by_layer(analysis, of), "table": pd.concat(pairs, ignore_index=True)}


def _pair_table(layer: str, weights: dict[str, torch.Tensor]) -> pd.DataFrame:
    size = min(SHOWN_CHANNELS, len(weights["redundancy"]))
    channel, peer = np.divmod(np.arange(size * size), size)
    values = {name: graph[:size, :size].flatten().numpy() for name, graph in weights.items()}
    return pd.DataFrame({"layer": layer, "channel": channel, "peer": peer, **values})


@register_extra("channels", "layers")
def hulls(analysis: Analysis) -> Frames:
    """Replaceability hulls.

    Channel columns: full_explanation, hull_size (-1 for a dead channel), compact_support. Layer columns:
    singleton_ratio, saturated_ratio, mean_hull_size.
    """

    def of(layer: str) -> dict[str, dict[str, Any]]:
        facts = analysis.facts(layer)
        found = greedy_hulls(facts.correlations, facts.dead)
        columns = {"full_explanation": found.full, "hull_size": found.sizes, "compact_support": found.compact_support}
        ratios = {"singleton_ratio": found.singleton_ratio, "saturated_ratio": found.saturated_ratio}
        return {
            "channels": {name: values.numpy() for name, values in columns.items()},
            "layers": {**ratios, "mean_hull_size": found.mean_size},
        }

    return layer_by_layer(analysis, of)


@register_extra("layers", settings=("seed",))
def triplets(analysis: Analysis) -> Frames:
    """Layer columns triplet_ratio = mean(max(S3, 0))/mean(S2), mean_triple_excess and mean_pair_excess (nats)."""

    def of(layer: str) -> dict[str, dict[str, float]]:
        facts = analysis.facts(layer)
        found = triplet_excess(facts.task, facts.between, seed=analysis.request.seed)
        excess = {"triple": found.triple_excess.clamp_min(0), "pair": found.pair_excess}
        means = {f"mean_{name}_excess": float(part.mean()) for name, part in excess.items()}  # NaN without any
        return {"layers": {"triplet_ratio": found.ratio, **means}}

    return layer_by_layer(analysis, of)


@register_extra("table")
def propagation(analysis: Analysis) -> Frames:
    """Table `propagation`: how each metric, routed through the weights, ranks the next layer's channels by each metric.

    Columns: source, destination (layers), source_metric, destination_metric, rank_correlation. A pair of layers is a
    consumer and the last layer before it that writes channels it reads, as the dependency graph has it.
    """
    tables = []
    for source, destination in consecutive_layers(analysis):
        module = analysis.model.get_submodule(destination)
        first, second = analysis.rows(source), analysis.rows(destination)
        norms = routing_norms(module.weight.cpu(), len(first), getattr(module, "groups", 1))
        matrix = propagation_matrix(norms, first, second)
        long = matrix.rename_axis("source_metric").reset_index()
        long = long.melt("source_metric", var_name="destination_metric", value_name="rank_correlation")
        tables.append(long.assign(source=source, destination=destination))
    columns = ["source", "destination", "source_metric", "destination_metric", "rank_correlation"]
    return {"table": pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)}


def consecutive_layers(analysis: Analysis) -> list[tuple[str, str]]:
    """Pairs (source, destination) of measured layers, one for each destination whose whole input one source writes."""
    depth = {name: place for place, name in enumerate(analysis.layers)}
    pairs = {}
    for group in trace_groups(analysis.model, analysis.example).groups:
        writers = [name for name in group.producers if name in depth]
        for consumer in group.consumers:
            before = [name for name in writers if consumer in depth and depth[name] < depth[consumer]]
            if before:
                source = max(before, key=depth.__getitem__)
                if _fits(analysis, source, consumer):
                    pairs[consumer] = source
    return sorted(((source, consumer) for consumer, source in pairs.items()), key=lambda pair: depth[pair[1]])


def _fits(analysis: Analysis, source: str, destination: str) -> bool:
    """Whether the destination reads the source's channels and no others (no concatenation)."""
    channels = analysis.model.get_submodule(source).weight.shape[0]
    module = analysis.model.get_submodule(destination)
    if hasattr(module, "in_channels"):
        return module.in_channels == channels
    return module.in_features % channels == 0


@register_extra("layers")
def boundary(analysis: Analysis) -> Frames:
    """Layer columns that say how far the weight norm stands in for the local axis.

    norm_capture ρ(log‖w‖², I_X), norm_rayleigh ρ(log‖w‖², log RQ), norm_overlap ρ(log‖w‖², R̄_X), all Spearman, and
    deviation_log_rayleigh, the standard deviation of log RQ, over the live channels.

    Source: the two-axis paper, table 14.
    """

    def of(layer: str) -> dict[str, dict[str, float]]:
        live = live_rows(analysis.rows(layer))
        others = {"capture": "input_capture", "rayleigh": "rayleigh_quotient", "overlap": "peer_overlap"}
        ranks = {f"norm_{name}": rank_correlation(live["weight_norm"], live[other]) for name, other in others.items()}
        logs = np.log(live["rayleigh_quotient"][live["rayleigh_quotient"] > 0])
        return {"layers": {**ranks, "deviation_log_rayleigh": float(logs.std(ddof=0))}}  # NaN without any

    return layer_by_layer(analysis, of)
