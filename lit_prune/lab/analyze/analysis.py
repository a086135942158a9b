"""The verb `analyze`: channel and layer tables of a network, with the extras and controls asked for."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn

from lit_prune.files import read_parquet, write_parquet
from lit_prune.lab.analyze.evidence import Analysis
from lit_prune.lab.analyze.extras import BASE, EXTRAS, Frames, extra_names
from lit_prune.lab.analyze.request import AnalyzeRequest
from lit_prune.lab.ledger import Ledger, signature
from lit_prune.measurement.channel_table import layer_table
from lit_prune.measurement.layers import Batches
from lit_prune.measurement.summaries import collapse
from lit_prune.progress import Watch, unwatched
from lit_prune.structure.networks import fingerprint
from lit_prune.train.run_record import add_record

KEYS = {"channels": ["layer", "channel"], "layers": ["layer"]}
SHOWN = {
    "channels": "N",
    "coupling": "I_X\nI_T",
    "collapse": "I_T\nRed_T",
    "norm_capture": "‖w‖\nI_X",
    "rand_index": "ARI",
    "null_95": "ARI\nnull",
    "modularity_redundancy": "Q_R",
    "modularity_excess": "Q_S",
    "mean_hull_size": "hull",
    "triplet_ratio": "S3/S2",
}
CAPTION = "Two names over each other: Spearman correlation over channels. null: 95th percentile of shuffles."
COMMON = ("target", "layers", "limit", "protocol")


def analyze(
    model: nn.Module,
    batches: Batches,
    request: AnalyzeRequest = AnalyzeRequest(),  # noqa: B008  (frozen)
    *,
    run_dir: str | Path | None = None,
    record: dict[str, Any] | None = None,
    watch: Watch = unwatched,
) -> Frames:
    """Channel table, layer table and one table a control of a network, from one pass where the extras allow it.

    With a run folder every extra is written as soon as it is done, to `analysis/<extra>.<table>.parquet`, and one that
    is there already for the same network, data and settings is not computed again; at the end `channels.parquet` and
    `layers.parquet` hold all that belongs together, also from earlier calls. `run.json` gets the key `analyze`.

    Args:
        model: a classifier; left as found.
        batches: (images, labels) pairs that can be read more than once: a list or a DataLoader.
        request: extras and settings.
        run_dir: where to write; None writes nothing. `lesions.parquet` in it serves the extra `damage`.
        record: plain values that say which data and which network these are, for run.json and for the decision
            whether an extra is there already.
        watch: wraps what takes long, given a description, for a progress bar.

    Returns:
        `channels`, `layers`, and under an extra's name its table: `graphs`, `propagation`, `targets`, `partners`,
        `label_permutation`, `reparameterisation`, `calibration_sizes`, `exact`, `damage`. Columns: see the extras'
        functions in `lit_prune.lab.analyze`.

    Raises:
        InputError: as `lit_prune.measurement.channel_table`; an extra that this network or these lesions do not allow.
    """
    folder = None if run_dir is None else Path(run_dir)
    store = KeptExtras(folder, fingerprint(model, record or {}), request)
    known = None if folder is None or "damage" not in request.extras else folder / "lesions.parquet"
    lesions = read_parquet(known) if known is not None and known.is_file() else None
    wanted = (BASE, *(extra for extra in extra_names() if extra in request.extras))
    missing = [name for name in wanted if store.read(name) is None]
    analysis = Analysis(
        model, batches, replace(request, extras=tuple(extra for extra in missing if extra != BASE)), lesions, watch
    )
    for name in watch(missing, "extras"):
        store.write(name, EXTRAS[name].build(analysis))
    tables = store.tables()
    if folder is not None:
        for name in ("channels", "layers"):
            write_parquet(folder / f"{name}.parquet", tables[name])
        extras = sorted(store.names())
        add_record(folder, "analyze", {**(record or {}), "request": asdict(request), "extras": extras})
    return tables


class KeptExtras:
    """Results of extras of one network on its data, in memory and in a run folder."""

    def __init__(self, folder: Path | None, identity: str, request: AnalyzeRequest) -> None:
        self._folder, self._identity, self._settings = folder, identity, asdict(request)
        self._kept = Ledger(None if folder is None else folder / "analysis")

    def signature(self, name: str) -> str:
        """Hash of all that an extra's result depends on."""
        chosen = {key: self._settings[key] for key in (*COMMON, *EXTRAS[name].settings)}
        lesions = None if self._folder is None else self._folder / "lesions.parquet"
        if name == "damage" and lesions is not None and lesions.exists():
            chosen["lesions"] = hashlib.sha256(lesions.read_bytes()).hexdigest()
        return signature(self._identity, name, chosen)

    def read(self, name: str) -> Frames | None:
        """An extra's tables, or None if they are not there for these settings."""
        signed = self.signature(name)
        frames = {output: self._kept.table(f"{name}.{output}", signed) for output in EXTRAS[name].outputs}
        return None if any(frame is None for frame in frames.values()) else frames

    def write(self, name: str, frames: Frames) -> None:
        """Keeps an extra's tables."""
        for output in EXTRAS[name].outputs:
            self._kept.keep_table(f"{name}.{output}", self.signature(name), frames[output])

    def names(self) -> list[str]:
        """Extras that are there for these settings."""
        return [name for name in extra_names() if self.read(name) is not None]

    def tables(self) -> Frames:
        """The channel and the layer table with the columns of all extras that are there, and the extras' own tables."""
        channels = self.read(BASE)["channels"]
        layers = layer_table(channels)
        live = channels.groupby("layer", sort=False)
        layers["collapse"] = layers["layer"].map({name: collapse(rows) for name, rows in live})
        tables = {"channels": channels, "layers": layers}
        for name in self.names():
            frames = self.read(name)
            for output, keys in KEYS.items():
                if output in frames:
                    tables[output] = tables[output].merge(frames[output], on=keys, how="left", sort=False)
            if "table" in frames:
                tables[name] = frames["table"]
        return tables


def result_rows(layers: pd.DataFrame) -> Table:
    """The layer table for the terminal: what there is of the columns that say most, and their means."""
    columns = [column for column in SHOWN if column in layers]
    table = Table(box=SIMPLE_HEAD, padding=0, title="Layers", caption=CAPTION)  # eleven columns in 80 characters
    table.add_column("layer", no_wrap=True, min_width=12)
    for column in columns:
        table.add_column(SHOWN[column], justify="right", no_wrap=True)
    for row in layers.itertuples():
        table.add_row(row.layer, *(_format(getattr(row, column)) for column in columns))
    means = layers[columns].mean()
    table.add_section()
    table.add_row("mean", *("" if column == "channels" else _format(float(means[column])) for column in columns))
    return table


def _format(value: float | int) -> str:
    if isinstance(value, int | np.integer):
        return str(value)
    return "–" if value != value else f"{value:.2f}"
