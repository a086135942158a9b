"""Damaged files of every kind, and what reading them does: refused in one line, the same value, another value, a crash.

`python benchmarks/fuzz_files.py --mutants 2000` prints the table; a line for each kind of file. Every mutant differs
from the file in at least one byte. "silent" is the column that must be 0: something else was read without a word.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

import lit_prune
from lit_prune.errors import InputError
from lit_prune.files import read_parquet, write_parquet
from lit_prune.models import build_backbone
from lit_prune.structure.networks import load_network

OUTCOMES = ("refused", "same", "silent", "crash")
ARGUMENTS = {"num_classes": 10, "in_channels": 1}
SHAPE = (1, 8, 8)


@dataclass(frozen=True)
class Kind:
    """A kind of file: where it lies, and how it is read to a value that can be compared."""

    file: Path
    read: Callable[[], Any]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Weights as plain values."""
    return {name: value.tolist() for name, value in model.state_dict().items()}


def write_kinds(folder: Path) -> dict[str, Kind]:
    """A file of every kind, whole."""
    images = torch.zeros(1, *SHAPE)
    dense = build_backbone("cifar_convnet", **ARGUMENTS, widths=[4, 6])
    arguments = {**ARGUMENTS, "widths": [4, 6]}
    scores = {
        name: torch.arange(len(module.weight)).double()
        for name, module in dense.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    plan = lit_prune.make_plan(dense, scores, images, keep=0.6, allocation="uniform")
    small = lit_prune.apply_plan(dense, plan, images).eval()
    details = {"backbone": "cifar_convnet", "arguments": arguments, "input_shape": SHAPE, "plans": [plan]}
    compact, checkpoint, trace = folder / "compact", folder / "last.ckpt", folder / "epoch=001.parquet"
    lit_prune.save_compact(compact, small, **details)
    plan.save(folder / "plan.json")
    saved = {"backbone": "cifar_convnet", "arguments": arguments, "plans": [plan.to_dict()], "phase_start": 0}
    weights = {f"backbone.{name}": value for name, value in small.state_dict().items()}
    torch.save({"state_dict": weights, "lit_prune_structure": saved, "epoch": 1}, checkpoint)
    write_parquet(trace, pd.DataFrame({"layer": ["a"] * 40, "channel": range(40), "value": torch.rand(40).numpy()}))
    return {
        "structure.json": Kind(compact / "structure.json", lambda: state_of(lit_prune.load_compact(compact))),
        "model.safetensors": Kind(compact / "model.safetensors", lambda: state_of(lit_prune.load_compact(compact))),
        "plan.json": Kind(folder / "plan.json", lambda: lit_prune.Plan.load(folder / "plan.json").to_dict()),
        "last.ckpt": Kind(checkpoint, lambda: state_of(load_network(checkpoint, SHAPE))),
        "trace.parquet": Kind(trace, lambda: read_parquet(trace).to_dict("list")),
    }


def mutants(content: bytes, count: int, draw: random.Random) -> Iterator[bytes]:
    """Copies of `content` with a bit flipped, a byte set, a piece cut out, doubled or overwritten, or no end."""
    while count:
        mutant = bytearray(content)
        place, length = draw.randrange(len(mutant)), draw.choice((1, 2, 8, 64))
        way = draw.choice(("flip", "flip", "flip", "set", "cut", "double", "noise", "truncate"))
        if way == "flip":
            mutant[place] ^= 1 << draw.randrange(8)
        elif way == "set":
            mutant[place] = draw.randrange(256)
        elif way == "cut":
            del mutant[place : place + length]
        elif way == "double":
            mutant[place:place] = mutant[place : place + length]
        elif way == "noise":
            mutant[place : place + length] = draw.randbytes(len(mutant[place : place + length]))
        else:
            del mutant[place:]
        if bytes(mutant) != content:
            count -= 1
            yield bytes(mutant)


def read_mutant(kind: Kind, expected: Any) -> str:
    """What reading the file does."""
    try:
        return "same" if kind.read() == expected else "silent"
    except InputError as error:
        return "refused" if "\n" not in str(error) else f"crash: several lines: {str(error)[:60]!r}"
    except Exception as error:
        return f"crash: {type(error).__name__}: {str(error)[:60]!r}"


def fuzz(mutants_each: int, seed: int) -> dict[str, Counter]:
    """Outcomes by kind of file."""
    found: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in write_kinds(Path(folder)).items():
            content, expected = kind.file.read_bytes(), kind.read()
            found[name] = Counter()
            for mutant in mutants(content, mutants_each, random.Random(f"{seed} {name}")):
                kind.file.write_bytes(mutant)
                found[name][read_mutant(kind, expected)] += 1
            kind.file.write_bytes(content)
    return found


def main() -> None:
    """Prints the table and every crash."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    began = time.perf_counter()
    found = fuzz(asked.mutants // 5, asked.seed)
    print(f"{'file':20}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES))
    for name, counts in found.items():
        grouped = Counter({outcome: 0 for outcome in OUTCOMES})
        for outcome, count in counts.items():
            grouped[outcome.partition(":")[0]] += count
        print(f"{name:20}" + "".join(f"{grouped[outcome]:10}" for outcome in OUTCOMES))
    for name, counts in found.items():
        for outcome, count in counts.items():
            if outcome.startswith("crash"):
                print(f"{name}: {count} x {outcome}")
    print(f"{sum(map(Counter.total, found.values()))} mutants, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
