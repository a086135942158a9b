"""What a verb does not compute again: tables and plain values, kept under the hash of all that they depend on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd

from lit_prune.files import read_json, read_parquet, write_json, write_parquet


def signature(*parts: Any) -> str:
    """Hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Ledger:
    """Finished results by name, in memory and in a folder, whole or not at all.

    A table is `NAME.parquet` and says its signature; it is not there for another one. Plain values are `NAME.json`,
    whose name is made of the signature, so that several are there side by side; a value that holds an `error` is not
    done.

    Args:
        folder: where to keep them; None keeps tables in memory alone, and takes no values.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._known: dict[str, pd.DataFrame] = {}

    def table(self, name: str, signed: str) -> pd.DataFrame | None:
        """The table, or None where there is none of this signature."""
        if name not in self._known and self._folder is not None:
            file = self._folder / f"{name}.parquet"
            if file.is_file():
                self._known[name] = read_parquet(file)
        table = self._known.get(name)
        if table is None or table.attrs.get("signature") != signed:
            return None
        table = table.copy()
        table.attrs.clear()
        return table

    def keep_table(self, name: str, signed: str, table: pd.DataFrame) -> None:
        """Keeps the table in the place of an earlier one."""
        table = table.copy()
        table.attrs["signature"] = signed
        self._known[name] = table
        if self._folder is not None:
            write_parquet(self._folder / f"{name}.parquet", table)

    def value(self, name: str) -> dict[str, Any] | None:
        """A value, with or without error; None where there is none. Read anew, since other processes write too.

        Raises:
            InputError: the file is damaged.
        """
        file = self._value_file(name)
        return read_json(file, remedy="delete it and start again") if file.is_file() else None

    def has(self, name: str) -> bool:
        """Whether a value is there and without error."""
        found = self.value(name)
        return found is not None and "error" not in found

    def keep_value(self, name: str, value: dict[str, Any]) -> None:
        """Keeps a value in the place of an earlier one."""
        write_json(self._value_file(name), value)

    def _value_file(self, name: str) -> Path:
        assert self._folder is not None, "values are kept in a folder"
        return self._folder / f"{name}.json"
