"""Whether units that go and units that stay should be exchanged after backward elimination.

    python benchmarks/swaps.py NETWORK SAMPLES [--keep 0.5] [--images 1000] [--seed 0]

NETWORK is one of `compression_cases.CASES`. The plan of `compress`; then, in each group, the best exchange of a removed
unit for a kept one, again and again while the error falls (the elimination's own: readers solved again, outputs in the
metric of the prediction). Printed: the error of all groups before and after, units that came back, seconds, and what
both plans give with every layer solved alone.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from compression import RECIPES, Judge
from compression_cases import CASES, split
from torch import Tensor

from lit_prune.compression import Recipe, plan_compression
from lit_prune.replace import replace_mechanisms
from lit_prune.replace.kernels import kernel_of
from lit_prune.replace.reconstruction import RANK, reader_columns, reader_moments, readers_of
from lit_prune.replace.regression import ridged
from lit_prune.structure import Plan, trace_groups
from lit_prune.task import settle

ROUNDS = 200
SMALLEST = 1e-6  # relative fall of the error that is worth an exchange


@dataclass
class Reader:
    """A layer that reads the group.

    Attributes:
        inputs: ridged covariance of what it reads, float64 [D, D].
        read: its weights, transposed, outputs in the metric, [D, O].
        columns: places of each unit, [units, taps].
    """

    inputs: Tensor
    read: Tensor
    columns: Tensor

    def solved(self, kept: Tensor) -> "Solved":
        """With these units alone (bool [units])."""
        there = torch.ones(len(self.inputs), dtype=torch.bool)
        there[self.columns[~kept].flatten()] = False
        places = there.nonzero().flatten()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.inputs[places][:, places]))
        return Solved(self, places, inverse, inverse @ (self.inputs[places] @ self.read))


@dataclass
class Solved:
    """The least-squares solution on some units.

    Attributes:
        reader: of whom.
        places: columns that are there, ascending, [K].
        inverse: of the covariance there, [K, K].
        weight: [K, O].
    """

    reader: Reader
    places: Tensor
    inverse: Tensor
    weight: Tensor

    def error(self) -> float:
        """Distortion that is left."""
        inputs, read = self.reader.inputs, self.reader.read
        return float(((inputs @ read) * read).sum() - ((inputs[self.places] @ read) * self.weight).sum())

    def losses(self, units: Tensor) -> Tensor:
        """Rise of the error without each of `units`, which are there."""
        at = torch.searchsorted(self.places, self.reader.columns[units])
        blocks, weight = self.inverse[at[:, :, None], at[:, None, :]], self.weight[at]
        return torch.linalg.solve(blocks, weight @ weight.mT).diagonal(dim1=1, dim2=2).sum(1)


def exchanged(readers: list[Reader], kept: Tensor) -> tuple[Tensor, float, float]:
    """The units that stay after all exchanges that help, and the error before and after."""
    first = last = sum(reader.solved(kept).error() for reader in readers)
    for _ in range(ROUNDS):
        tried = [exchange(readers, kept, int(unit)) for unit in (~kept).nonzero()]
        if not tried or min(tried)[0] > last * (1 - SMALLEST):
            break
        last, unit, out = min(tried)
        kept = kept.clone()
        kept[unit], kept[out] = True, False
    return kept, first, last


def exchange(readers: list[Reader], kept: Tensor, unit: int) -> tuple[float, int, int]:
    """The error with `unit` back and another one gone, `unit`, and that one: the best of all for `unit`."""
    grown = kept.clone()
    grown[unit] = True
    larger = [reader.solved(grown) for reader in readers]
    there = kept.nonzero().flatten()
    losses = sum(one.losses(there) for one in larger)
    return sum(one.error() for one in larger) + float(losses.min()), unit, int(there[losses.argmin()])


def group_readers(model, group, moments) -> list[Reader]:
    """All readers of a group whose moments are known."""
    found = []
    for name, columns in reader_columns(model, group, moments).items():
        values, vectors = torch.linalg.eigh(moments[name].metric)
        seen = values > RANK * values[-1]
        read = (vectors[:, seen] * values[seen].sqrt()).T @ kernel_of(model.get_submodule(name)).double().flatten(1)
        inputs = ridged(moments[name].covariance.inputs, moments[name].ridge, read.square().sum(0))
        found.append(Reader(inputs, read.T, columns))
    return found


def exchange_all(model, graph, plan: Plan, moments) -> Plan:
    """The plan after all exchanges; prints what they did."""
    start, keep, before, after, changed = time.perf_counter(), dict(plan.keep_channels), 0.0, 0.0, 0
    for group in graph.groups:
        readers = group_readers(model, group, moments)
        if not plan.removed(group.name) or not readers:
            continue
        kept = torch.zeros(group.size, dtype=torch.bool)
        kept[list(keep[group.name])] = True
        found, first, last = exchanged(readers, kept)
        before, after, changed = before + first, after + last, changed + int((found & ~kept).sum())
        keep[group.name] = tuple(found.nonzero().flatten().tolist())
    total = sum(map(len, plan.removals.values()))
    seconds = time.perf_counter() - start
    print(
        f"error {before:.5g} -> {after:.5g}; {changed} of {total} removed units came back; {seconds:.0f} s", flush=True
    )
    return replace(plan, keep_channels=keep)


def main() -> None:
    """One network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=CASES)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--answers", type=Path, default=Path("answers"), help="file of the dense network's answers")
    given = parser.parse_args()
    bench = CASES[given.network](given.samples)
    order = torch.randperm(len(bench.train[1]), generator=torch.Generator().manual_seed(given.seed))[: given.images]
    task, batches = settle(bench.task, bench.model, split(bench.train, bench.batch, order))
    graph, recipe = trace_groups(bench.model, bench.test[0][:1]), Recipe(seed=given.seed)
    plan = plan_compression(bench.model, batches, recipe.budget("macs", given.keep), task, recipe)
    moments = reader_moments(bench.model, readers_of(bench.model, graph), batches, task, given.seed)
    plans = {"elimination": plan, "exchanged": exchange_all(bench.model, graph, plan, moments)}
    judge = Judge(bench, given.answers)
    for name, one in plans.items():
        settings = RECIPES["+ trunk"].replacement
        reduced = replace_mechanisms(
            bench.model, one, batches, "refit", bench.test[0][:1], settings=settings, task=task
        )
        found = judge(reduced.model)
        print(name, {key: round(value, 4) for key, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()
