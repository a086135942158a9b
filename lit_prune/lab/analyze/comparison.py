"""Several analysed runs together: intervals over model-seed units, means without each architecture."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lit_prune.errors import InputError
from lit_prune.files import read_json, read_parquet
from lit_prune.measurement.summaries import leave_one_out_means, unit_bootstrap

STATISTICS = ("coupling", "rand_index", "collapse", "triplet_ratio", "modularity_redundancy", "modularity_excess")


def compare_runs(folders: Sequence[str | Path], seed: int = 0) -> pd.DataFrame:
    """Table of layer statistics over several analysed runs, each run one unit.

    Columns: statistic, runs, mean, low, high (95 % bootstrap over runs, not over layers), layer_mean, layer_error
    (standard error over all layers), and without_<architecture>, the mean over the units of the other architectures.

    Args:
        folders: run folders with layers.parquet and run.json.
        seed: of the bootstrap.

    Raises:
        InputError: fewer than two runs, or a folder that was not analysed.

    Source: the two-axis paper, table 3.
    """
    if len(folders) < 2:
        raise InputError(f"compare: {len(folders)} run folders; give at least two analysed ones")
    layers = pd.concat([_layers(Path(folder)) for folder in folders], ignore_index=True)
    rows = []
    for name in (name for name in STATISTICS if name in layers):
        values = layers[name]
        interval = unit_bootstrap(values, layers["run"], seed=seed)
        others = leave_one_out_means(values, layers["run"], layers["architecture"])
        rows.append(
            {
                "statistic": name,
                "runs": layers["run"].nunique(),
                "mean": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "layer_mean": values.mean(),
                "layer_error": values.sem(),
                **{f"without_{architecture}": mean for architecture, mean in others.items()},
            }
        )
    return pd.DataFrame(rows)


def _layers(folder: Path) -> pd.DataFrame:
    """The layer table of a run with the columns run and architecture."""
    files = folder / "layers.parquet", folder / "run.json"
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(f"compare: {folder} has no {' and '.join(missing)}; analyze that run first")
    record = read_json(files[1])
    backbone = record.get("analyze", record).get("backbone") or {}
    return read_parquet(files[0]).assign(run=str(folder), architecture=backbone.get("name", "unknown"))
