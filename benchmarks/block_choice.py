"""Accuracy after every choice of one and of two residual blocks, beside the choice of least label information.

    python benchmarks/block_choice.py NETWORK SAMPLES [--removed 1 2] [--probe 1500] [--recalibrate 512] [--test 1000]

NETWORK is one of `compression_cases.CASES` with residual blocks, SAMPLES the folder that it reads. Norms are measured
again on the first training images, moved and mirrored; nothing is trained. Label information is that of the first
`--probe` training images. Prints a line a choice, then for each number of blocks: the accuracy and the rank of the
choice by information, the mean over all choices (random), the choice of the last blocks, the best; and the Spearman
correlation of the information (its sum) with the accuracy lost. One standard error of an accuracy p on n images is
√(p(1-p)/n).
"""

import argparse
import copy
import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from compression_cases import CASES, Bench, moved, split
from scipy.stats import spearmanr

from lit_prune import recalibrate_batchnorm
from lit_prune.measurement.labels import block_information
from lit_prune.models import Block, find_blocks
from lit_prune.structure import Plan, apply_plan
from lit_prune.train.evaluation import evaluate


@dataclass(frozen=True)
class Choice:
    """Blocks that go together.

    Attributes:
        names: of the blocks.
        information: their label information, nats, summed.
        accuracy: without them, norms measured again.
    """

    names: tuple[str, ...]
    information: float
    accuracy: float


class Trial:
    """Networks without some blocks.

    Args:
        bench: the network and its images.
        recalibrate: training images that norms are measured on again.
        test: test images.
    """

    def __init__(self, bench: Bench, recalibrate: int, test: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.bench, self.example = bench, bench.test[0][:1]
        self.images = [(moved(x, generator), y) for x, y in split(first(bench.train, recalibrate), 128)]
        self.test = split(first(bench.test, test), 250)

    def __call__(self, names: tuple[str, ...]) -> float:
        """Accuracy without these blocks."""
        dense, plan = self.bench.model, Plan(drop_blocks=names, keep_channels={}, sizes={})
        model = apply_plan(dense, plan, self.example) if names else copy.deepcopy(dense)
        recalibrate_batchnorm(model, self.images, limit=len(self.images))
        return evaluate(model, self.test).figure


def first(part: tuple, count: int) -> tuple:
    """The first samples of a part."""
    return tuple(values[:count] for values in part)


def possible(blocks: tuple[Block, ...], count: int) -> list[tuple[str, ...]]:
    """All choices of `count` free blocks that leave one in each stage, in the order of the network."""
    stages = {stage: sum(block.stage == stage for block in blocks) for stage in {block.stage for block in blocks}}
    free = [block for block in blocks if not block.protected]
    return [
        tuple(block.name for block in chosen)
        for chosen in combinations(free, count)
        if all(stages[stage] > sum(block.stage == stage for block in chosen) for stage in stages)
    ]


def summary(choices: list[Choice]) -> str:
    """One row: by information, its rank, the mean, the last blocks, the best, the correlation."""
    ranked = sorted(choices, key=lambda choice: -choice.accuracy)
    informed = min(choices, key=lambda choice: choice.information)
    lost = [-choice.accuracy for choice in choices]
    rho = spearmanr([choice.information for choice in choices], lost).statistic
    mean = sum(choice.accuracy for choice in choices) / len(choices)
    parts = [f"{choice.accuracy:.1%} ({', '.join(choice.names)})" for choice in (informed, choices[-1], ranked[0])]
    place, last = (ranked.index(choice) + 1 for choice in (informed, choices[-1]))
    cells = (
        len(informed.names),
        parts[0],
        f"{place} of {len(choices)}",
        f"{mean:.1%}",
        f"{parts[1]}, {last}",
        parts[2],
    )
    return f"| {' | '.join(map(str, cells))} | {rho:.2f} |"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=CASES)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--removed", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--probe", type=int, default=1500)
    parser.add_argument("--recalibrate", type=int, default=512)
    parser.add_argument("--test", type=int, default=1000)
    return parser.parse_args()


def main() -> None:
    """Tries all choices and prints them."""
    arguments, start = parse(), time.perf_counter()
    bench = CASES[arguments.network](arguments.samples)
    trial = Trial(bench, arguments.recalibrate, arguments.test)
    blocks = find_blocks(bench.model, trial.example)
    information = block_information(bench.model, blocks, split(first(bench.train, arguments.probe), 125))
    print(f"whole network, norms measured again: {trial(()):.1%}")
    for block in blocks:
        print(f"{block.name}: {information[block.name]:.4f} nats{', protected' if block.protected else ''}")
    rows = []
    for count in arguments.removed:
        choices = []
        for names in possible(blocks, count):
            choices.append(Choice(names, sum(information[name] for name in names), trial(names)))
            print(f"{', '.join(names)}: {choices[-1].accuracy:.1%}", flush=True)
        rows.append(summary(choices))
    print("| removed | by information | its rank | random | last, its rank | best | Spearman |")
    print("\n".join(("| --- | --- | --- | --- | --- | --- | --- |", *rows)))
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
