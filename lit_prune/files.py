"""Files that appear whole or not at all."""

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_prune.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

LOCK = ".lock"
PARTIAL = ".partial"
CHECKSUM = "checksum"


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is renamed to `path`, on an exception it is removed.

    What processes that were killed left of the same file goes too.

    Raises:
        InputError: `path` is a folder, or lies where nothing can be written.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file")
    writable(path.parent)
    for abandoned in path.parent.glob(f".{escape(path.name)}.*{PARTIAL}"):
        _delete_abandoned(abandoned)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def writable(folder: Path) -> Path:
    """The folder, made where it is missing.

    Raises:
        InputError: no file can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} cannot be written ({one_reason(error)}); give another place") from error


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

    Raises:
        InputError: it holds something else than plain values.
    """
    return _dumps(defined(value), indent=indent)


def _dumps(value: Any, **form: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, **form)
    except TypeError as error:
        raise InputError(f"{error}; give numbers, text, lists and dicts") from error


def defined(value: Any) -> Any:
    """The plain value with None in the place of every NaN or infinity."""
    if isinstance(value, dict):
        return {key: defined(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [defined(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(
    path: str | Path, keys: Iterable[str] = (), remedy: str = "restore it, or delete it and run again"
) -> dict[str, Any]:
    """The object of a JSON file.

    Args:
        path: the file.
        keys: what must be in it.
        remedy: what to do where it is wrong, for the message.

    Raises:
        InputError: it is missing or unreadable, or holds something else.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error}); {remedy}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not an object; {remedy}")
    missing = [key for key in keys if key not in value]
    if missing:
        raise InputError(f"{path} has no {missing[0]!r}; {remedy}")
    return value


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain JSON values with the SHA-256 of themselves under `checksum`."""
    return {**values, CHECKSUM: _digest(values)}


def check_seal(values: Mapping[str, Any], source: str | Path) -> None:
    """Compares values that were read with the checksum among them, where there is one.

    Raises:
        InputError: they are not as they were written.
    """
    given = {name: value for name, value in values.items() if name != CHECKSUM}
    if values.get(CHECKSUM) not in (None, _digest(given)):
        raise InputError(
            f"{source} does not match its checksum: it is damaged; if you edited it, delete the line {CHECKSUM!r}"
        )


def _digest(values: Mapping[str, Any]) -> str:
    text = _dumps(defined(dict(values)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_parquet(path: str | Path, table: "pd.DataFrame") -> None:
    """Writes a table without its index to `path`, whole or not at all, with checksums of its pages and its content."""
    import pyarrow
    from pyarrow import parquet

    content = pyarrow.Table.from_pandas(table, preserve_index=False)
    named = {**content.schema.metadata, CHECKSUM.encode(): _table_digest(content.to_pandas()).encode()}
    with whole_file(path) as partial:
        parquet.write_table(content.replace_schema_metadata(named), partial, write_page_checksum=True)


def read_parquet(path: str | Path) -> "pd.DataFrame":
    """The table of a parquet file; its pages, names, types and values are compared with their checksums.

    Raises:
        InputError: it is missing or damaged.
    """
    from pyarrow import parquet

    try:
        content = parquet.read_table(path, page_checksum_verification=True)
        given = (content.schema.metadata or {}).get(CHECKSUM.encode())
        table = content.to_pandas()
        if given is not None and given.decode() != _table_digest(table):
            raise ValueError("it does not match its checksum")
        return table
    except Exception as error:  # pyarrow raises its own families, and others in the middle of a damaged file
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"{path} cannot be read ({problem}); delete it and run its verb again") from error


def _table_digest(table: "pd.DataFrame") -> str:
    """SHA-256 of a table's names, types and values."""
    import pandas as pd
    from pandas.util import hash_pandas_object

    digest = hashlib.sha256()
    for name in table:
        column = table[name]
        if column.dtype == object or isinstance(column.dtype, pd.StringDtype):
            column = column.astype(object).where(column.notna(), None)  # pandas 2 and 3 type text differently
        digest.update(repr((name, str(column.dtype))).encode())
        try:
            values = hash_pandas_object(column, index=False)
        except TypeError:  # lists and other cells without a hash
            values = hash_pandas_object(column.map(repr).astype(object), index=False)
        digest.update(values.to_numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def alone(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Holds a folder while the block lasts, so that no second process works in it; the system frees it on any exit.

    A folder in which nothing was written is removed again, and what killed processes left half-written in it too.

    Args:
        folder: is made where it is missing.
        name: of the lock file; processes that share a folder on purpose hold one each.

    Raises:
        InputError: another process holds the folder.
    """
    from filelock import FileLock, Timeout  # a network loads without it

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / name).is_symlink():
            raise InputError(f"run_dir: {folder / name} is a symbolic link; delete it")
        lock = FileLock(folder / name)
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(
            f"run_dir: another process is at work in {folder}; wait for it, stop it, or give another --run_dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise InputError(f"run_dir: {folder} cannot be written ({one_reason(error)}); give another --run_dir") from None
    try:
        sweep_partial(folder)
        yield
    finally:
        with suppress(OSError):  # there is more in it than the lock: it stays
            if os.listdir(folder) == [name]:
                (folder / name).unlink()
                folder.rmdir()
        lock.release()


@contextmanager
def nothing_of_a_refused_run(folder: Path, beginning: Iterable[str]) -> Iterator[None]:
    """Takes back what the block wrote into `folder` where it is refused before it has written more than a beginning."""
    before = set(os.listdir(folder))
    try:
        yield
    except InputError:
        written = set(os.listdir(folder)) - before
        if written <= set(beginning):
            for name in written - {LOCK}:
                entry = folder / name
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        raise


def sweep_partial(folder: Path) -> None:
    """Deletes what killed processes left half-written in a folder; folders in it with a lock of their own are left."""
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not (Path(path) / name / LOCK).exists()]
        for name in files:
            if name.startswith(".") and name.endswith(PARTIAL):
                _delete_abandoned(Path(path) / name)


def _delete_abandoned(partial: Path) -> None:
    """Deletes a half-written file that no process is writing any more."""
    if not _is_alive(partial.name.split(".")[-2]):
        partial.unlink(missing_ok=True)


def _is_alive(process: str) -> bool:
    """Whether there is another process of that number on this machine."""
    try:
        os.kill(int(process), 0)
    except (ValueError, OSError):
        return False
    return int(process) != os.getpid()


def one_reason(error: OSError | NotImplementedError | ValueError) -> str:
    """Why the system refused a file, in its own words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
