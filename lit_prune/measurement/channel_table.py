"""The channel table: one forward pass over calibration images, every channel's place on the two axes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.measurement import local_axis, target_axis
from lit_prune.measurement.activations import record
from lit_prune.measurement.layers import Batches, by_output, select_layers
from lit_prune.measurement.protocol import DEFAULT_PROTOCOL, Protocol
from lit_prune.measurement.summaries import coupling, live_rows
from lit_prune.measurement.sums import ActivationSums, LayerSums
from lit_prune.running import undisturbed
from lit_prune.task import Task, peek, settle

MINIMUM_IMAGES = 4  # three correlated variables (T and two channels) need one image more
NO_TARGET = "none"  # what `target` says to leave T out
ROUNDING = 1e-12  # a variance at most this share of its scale squared is float noise
TARGET_COLUMNS = ("task_information", "target_redundancy", "target_excess")
COLUMNS = ("weight_norm", "signal_power", "rayleigh_quotient", "input_capture", "peer_overlap", *TARGET_COLUMNS)


@checked
def measure(
    model: nn.Module,
    batches: Batches,
    target: str | None = None,
    layers: Sequence[str] | str | None = None,
    *,
    protocol: Protocol = DEFAULT_PROTOCOL,
    task: Task | str | None = None,
) -> pd.DataFrame:
    """Channel table of a network, from one forward pass over `batches` in evaluation mode.

    >>> table = measure(nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU()), [torch.randn(8, 1, 6, 6)])
    >>> list(table["layer"]), bool((table["input_capture"] > 0).all())
    (['0', '0', '0'], True)

    Args:
        model: any network; left as found.
        batches: what the task reads, such as (images, labels); see `lit_prune.task`.
        target: the task variable T, one of the task's `variables`; None takes its default (`true_margin` with labels of
            classes, `negative_loss` with other targets, none with inputs alone: NaN on the target axis); "none".
        layers: names or fnmatch patterns of Conv2d and Linear layers; None takes all. Of a
            layer with one channel the columns that need peers are NaN.
        protocol: the conventions, recorded with a result.
        task: what a batch and an output mean, a Task or its name; None recognises it from the first batch.

    Returns:
        One row a channel: layer, depth (index in forward order among the measured layers, from 0), channel, weight_norm
        ‖w‖, signal_power, rayleigh_quotient, input_capture, peer_overlap, task_information, target_redundancy,
        target_excess (float64, information in nats, NaN where not defined) and dead (bool).

    Raises:
        InputError: no such layer, bad labels, NaN or infinite activations, or fewer than 4 images.
    """
    return channel_table(model, collect_sums(model, batches, target, layers, protocol, task), protocol)


def collect_sums(
    model: nn.Module,
    batches: Batches,
    target: str | None = None,
    layers: Sequence[str] | str | None = None,
    protocol: Protocol = DEFAULT_PROTOCOL,
    task: Task | str | None = None,
) -> ActivationSums:
    """The sums behind the channel table; they add over batches and ranks. Arguments as of `measure`."""
    select_layers(model, layers)  # a wrong pattern is reported before the data is touched
    task, batches = settle(task, model, batches)
    example = None
    if protocol.hook_point == "post_bn":
        first, batches = peek(batches)
        example = task.inputs(task.to(task.take(first, 2), model))
    with undisturbed(model), record(model, layers, protocol, example) as recording:
        for batch in batches:
            name = variable_name(task, batch, target)
            for piece in (batch,) if name is None else task.pieces(batch):
                piece = task.to(piece, model)
                recording.add_target(task_values(task, task.run(model, piece), piece, name))
    return recording.sums


def variable_name(task: Task, batch: Any, target: str | None) -> str | None:
    """The task variable that `target` asks for: None takes the task's default, "none" none."""
    return None if target == NO_TARGET else target or task.default_variable(batch)


def task_values(task: Task, output: Any, batch: Any, name: str | None) -> Tensor:
    """Task variables of a batch, float64 [B, V]; V = 0 without a name."""
    return torch.zeros(task.size(batch), 0).double() if name is None else task.variable(output, batch, name).detach()


def channel_table(model: nn.Module, sums: ActivationSums, protocol: Protocol = DEFAULT_PROTOCOL) -> pd.DataFrame:
    """The channel table of `measure` from its sums."""
    if sums.images < MINIMUM_IMAGES:
        raise InputError(f"batches: {sums.images} images are too few; give at least {MINIMUM_IMAGES}, better 1000")
    if not sums.layers:
        raise InputError("layers: none of the chosen ones runs in a forward pass; choose others")
    deviation = target_deviation(sums)
    found = []
    for name, layer_sums in sums.layers.items():
        layer_sums = layer_sums.to("cpu")
        weight = by_output(model.get_submodule(name)).flatten(1)
        weight_norm = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).cpu()  # no float64 copy of it
        found.append(layer_columns(layer_sums, weight_norm, deviation, protocol))
    widths = [len(columns["dead"]) for columns in found]
    places = {
        "layer": np.repeat(np.array(list(sums.layers), dtype=object), widths),
        "depth": np.repeat(np.arange(len(widths)), widths),
        "channel": np.concatenate([np.arange(width) for width in widths]),
    }
    table = pd.DataFrame(places | {key: torch.cat([columns[key] for columns in found]).numpy() for key in found[0]})
    table.attrs["left_out"] = dict(sums.left_out)
    return table


def target_deviation(sums: ActivationSums) -> Tensor:
    """Population standard deviation of the task variables, [V]; exactly 0 where it is no more than rounding."""
    mean = sums.target_first / sums.images
    variance = sums.target_second / sums.images - mean.square()
    return torch.where(variance > ROUNDING * mean.square(), variance, 0.0).sqrt()


def layer_columns(
    sums: LayerSums, weight_norm: Tensor, deviation: Tensor, protocol: Protocol = DEFAULT_PROTOCOL
) -> dict[str, Tensor]:
    """The numeric columns of one layer's channel table, each [N]; `weight_norm` ‖w_i‖ [N], `deviation` of T [V]."""
    power = local_axis.signal_power(sums.outputs)
    dead = local_axis.dead_channels(power)
    correlations = local_axis.correlation_matrix(sums.outputs.covariance())
    local = [
        weight_norm,
        power,
        local_axis.rayleigh_quotient(power, weight_norm),
        local_axis.input_capture(power),
        local_axis.peer_overlap(correlations, dead, protocol.overlap_mean),
    ]
    return dict(zip(COLUMNS, [*local, *_target_columns(sums, dead, deviation, protocol)], strict=True)) | {"dead": dead}


def _target_columns(sums: LayerSums, dead: Tensor, deviation: Tensor, protocol: Protocol) -> list[Tensor]:
    """I_T, Red_T and Syn, each [N]: among the live channels, averaged over task variables, NaN elsewhere."""
    task, between = target_correlations(sums, deviation, protocol)
    live = (~dead & between.diagonal().isfinite()).nonzero().flatten()
    columns = [torch.full_like(sums.outputs.shift, torch.nan) for _ in range(3)]
    defined = [a for a in task[live].T if a.isfinite().all()]
    if not defined or not len(live):
        return columns
    between = between[live][:, live]
    values = torch.stack([torch.stack(_axis(a, between, protocol)) for a in defined]).mean(0)  # [3, live]
    for column, value in zip(columns, values, strict=True):
        column[live] = value
    return columns


def _axis(task: Tensor, between: Tensor, protocol: Protocol) -> list[Tensor]:
    """I_T, Red_T and Syn of live channels for one task variable."""
    information = target_axis.task_information(task)
    if len(task) == 1:
        return [information, torch.full_like(task, torch.nan), torch.full_like(task, torch.nan)]
    partners = target_axis.find_partners(task, between, protocol)
    redundancy = target_axis.target_redundancy(task, partners)
    return [information, redundancy, target_axis.target_excess(task, between, partners)]


def target_correlations(
    sums: LayerSums, deviation: Tensor, protocol: Protocol = DEFAULT_PROTOCOL
) -> tuple[Tensor, Tensor]:
    """Correlations [N, V] of T with the channel's values, and [N, N] among those; NaN where a variance is zero.

    The values are the pooled outputs. With pooling `match` they are the positions themselves and T is repeated over
    them: the covariance with T is that of the mean over positions, the variances are those of the positions. Those with
    T are NaN too where T has no sample for each.
    """
    moments = sums.outputs if protocol.target_pooling == "match" else sums.pooled
    variance, covariance = moments.variances(), moments.covariance()
    variance = torch.where(variance > ROUNDING * local_axis.signal_power(sums.outputs), variance, 0.0)
    covariance.diagonal().copy_(variance)
    between = local_axis.correlation_matrix(covariance)
    if sums.crossed != sums.pooled.count:
        return between.new_full((len(variance), len(deviation)), torch.nan), between
    mean = sums.pooled.first / sums.crossed
    crossed = sums.cross / sums.crossed - torch.outer(mean, sums.target_first / sums.crossed)
    scale = torch.outer(variance.sqrt(), deviation)
    return torch.where(scale > 0, crossed / scale, torch.nan), between


def layer_table(channels: pd.DataFrame) -> pd.DataFrame:
    """One row a layer of a channel table: layer, depth, channels, dead, coupling, and the column means `mean_<column>`.

    coupling is the Spearman correlation of I_X and I_T over the live channels that have both; NaN for fewer than 3 of
    them or a constant column. Means run over live channels.
    """
    rows = []
    for (name, depth), frame in channels.groupby(["layer", "depth"], sort=False):
        live = live_rows(frame)
        row = {"layer": name, "depth": depth, "channels": len(frame), "dead": int(frame["dead"].sum())}
        row["coupling"] = coupling(frame)
        rows.append(row | {f"mean_{column}": live[column].mean() for column in COLUMNS})
    return pd.DataFrame(rows)
