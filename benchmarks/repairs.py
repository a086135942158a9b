"""Residual planes by several scores, and what distillation adds to cross-entropy at equal epochs.

    python benchmarks/repairs.py NETWORK SAMPLES --out FILE.jsonl [--seeds 0 1 2] [--epochs 2] [--keep 0.5]

NETWORK is one of `compression_cases.CASES` with residual planes, SAMPLES the folder that it reads. Each score removes
the same share of every stage's planes until `--keep` of the multiply-adds is left, norms are measured again on 50
batches of training images, moved and mirrored, and the network is trained on `--images` training images: Adam 1e-4,
batches of 128, gradient norm at most 1. Repairs: `cross_entropy`; beside it `cosine` (of logits and of features at the
kept planes, 0.1 each) and `divergence` (of outputs softened by 4, weight 1), their weights full from the first epoch;
`cosine_ramp`, the paper's, and `divergence_ramp`: the same with weights that rise from 0 over the epochs. A seed draws
the order, the moves and the calibration images.
One JSON line a cell and epoch (0: nothing trained); cells that FILE has are not run again. At the end the means over
seeds, and the paired differences from `cross_entropy` and from the first score.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from compression_cases import CASES, Bench, moved, split
from torch import Tensor, nn

from lit_prune import recalibrate_batchnorm
from lit_prune.structure import apply_plan, kept_columns
from lit_prune.structure.networks import fingerprint
from lit_prune.train.distillation import Repair, cosine_distance, divergence, last_layer
from lit_prune.train.evaluation import evaluate
from lit_prune.train.stage_plans import Probe, dense_costs, plan_channel_stage
from lit_prune.train.stages import ChannelStage

SCORES = ("proxy", "conditional_information", "magnitude")
SHORT = ("cross_entropy", "cosine", "divergence")
REPAIRS = {
    "cross_entropy": Repair(alpha=0, beta=0),
    "cosine": Repair(ramp=False),
    "divergence": Repair(alpha=1, beta=0, form="kl", ramp=False),
    "cosine_ramp": Repair(),
    "divergence_ramp": Repair(alpha=1, beta=0, form="kl"),
}
BATCH, RECALIBRATION, CALIBRATION = 128, 50, 2000


@dataclass
class Taught:
    """A student, its teacher, and what both of their last layers read.

    Attributes:
        student: in training.
        teacher: the whole network.
        columns: the teacher's features at the student's kept planes.
    """

    student: nn.Module
    teacher: nn.Module
    columns: list[int]

    def __post_init__(self) -> None:
        """Keeps the inputs of the last layers."""
        self.read: dict[str, Tensor] = {}
        name = last_layer(self.teacher)
        for side in ("student", "teacher"):
            layer = getattr(self, side).get_submodule(name)
            layer.register_forward_pre_hook(lambda _, args, side=side: self.read.update({side: args[0]}))

    def loss(self, images: Tensor, labels: Tensor, repair: Repair, weights: tuple[float, float]) -> Tensor:
        """The loss of one batch; `weights` of outputs and of features in this epoch."""
        logits, (alpha, beta) = self.student(images), weights
        loss = F.cross_entropy(logits, labels)
        if alpha == beta == 0:
            return loss
        with torch.no_grad():
            wanted = self.teacher(images)
        if repair.form == "kl":
            return loss + alpha * divergence(logits, wanted, repair.temperature)
        features = cosine_distance(self.read["student"], self.read["teacher"][:, self.columns])
        return loss + alpha * cosine_distance(logits, wanted) + beta * features


def training(bench: Bench, images: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch; a function of seed and epoch alone."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    order = torch.randperm(min(images, len(bench.train[1])), generator=generator)
    for x, y in split(bench.train, BATCH, order):
        if len(y) == BATCH:
            yield moved(x, generator), y


def cell(bench: Bench, score: str, repairs: list[str], seed: int, arguments: argparse.Namespace) -> Iterator[dict]:
    """The lines of one cut: after recalibration, and of each repair after each epoch."""
    example = bench.test[0][:1]
    order = torch.randperm(len(bench.train[1]), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    stage = ChannelStage(arguments.keep, part="planes", score=score, allocation="uniform", replace="delete")
    calibration = split(bench.train, 250, order)
    plan = plan_channel_stage(bench.model, stage, calibration, dense_costs(bench.model, example), Probe(example))
    cut = apply_plan(bench.model, plan, example)
    recalibrate_batchnorm(cut, training(bench, BATCH * RECALIBRATION, seed, 999))
    said = {"score": score, "seed": seed, "keep": arguments.keep, "network": fingerprint(bench.model, {})[:12]}
    test = [tuple(part[: arguments.test] for part in bench.test)]
    test = split(test[0], 250)
    yield said | {"repair": "none", "epoch": 0, "accuracy": evaluate(cut, test).figure}
    columns = kept_columns(bench.model, (plan,), last_layer(bench.model), example)
    for repair in repairs:
        taught = Taught(copy.deepcopy(cut).to(memory_format=torch.channels_last), copy.deepcopy(bench.model), columns)
        optimizer = torch.optim.Adam(taught.student.parameters(), lr=1e-4)
        for epoch in range(arguments.epochs):
            taught.student.train()
            weights = REPAIRS[repair].weights(epoch, arguments.epochs)
            for images, labels in training(bench, arguments.images, seed, epoch):
                loss = taught.loss(images, labels, REPAIRS[repair], weights)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(taught.student.parameters(), 1.0)
                optimizer.step()
            found = evaluate(taught.student.eval(), test).figure
            yield said | {"repair": repair, "epoch": epoch + 1, "accuracy": found}


def tables(lines: pd.DataFrame) -> Iterator[str]:
    """Means over seeds, and paired differences from `cross_entropy` and from the first score, in points."""
    percent = lines.assign(accuracy=100 * lines["accuracy"])
    yield percent.groupby(["epoch", "score", "repair"])["accuracy"].agg(["mean", "std", "count"]).round(2).to_string()
    for column, base in (("repair", "cross_entropy"), ("score", SCORES[0])):
        wide = percent.pivot_table("accuracy", [c for c in ("epoch", "seed", "score", "repair") if c != column], column)
        if base in wide and len(wide.columns) > 1:
            gaps = wide.drop(columns=base).sub(wide[base], axis=0).dropna(how="all")
            yield f"minus {base}:\n" + gaps.groupby("epoch").agg(["mean", "std", "count"]).round(2).to_string()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=CASES)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--scores", nargs="+", default=SCORES)
    parser.add_argument("--repairs", nargs="+", default=SHORT, choices=REPAIRS, help="of the first score's cut")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--test", type=int, default=2000)
    return parser.parse_args()


def main() -> None:
    """Runs the cells that are missing and prints the tables."""
    arguments = parse()
    bench = CASES[arguments.network](arguments.samples)
    for seed in arguments.seeds:
        for place, score in enumerate(arguments.scores):
            known = arguments.out.read_text().splitlines() if arguments.out.exists() else []
            done = [json.loads(line) for line in known]
            last = {
                row["repair"]
                for row in done
                if (row["score"], row["seed"], row["epoch"]) == (score, seed, arguments.epochs)
            }
            repairs = [name for name in (arguments.repairs if not place else ["cosine"]) if name not in last]
            for row in cell(bench, score, repairs, seed, arguments) if repairs else ():
                print(row, flush=True)
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    lines = pd.DataFrame([json.loads(line) for line in arguments.out.read_text().splitlines()])
    print(*tables(lines.drop_duplicates(["score", "repair", "seed", "epoch"])), sep="\n\n")


if __name__ == "__main__":
    main()
