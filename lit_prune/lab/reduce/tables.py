"""Tables of a reduction: means over seeds, paired differences from the first method, the table on the terminal."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lit_prune.replace import paired_bootstrap

MEASURED = ("accuracy", "iia", "kl", "bound", "empirical", "accuracy_repaired")
COMPARED = ("accuracy", "iia", "kl")
KEYS = ["calibration_size", "width"]


def cell_frame(cells: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row a cell, with the certificate's bounds and the stages' seconds as columns of their own."""
    rows = []
    for cell in cells:
        row = {key: value for key, value in cell.items() if not isinstance(value, dict)}
        row |= {name: cell["certificate"][name] for name in ("bound", "empirical", "distortion")}
        rows.append(row | {f"seconds_{stage}": value for stage, value in cell["seconds"].items()})
    return pd.DataFrame(rows)


def summarise(cells: Sequence[dict[str, Any]], methods: Sequence[str]) -> dict[str, list[dict]]:
    """`summary`: mean and standard deviation over seeds; `differences`: of every label from the first.

    Returns:
        Lists of plain rows. A difference carries a 95 % bootstrap interval over seeds (both ends equal with one seed).
    """
    frame = cell_frame(cells)
    measured = [name for name in MEASURED if name in frame] + [c for c in frame if c.startswith("seconds_")]
    summary, differences = [], []
    for (size, width), part in frame.groupby(KEYS, sort=False):
        by_method = {method: part[part["method"] == method].sort_values("seed") for method in methods}
        for method, rows in by_method.items():
            values = {"calibration_size": int(size), "width": int(width), "method": method, "seeds": len(rows)}
            for name in measured:
                values[name] = float(rows[name].mean())
                values[f"{name}_sd"] = float(rows[name].std(ddof=1)) if len(rows) > 1 else 0.0
            summary.append(values)
            if method == methods[0]:
                continue
            for name in COMPARED:
                mean, low, high = paired_bootstrap(rows[name].to_numpy(), by_method[methods[0]][name].to_numpy())
                found = {"metric": name, "difference": mean, "low": low, "high": high}
                place = {"calibration_size": int(size), "width": int(width), "method": method}
                differences.append({**place, "from": methods[0], **found})
    return {"summary": summary, "differences": differences}


def reduction_table(content: dict[str, Any]) -> Table:
    """The summary for the terminal: mean ± standard deviation over seeds."""
    sizes = len({row["calibration_size"] for row in content["summary"]}) > 1
    repaired = any("accuracy_repaired" in row for row in content["summary"])
    title = f"Reduction of {content['layer']} ({content['units']} units)"
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, title=title, caption=_caption(content))
    columns = ("kept", "method", *(("images",) if sizes else ()), "accuracy", "IIA", "KL, nats", "certified")
    for place, column in enumerate((*columns, *(("repaired",) if repaired else ()))):
        table.add_column(column, justify="left" if place == 1 else "right", no_wrap=place != 1)
    last = None
    for row in content["summary"]:
        if last not in (None, row["width"]):
            table.add_section()
        cells = [str(row["width"]), row["method"], *([str(row["calibration_size"])] if sizes else [])]
        cells += [_spread(row, "accuracy", 4), _spread(row, "iia", 3), _spread(row, "kl", 3)]
        cells += [f"{row['bound']:.2f}/{row['empirical']:.2f}"]
        table.add_row(*cells, *([_spread(row, "accuracy_repaired", 4)] if repaired else []))
        last = row["width"]
    return table


def difference_table(content: dict[str, Any]) -> Table | None:
    """Paired differences for the terminal; None for a single seed or method."""
    rows = content["differences"]
    if not rows or content["summary"][0]["seeds"] < 2:
        return None
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"Difference from {rows[0]['from']}, 95 % interval over seeds")
    for column in ("kept", "method", "metric", "difference", "interval"):
        table.add_column(column, justify="left" if column in ("method", "metric") else "right")
    for row in rows:
        interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
        table.add_row(str(row["width"]), row["method"], row["metric"], f"{row['difference']:+.4f}", interval)
    return table


def _spread(row: dict[str, Any], name: str, digits: int) -> str:
    value = f"{row[name]:.{digits}f}"
    return f"{value}±{row[f'{name}_sd']:.{digits}f}" if row["seeds"] > 1 else value


def _caption(content: dict[str, Any]) -> str:
    dense = [cell["accuracy_dense"] for cell in content["cells"]]
    caption = (
        f"dense accuracy {sum(dense) / len(dense):.4f}; IIA: share of equal top classes under interchange; KL from the "
        "original; certified: lower bound of the IIA by Markov/by the empirical tail"
    )
    singular = sum(cell["compiled"].get("singular", 0) > 0 for cell in content["cells"])
    if singular:
        caption += f"; {singular} cells had singular systems, solved with the ridge"
    return caption
