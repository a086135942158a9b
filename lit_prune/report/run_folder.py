"""The contents of a run folder, read when asked for."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from lit_prune.errors import InputError
from lit_prune.files import read_parquet
from lit_prune.report.event_files import read_csv_scalars, read_scalars

INPUTS = (
    "config.yaml",
    "run.json",
    "stages.jsonl",
    "compact/report.json",
    "channels.parquet",
    "layers.parquet",
    "lesions.parquet",
    "sensitivity.parquet",
    "curve.parquet",
    "sweep.parquet",
    "reduction.json",
    "trace/*.parquet",
    "tensorboard/**/events.out.tfevents.*",
    "**/metrics.csv",
)
"""What makes a folder a run folder: at least one of these exists."""

CHANNEL_COLUMNS = ("layer", "depth", "channel", "input_capture", "peer_overlap", "task_information")


class AbsentInput(Exception):
    """A section's input that this run does not have; the message names the file or tag."""


class RunFolder:
    """One run folder.

    Every property reads one input on first use. It raises `AbsentInput` where the run does not have it and
    `InputError` where it is there and cannot be read.

    Raises:
        InputError: the folder does not exist, or holds none of `INPUTS`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(f"run_dir={str(path)!r} is not a folder; give the folder of a run, such as runs/NAME")
        if not any(next(self.path.glob(pattern), None) for pattern in INPUTS):
            raise InputError(f"run_dir={str(path)!r} holds no run (none of {', '.join(INPUTS)}); give runs/NAME")

    @property
    def name(self) -> str:
        """Name of the run: its folder's name."""
        return self.path.resolve().name

    def file(self, name: str) -> Path:
        """Returns the path of a file of the run. AbsentInput: the run does not have it."""
        if not (self.path / name).is_file():
            raise AbsentInput(name)
        return self.path / name

    def _json(self, name: str) -> dict[str, Any]:
        return _parse_json(self.file(name).read_text(encoding="utf-8"), name)

    @cached_property
    def result(self) -> dict[str, Any]:
        """`compact/report.json`: the dense and the compact network side by side."""
        return self._json("compact/report.json")

    @cached_property
    def reduction(self) -> dict[str, Any]:
        """`reduction.json`: what `reduce` found."""
        return self._json("reduction.json")

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """`run.json`: versions, seed, data fingerprint, protocol fields."""
        return self._json("run.json")

    @cached_property
    def config(self) -> str:
        """`config.yaml` as text."""
        return self.file("config.yaml").read_text(encoding="utf-8")

    @cached_property
    def stages(self) -> tuple[dict[str, Any], ...]:
        """`stages.jsonl`: one record for each structural stage, in order."""
        lines = self.file("stages.jsonl").read_text(encoding="utf-8").splitlines()
        records = [_parse_json(line, f"stages.jsonl line {i}") for i, line in enumerate(lines, 1) if line.strip()]
        if not records:
            raise AbsentInput("stages.jsonl (it is empty)")
        return tuple(records)

    @cached_property
    def scalars(self) -> dict[str, pd.DataFrame]:
        """Logged scalars: tag -> table of `step` and `value`, from TensorBoard and CSV loggers."""
        scalars = read_csv_scalars(self.path) | read_scalars(self.path / "tensorboard")
        if not scalars:
            raise AbsentInput("tensorboard/ or metrics.csv (no logged scalars)")
        return scalars

    @cached_property
    def trace(self) -> pd.DataFrame:
        """Channel tables of all traced epochs, `epoch` = epochs finished; columns at least `CHANNEL_COLUMNS`."""
        files = sorted((self.path / "trace").glob("epoch=*.parquet"))
        if not files:
            raise AbsentInput("trace/epoch=*.parquet")
        tables = [_read_channels(file).assign(epoch=int(file.stem.removeprefix("epoch="))) for file in files]
        return pd.concat(tables, ignore_index=True)

    @cached_property
    def channels(self) -> pd.DataFrame:
        """`channels.parquet`: the channel table of one checkpoint; columns at least `CHANNEL_COLUMNS`."""
        return _read_channels(self.file("channels.parquet"))

    def table(self, name: str, columns: Sequence[str] = ()) -> pd.DataFrame:
        """A parquet table of the run.

        Raises:
            AbsentInput: the run does not have it, or not with these columns.
            InputError: it cannot be read.
        """
        table = read_parquet(self.file(name))
        missing = [column for column in columns if column not in table]
        if missing:
            raise AbsentInput(f"{name} with {', '.join(missing)}")
        return table

    @property
    def files(self) -> tuple[tuple[str, int], ...]:
        """Every file below the run folder but the report itself: path in it and size in bytes, sorted."""
        paths = (path for path in self.path.rglob("*") if path.is_file() and not path.name.startswith("."))
        listed = ((path.relative_to(self.path).as_posix(), path.stat().st_size) for path in paths)
        return tuple(sorted(entry for entry in listed if entry[0] != "report.html"))


def stages_if_any(run: RunFolder) -> tuple[dict[str, Any], ...]:
    """Returns the stages to mark in a section that does without them; empty where there are none to read.

    The stages section itself says on the page that they are absent or damaged.
    """
    try:
        return run.stages
    except (AbsentInput, InputError):
        return ()


def layer_order(channels: pd.DataFrame) -> list[str]:
    """Returns the layers by depth at their first appearance (a dropped block moves later layers up)."""
    ordered = channels.sort_values("epoch", kind="stable") if "epoch" in channels else channels
    first = ordered.drop_duplicates("layer")
    return first.sort_values("depth", kind="stable")["layer"].tolist()


def _parse_json(text: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{name} is not JSON ({error}); restore the file or run the stage again") from error
    if not isinstance(value, dict):
        raise InputError(f"{name} holds a {type(value).__name__}, not an object; restore the file")
    return value


def _read_channels(file: Path) -> pd.DataFrame:
    table = read_parquet(file)
    missing = [column for column in CHANNEL_COLUMNS if column not in table]
    if missing:
        raise InputError(f"{file.name} has no column {', '.join(missing)}; trace or analyze again")
    return table
