"""The sensitivity table: the task's figure of a network with one group of channels cut to several widths."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import nn

from lit_prune.arguments import check_seeds
from lit_prune.errors import InputError
from lit_prune.lab.judging import Judge
from lit_prune.progress import Watch, unwatched
from lit_prune.replace import Replacement, replace_mechanisms
from lit_prune.replace.replacement import take_batches
from lit_prune.scores import Evidence, find_score, plan_method
from lit_prune.structure import Budget, CostModel, Group, Plan, apply_plan, cost
from lit_prune.task import Task, settle


@dataclass(frozen=True)
class Asked:
    """What is cut, and how it is judged.

    Attributes:
        keep: shares of a group's units that stay, each in (0, 1).
        score: which units of a group go first.
        refit: whether to judge each cut again with the readers solved anew.
        groups: names of groups; None takes all that may be pruned.
        images: calibration and evaluation samples at the most, of each.
        seed: of all that is drawn.
    """

    keep: tuple[float, ...] = (0.75, 0.5, 0.25)
    score: str = "magnitude"
    refit: bool = True
    groups: tuple[str, ...] | None = None
    images: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values. InputError: a share outside (0, 1), an unknown score, no images."""
        if not self.keep or not all(0 < share < 1 for share in self.keep):
            raise InputError(f"keep={list(self.keep)}: give shares in (0, 1)")
        if self.images < 1:
            raise InputError(f"images={self.images} must be at least 1")
        check_seeds(self.seed)
        find_score(self.score)


@dataclass(frozen=True)
class DenseNetwork:
    """The dense network with what all cuts share."""

    model: nn.Module
    evidence: Evidence
    cost_model: CostModel
    calibration: list[Any]
    judge: Judge


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    asked: Asked = Asked(),
    evaluation: Iterable[Any] | None = None,
    task: Task | str | None = None,
    watch: Watch = unwatched,
) -> pd.DataFrame:
    """Cuts one group of channels at a time to each width; nothing is trained, `model` is untouched.

    Args:
        model: any trained network that `trace_groups` can follow.
        batches: calibration samples, for the score and the solved readers.
        asked: widths, score, groups.
        evaluation: samples that the figure is of; None takes the calibration samples.
        task: what a batch and an output mean; None recognises it.
        watch: shows the progress.

    Returns:
        One row a group and width, in forward order: `group`, `layer`, `depth`, `keep`, `kept`, `units`, `macs_ratio`,
        `figure`, `loss`, `agreement`, and with `refit` `figure_refit`, `loss_refit`, `agreement_refit`.

    Raises:
        InputError: no batches, an unknown group, or nothing that may be pruned.
    """
    task, batches = settle(task, model, batches)
    calibration = take_batches(batches, asked.images, task)
    judged = calibration if evaluation is None else take_batches(evaluation, asked.images, task)
    evidence = Evidence(model, calibration, seed=asked.seed, task=task)
    cost_model = CostModel.build(model, evidence.graph, evidence.example)
    subject = DenseNetwork(model, evidence, cost_model, calibration, Judge(model, judged, task))
    groups = _groups(evidence, asked)
    work = [(depth, group, keep) for depth, group in groups for keep in asked.keep]
    rows = [row for item in watch(work, "sensitivity") for row in _rows(subject, asked, *item)]
    if not rows:
        raise InputError("sensitivity: no group is wide enough to lose a unit; give smaller shares in keep")
    return pd.DataFrame(rows)


def _groups(evidence: Evidence, asked: Asked) -> list[tuple[int, Group]]:
    prunable = list(enumerate(evidence.graph.prunable))
    names = {group.name for _, group in prunable}
    unknown = sorted(set(asked.groups or ()) - names)
    if unknown or not prunable:
        known = ", ".join(sorted(names)[:8]) or "none"
        raise InputError(f"groups: {unknown or 'nothing'} may not be pruned here; there are {known}")
    usual = {group.name for _, group in prunable if group.role != "head_width"}
    chosen = usual if asked.groups is None else asked.groups
    return [(depth, group) for depth, group in prunable if group.name in chosen]


def _rows(subject: DenseNetwork, asked: Asked, depth: int, group: Group, keep: float) -> Iterator[dict[str, Any]]:
    request = Budget("channels", keep, "uniform", cap=0.99, only=(group.name,))
    evidence = subject.evidence
    plan = plan_method(evidence, asked.score, evidence.graph, subject.cost_model, request)
    if plan.removes_nothing:
        return
    small = apply_plan(subject.model, plan, evidence.example)
    whole = cost(subject.model, evidence.example).macs
    row = {"group": group.name, "layer": group.members[0].module, "depth": depth, "keep": keep}
    row |= {"kept": len(plan.keep_channels[group.name]), "units": group.size}
    row |= {"macs_ratio": cost(small, evidence.example).macs / whole} | _judged(subject, small)
    yield row | (_refitted(subject, plan) if asked.refit else {})


def _refitted(subject: DenseNetwork, plan: Plan) -> dict[str, float]:
    settings = Replacement(unsupported="delete", scope="consumers")
    example, task = subject.evidence.example, subject.judge.task
    reduced = replace_mechanisms(
        subject.model, plan, subject.calibration, "refit", example, settings=settings, task=task
    )
    return {f"{name}_refit": value for name, value in _judged(subject, reduced.model).items()}


def _judged(subject: DenseNetwork, small: nn.Module) -> dict[str, float]:
    found = subject.judge(small)
    return {name: found[name] for name in ("figure", "loss", "agreement")}
