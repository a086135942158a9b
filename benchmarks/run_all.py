"""Runs every script of benchmarks/ and writes one table of their rows, `benchmarks/results.md`.

    python benchmarks/run_all.py [SCRIPT ...] [--quick] [--to FILE]

One process a script, one after the other, one thread each but where a row says otherwise. With names, as
`measure sweep`, only these run and the rows of the others stay as they are. With `--quick` a script that takes minutes
runs some of its cases only. The table says how busy the machine was: ratios stand some load, other figures need an idle
machine. A script that fails leaves a line that says so, and the exit code is 1.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from rows import Row, choose

from lit_prune.files import write_text

HERE = Path(__file__).resolve().parent
NO_BENCHMARKS = (  # no times, or weights and images that are not here
    "rows",
    "run_all",
    "hulls",
    "large_images",
    "repairs",
    "replacement_kinds",
    "silenced",
    "swaps",
    "architectures",
    "block_choice",
    "compression",
    "compression_cases",
    "fuzz_files",
    "latency",
    "tasks",
    "task_cases",
    "task_fit",
    "trained",
    "tracing",
    "vit_parts",
)
PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "torch-pruning")
QUICK = {
    "backbones": ["resnet18", "cifar_resnet20"],
    "lesions": ["layer2.1.conv1", "layer3.2.conv1"],
    "measure": ["resnet20"],
    "mechanisms": ["head"],
    "memory": ["resident"],
}
"""Cases of each script that `--quick` runs; all of those that are not named here."""
HEADING = "| script | what | figure | spread | from |\n| --- | --- | ---: | ---: | --- |"


def machine() -> str:
    """Processor, cores, accelerator, load and versions, in one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    processor = names[0] if names else platform.machine()
    python = platform.python_version()
    cores = f"{os.cpu_count()} cores, one thread but where a row says otherwise"
    load = f"load {os.getloadavg()[0]:.1f} before the start"
    return f"{processor}, {cores}, {device}, {load}; Python {python}, {versions}"


def run_script(name: str, quick: bool = False) -> list[Row] | None:
    """Rows of one script, of its quick cases only where asked for; None where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        cases = QUICK.get(name, []) if quick else []
        command = [sys.executable, str(HERE / f"{name}.py"), *cases, "--json", str(file)]
        environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **os.environ}
        finished = subprocess.run(command, env=environment, cwd=HERE.parent)
        if finished.returncode or not file.exists():
            return None
        return [Row(**row) for row in json.loads(file.read_text())]


def lines_of(name: str, rows: list[Row] | None) -> list[str]:
    """Lines of one script in the table."""
    if rows is None:
        return [f"| {name} | failed | | | |"]
    return [f"| {name} | {row.name} | {row.ratio:.3g} {row.unit} | ± {row.spread:.2g} | {row.detail} |" for row in rows]


def known_lines(file: Path) -> dict[str, list[str]]:
    """Lines of an earlier table by script."""
    kept: dict[str, list[str]] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        if line.startswith("| ") and not line.startswith(("| script", "| ---")):
            kept.setdefault(line.split("|")[1].strip(), []).append(line)
    return kept


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="scripts without .py; all where none is given")
    parser.add_argument("--to", type=Path, default=HERE / "results.md")
    parser.add_argument("--quick", action="store_true", help="some cases of the long ones only")
    arguments = parser.parse_args()
    taken_on = machine()  # before the load of the benchmarks themselves
    scripts = sorted(file.stem for file in HERE.glob("*.py") if file.stem not in NO_BENCHMARKS)
    table = {name: lines for name, lines in known_lines(arguments.to).items() if name in scripts}
    failed = []
    for name in choose(arguments.names, scripts):
        print(f"benchmarks/{name}.py", flush=True)
        rows = run_script(name, arguments.quick)
        table[name] = lines_of(name, rows)
        failed += [name] if rows is None else []
        body = "\n".join(line for script in sorted(table) for line in table[script])
        note = "Spread: half of the range between the quartiles over the repeats."
        write_text(arguments.to, f"# Results of `make bench`\n\n{taken_on}.\n{note}\n\n{HEADING}\n{body}\n")
    print(f"table: {arguments.to}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
