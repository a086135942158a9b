"""A budget of time beside a budget of multiply-adds: figure and measured seconds of the compact networks.

    python benchmarks/latency.py NETWORK SAMPLES --out FOLDER --cells macs=0.5 latency=0.7 latency_onnx=0.8

NETWORK and SAMPLES are those of `compression.py`; a cell is a budget and the share of it that is kept
(`macs+blocks=0.5`: blocks may go too). Each is compressed once (`FOLDER/NETWORK-CELL.pt`, not again where it is there)
and judged on the test part. At the end all networks of the cells are timed in turns, in PyTorch and ONNX Runtime with
one and 64 images, so that they compare whatever else the machine did: a Markdown table of the quickest of some passes,
as shares of the dense network's.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from compression import Judge
from compression_cases import CASES, Bench, split

from lit_prune.compression import Recipe, compress
from lit_prune.structure import cost
from lit_prune.structure.budgets import find_budget
from lit_prune.timing import circumstances

BUDGETS = ("latency", "latency_64", "latency_onnx", "latency_onnx_64")


def compressed(bench: Bench, cell: str, images: int, together: int, judge: Judge) -> dict:
    """The network of a cell and what is known of it."""
    budget, keep = cell.split("=")
    order = torch.randperm(len(bench.train[1]), generator=torch.Generator().manual_seed(0))[:images]
    budget, _, blocks = budget.partition("+")
    recipe = Recipe(only=("mid", "planes", "blocks") if blocks else None)
    recipe = replace(recipe, replacement=replace(recipe.replacement, together=together))
    start = time.perf_counter()
    calibration = split(bench.train, bench.batch, order)
    small, report = compress(bench.model, calibration, float(keep), budget, task=bench.task, recipe=recipe)
    found = {"cell": cell, "seconds": time.perf_counter() - start, "budget": report.get("budget", {})}
    example = bench.test[0][:1]
    found["macs"] = cost(small, example).macs / cost(bench.model, example).macs
    return found | judge(small) | {"network": small}


def times(bench: Bench, found: list[dict], budgets: list[str]) -> dict[str, list[float]]:
    """Seconds of the dense network and of the others under each budget, in turns."""
    networks = [bench.model, *(row["network"] for row in found)]
    return {name: find_budget(name).compare(networks, bench.test[0][:1]) for name in budgets}


def table(found: list[dict], seconds: dict[str, list[float]], dense: float) -> str:
    """A row for each network."""
    columns = ("budget", "kept", "MACs", "figure", "agreement", *seconds, "predicted", "took, s")
    lines = [f"| {' | '.join(columns)} |", "| --- | " + "---: | " * (len(columns) - 1)]
    whole = [f"{1000 * values[0]:.3g} ms" for values in seconds.values()]
    lines.append(f"| dense | | 1 | {100 * dense:.2f} | | {' | '.join(whole)} | | |")
    for place, row in enumerate(found, 1):
        shares = [f"{values[place] / values[0]:.3f}" for values in seconds.values()]
        said = row["budget"]
        predicted = f"{said['predicted']:.3f} ± {said['spread'] / 2:.3f}" if said else ""
        parts = (f"{row['macs']:.3f}", f"{100 * row['figure']:.2f}", f"{100 * row['agreement']:.2f}", *shares)
        lines.append(f"| {' | '.join((*row['cell'].split('='), *parts, predicted, format(row['seconds'], '.0f')))} |")
    return "\n".join(lines)


def main() -> None:
    """Compresses what is missing, times everything, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=CASES)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", required=True, help="BUDGET=SHARE")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--together", type=int, default=12, help="passes that solve blocks together")
    parser.add_argument("--times", nargs="*", default=list(BUDGETS), help="budgets to time by")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = CASES[arguments.network](arguments.samples)
    arguments.out.mkdir(parents=True, exist_ok=True)
    judge = Judge(bench, arguments.out / f"{arguments.network}.answers.pt")
    found = []
    for cell in arguments.cells:
        file = arguments.out / f"{arguments.network}-{cell}.pt"
        if not file.exists():
            torch.save(compressed(bench, cell, arguments.images, arguments.together, judge), file)
        found.append(torch.load(file, weights_only=False))
    print(table(found, times(bench, found, arguments.times), found[0]["dense"]) if arguments.times else "")
    print(circumstances())


if __name__ == "__main__":
    main()
