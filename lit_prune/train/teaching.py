"""Who teaches a run after surgery: the dense network, put into the module's loss and taken out again."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lit_prune.errors import InputError
from lit_prune.structure import Plan, kept_columns, load_compact
from lit_prune.task.detection import reads_proposals
from lit_prune.train.added_loss import AddedLoss, add_term, drop_term
from lit_prune.train.distillation import Distillation, Repair, input_width, last_layer
from lit_prune.train.locate import find_path, network_at
from lit_prune.train.own_forward import release

TERM = "distillation"


@dataclass(frozen=True)
class Lesson:
    """What a student is taught by.

    Attributes:
        student: the network in training.
        teacher: the network to learn from, on the student's device.
        plans: from the teacher to the student; None where the teacher is somebody else's.
        example: what the networks are called with.
        progress: epochs since the phase began, and its length.
    """

    student: nn.Module
    teacher: nn.Module
    plans: tuple[Plan, ...] | None
    example: Any
    progress: Callable[[], tuple[int, int]]


class Teaching:
    """The distillation term in the loss of a LightningModule, for as long as a phase lasts.

    Attributes:
        layer: whose inputs are compared as features; None where none are.
        reason: why no features are compared, or "".

    Args:
        repair: weights and form of the term.
        given: folder of a saved network (`save_compact`) to learn from; None: the run's own dense one.
    """

    def __init__(self, repair: Repair, given: Path | None = None) -> None:
        self.repair, self.given = repair, given
        self.layer: str | None = None
        self.reason = ""
        self._term: Distillation | None = None
        self._added = AddedLoss()

    @property
    def wanted(self) -> bool:
        """Whether a weight is not 0."""
        return bool(self.repair.alpha or self.repair.beta)

    def load_given(self) -> nn.Module | None:
        """The network of the folder that was given, or None where none was. InputError: it is not there."""
        if self.given is None:
            return None
        if not self.given.is_dir():
            raise InputError(f"teacher missing: {self.given} is no folder; give one that save_compact wrote")
        return load_compact(self.given)

    def begin(self, module: LightningModule, lesson: Lesson) -> None:
        """Puts the term into the module's loss; nothing where both weights are 0.

        Raises:
            InputError: somebody else's teacher with other features, where features are to be compared.
        """
        if not self.wanted:
            return
        if not lesson.student.training:
            rank_zero_warn(
                "the network was given in evaluation mode and Lightning leaves it there: its norms and dropout stay as "
                "they are while it is repaired; call train() on it before fit where that is not meant"
            )
        columns = self._find_features(lesson)
        self._term = Distillation(self.repair, lesson.student, lesson.teacher, lesson.progress, self.layer, columns)
        self._added = add_term(module, TERM, self._term)

    def _find_features(self, lesson: Lesson) -> list[int] | None:
        """Finds the layer whose inputs can be compared, and the teacher's columns that the student still has."""
        self.layer, self.reason = None, "repair beta is 0"
        if not self.repair.beta:
            return None
        name = last_layer(lesson.teacher)
        if reads_proposals(name):
            self.reason = f"the inputs of {name} are proposals, of which the two networks make different ones"
            return None
        width = input_width(lesson.teacher, name)
        try:
            if lesson.plans is None:
                columns = list(range(width))
            else:
                columns = kept_columns(lesson.teacher, lesson.plans, name, lesson.example)
            found = input_width(lesson.student, name)
        except (InputError, AttributeError) as error:
            self.reason = f"the inputs of {name} cannot be followed ({error})"
            return None
        if len(columns) != found:
            if lesson.plans is None:
                raise InputError(f"teacher {self.given} has other features than the student; set repair beta to 0")
            self.reason = f"{name} reads {found} channels, the plans leave {len(columns)}"
            return None
        self.layer, self.reason = name, ""
        return None if len(columns) == width else columns

    def describe(self) -> dict[str, Any]:
        """What the student is compared at, and how often it was so far: plain values."""
        if not self.wanted:
            return {"evaluations": 0, "features": None, "reason": "both weights are 0"}
        return {"evaluations": 0, "features": self.layer, "reason": self.reason}

    def begin_epoch(self, module: LightningModule) -> None:
        """An epoch of the phase begins."""
        if self._term is not None:
            self._added.begin_epoch()
            self._term.forget()
            self._term.evaluations = 0

    def end_epoch(self, module: LightningModule, record: dict[str, Any]) -> None:
        """Logs the epoch's mean and adds the evaluations to the record of the stage.

        Raises:
            InputError: no step of the epoch took the term.
        """
        if self._term is None:
            return
        if self._added.steps and not self._added.evaluations.get(TERM):
            step = f"training_step of {type(module).__name__}"
            if module.automatic_optimization:
                raise InputError(f"distillation: {step} returned None in every step of the epoch; return the loss")
            raise InputError(
                f"distillation: {step} took no term in the whole epoch; with manual optimization add "
                "lit_prune.added_loss(self) to its loss, or set the weights of repair to 0"
            )
        record["distillation"]["evaluations"] += self._term.evaluations
        mean = self._added.mean(TERM)
        if mean is not None:
            module.log(f"train/{TERM}", mean, sync_dist=True)

    def end(self, module: LightningModule) -> None:
        """Takes the term out of the loss again."""
        if self._term is not None:
            self._term.remove()
            self._term = None
            drop_term(module, TERM)


class Tutor(Callback):
    """Teaches the network of any LightningModule by another one through a whole `fit`.

    Hooks: `on_fit_start` adds the term, `on_train_epoch_start` and `on_train_epoch_end` keep its mean (logged as
    `train/distillation`), `teardown` takes it out. Nothing is kept in the callback's state. Strategies: one device and
    DDP.

    Args:
        repair: weights and form of the term; features are compared where the last layers read equally many channels.
        teacher: the network to learn from.
    """

    def __init__(self, repair: Repair, teacher: nn.Module) -> None:
        self.teacher = teacher
        self.teaching = Teaching(repair)
        self.record = {TERM: {"evaluations": 0}}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the term to the loss."""
        student = network_at(pl_module, find_path(pl_module))
        teacher = self.teacher.to(next(student.parameters()).device)
        lesson = Lesson(student, teacher, None, None, lambda: (trainer.current_epoch, trainer.max_epochs or 1))
        self.teaching.begin(pl_module, lesson)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the sums of the epoch before."""
        self.teaching.begin_epoch(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the epoch's mean."""
        self.teaching.end_epoch(pl_module, self.record)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the loss as it was."""
        self.teaching.end(pl_module)
        release(pl_module)
