"""Files that appear whole or not at all."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_prune.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

LOCK = ".lock"


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is renamed to `path`, on an exception it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` (UTF-8) to `path`, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON to `path`, whole or not at all."""
    write_text(path, json_text(value, indent=1) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: what is undefined (NaN, ±infinity) is null.

    >>> json_text({"accuracy": float("nan")})
    '{"accuracy": null}'
    """
    return json.dumps(defined(value), indent=indent, allow_nan=False)


def defined(value: Any) -> Any:
    """The plain value with None in the place of every NaN or infinity."""
    if isinstance(value, dict):
        return {key: defined(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [defined(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_parquet(path: str | Path, table: "pd.DataFrame") -> None:
    """Writes a table without its index to `path`, whole or not at all."""
    with whole_file(path) as partial:
        table.to_parquet(partial, index=False)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a folder while the block lasts, so that no second process works in it; the system frees it on any exit.

    A folder in which nothing was written is removed again.

    Raises:
        InputError: another process holds the folder.
    """
    from filelock import FileLock, Timeout  # a network loads without it

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(
            f"run_dir: another process is at work in {folder}; wait for it, stop it, or give another --run_dir"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # there is more in it than the lock: it stays
            if os.listdir(folder) == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()
        lock.release()
