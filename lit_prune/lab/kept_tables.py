"""Tables that a verb does not compute again: each is kept with the hash of all that it depends on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd

from lit_prune.files import read_parquet, write_parquet


def signature(*parts: Any) -> str:
    """Hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class KeptTables:
    """Tables by name, in memory and in a folder, `NAME.parquet`, whole or not at all.

    Args:
        folder: where to keep them; None keeps them in memory alone.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._known: dict[str, pd.DataFrame] = {}

    def read(self, name: str, signed: str) -> pd.DataFrame | None:
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

    def write(self, name: str, signed: str, table: pd.DataFrame) -> None:
        """Keeps the table in the place of an earlier one."""
        table = table.copy()
        table.attrs["signature"] = signed
        self._known[name] = table
        if self._folder is not None:
            write_parquet(self._folder / f"{name}.parquet", table)
