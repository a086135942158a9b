"""What every benchmark has in common: work timed in turns, rows of the result table, the command line.

The convention. A script of `benchmarks/` defines one function `rows(names)` that returns a list of `Row`, and ends with

    if __name__ == "__main__":
        main(rows, __doc__)

`names` are the cases asked for on the command line, empty for all. `python benchmarks/SCRIPT.py [NAME ...]` prints the
rows; `--json FILE` writes them as well, which is how `run_all.py` gets them. A script may print more than its rows.
Ratios are of times taken in turns in one process (`in_turns`, `ratio_row`): they carry over to other machines better
than seconds do, and a machine that slows down for a while slows both sides. A figure that is no ratio (MiB, images/s)
names its unit.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPEATS = 5
Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One figure of the result table.

    Attributes:
        name: What was measured against what, such as `resnet18: record / forward`.
        ratio: The figure: median over the repeats.
        spread: Half of the range from the lower to the upper quartile over the repeats, in the unit of `ratio`.
        unit: Unit of both; `×` for a ratio of times.
        detail: What stands behind it, such as the seconds of both sides.
    """

    name: str
    ratio: float
    spread: float = 0.0
    unit: str = "×"
    detail: str = ""


def in_turns(works: Mapping[str, Work], repeats: int = REPEATS, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call by name, `repeats` of each, taken in turns after `warmup` calls of each."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(warmup + repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if turn >= warmup:
                taken[name].append(time.perf_counter() - start)
    return taken


def seconds(work: Work, repeats: int = REPEATS) -> float:
    """Median seconds of one call after one to warm up."""
    return statistics.median(in_turns({"": work}, repeats)[""])


def half_range(values: Sequence[float]) -> float:
    """Half of the range from the lower to the upper quartile; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return (upper - lower) / 2


def ratio_row(name: str, above: Sequence[float], below: Sequence[float]) -> Row:
    """Row of `above / below`, two series of seconds from `in_turns`: the median of the ratios of each turn."""
    ratios = [one / other for one, other in zip(above, below, strict=True)]
    detail = f"{statistics.median(above):.4g} s / {statistics.median(below):.4g} s"
    return Row(name, statistics.median(ratios), half_range(ratios), detail=detail)


def choose(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The cases asked for, all where none is; exits with a line for one that is unknown."""
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"unknown case {unknown[0]!r}; give some of {', '.join(known)}")
    return list(names or known)


def main(rows: Callable[[list[str]], list[Row]], description: str | None = None) -> None:
    """Command line of a script: prints its rows and writes them where `--json FILE` says."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases; all where none is given")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments = parser.parse_args()
    found = rows(arguments.names)
    table = Table("what", "figure", "spread", "from", title=Path(sys.argv[0]).name)
    for row in found:
        table.add_row(row.name, f"{row.ratio:.3g} {row.unit}", f"± {row.spread:.2g}", row.detail)
    Console(width=140).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in found]))
