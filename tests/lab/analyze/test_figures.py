"""What the figures of an analysed run show is what its tables say."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lit_prune.lab.analyze.figures import draw_collapse, draw_groupings, draw_matrix, draw_propagation, draw_redundancy
from lit_prune.report.dynamics_figures import draw_dynamics, draw_gradients
from lit_prune.report.run_folder import AbsentInput, RunFolder


def test_matrix_is_symmetric_and_shows_each_value(full_run: Path):
    axes = draw_matrix(RunFolder(full_run)).figure.axes[0]
    values = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(values, values.T)
    shown = [float(text.get_text().replace("−", "-")) for text in axes.texts]  # a minus sign, not a hyphen
    assert shown == [round(value, 2) for value in values.flatten()]


def test_collapse_shows_every_live_channel_once(full_run: Path):
    channels = pd.read_parquet(full_run / "channels.parquet")
    axes = draw_collapse(RunFolder(full_run)).figure.axes[0]
    points = np.asarray(axes.collections[0].get_offsets())
    live = channels[~channels["dead"]]
    np.testing.assert_allclose(points, live[["task_information", "target_redundancy"]].to_numpy())


def test_red_dots_are_the_layers_above_the_null(full_run: Path):
    layers = pd.read_parquet(full_run / "layers.parquet")
    axes = draw_groupings(RunFolder(full_run)).figure.axes[0]
    red = np.asarray(axes.collections[1].get_offsets())[:, 0]
    assert red.tolist() == np.flatnonzero(layers["rand_index"] > layers["null_95"]).tolist()


def test_redundancy_matrix_is_ordered_by_group_with_a_line_at_each_change(full_run: Path):
    axes = draw_redundancy(RunFolder(full_run)).figure.axes[0]
    channels = pd.read_parquet(full_run / "channels.parquet")
    groups = channels[channels["layer"] == "layer1.0.conv1"].set_index("channel")["local_group"]
    order = groups.sort_values(kind="stable").index
    pairs = pd.read_parquet(full_run / "analysis" / "graphs.table.parquet")
    expected = pairs.pivot(index="channel", columns="peer", values="redundancy").loc[order, order].to_numpy(copy=True)
    np.fill_diagonal(expected, np.nan)
    np.testing.assert_allclose(np.ma.filled(axes.images[0].get_array(), np.nan), expected)
    edges = {float(np.ravel(line.get_ydata())[0]) for line in axes.lines} - {0.0, 1.0}
    assert edges == set(np.flatnonzero(np.diff(groups.loc[order])) + 0.5)


def test_propagation_matrix_is_the_mean_over_pairs(full_run: Path):
    table = pd.read_parquet(full_run / "analysis" / "propagation.table.parquet")
    values = np.asarray(draw_propagation(RunFolder(full_run)).figure.axes[0].images[0].get_array())
    chosen = (table["source_metric"] == "task_information") & (table["destination_metric"] == "input_capture")
    assert values[2, 0] == pytest.approx(table[chosen]["rank_correlation"].mean())


def test_dynamics_and_cosines_are_means_over_layers(full_run: Path):
    for draw, file, columns in (
        (draw_dynamics, "dynamics", [["coupling"], ["velocity"], ["persistence_capture", "persistence_task"]]),
        (
            draw_gradients,
            "gradients",
            [[f"capture_{task}", "update_capture", f"update_{task}"] for task in ("task", "correlation")],
        ),
    ):
        table = pd.read_parquet(full_run / "trace" / f"{file}.parquet")
        for axes, names in zip(draw(RunFolder(full_run)).figure.axes, columns, strict=True):
            lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
            for line, name in zip(lines, names, strict=True):
                expected = table.groupby("epoch")[name].mean().dropna()
                np.testing.assert_allclose(line.get_ydata(), expected)
                np.testing.assert_allclose(line.get_xdata(), expected.index)


def test_table_without_the_columns_counts_as_absent(tmp_path: Path):
    pd.DataFrame({"layer": ["a"]}).to_parquet(tmp_path / "channels.parquet")
    with pytest.raises(AbsentInput, match="channels.parquet with .*input_capture"):
        draw_matrix(RunFolder(tmp_path))
