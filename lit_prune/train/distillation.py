"""Staged distillation from the dense teacher, as a term of the training loss."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.train.loss import TrainingStep


@dataclass(frozen=True)
class Repair:
    """How a network is taught by its dense teacher after surgery.

    Args:
        alpha: final weight of the logit term.
        beta: final weight of the feature term.
        ramp: raise both weights linearly from 0 over the phase; off: full weight from the first epoch.
        form: `cosine` compares the direction of the logits, `kl` is the temperature-scaled divergence.
        temperature: of the `kl` form.
        gradient_clip: largest gradient norm while repairing; None leaves clipping to the trainer.
    """

    alpha: float = 0.1
    beta: float = 0.1
    ramp: bool = True
    form: Literal["cosine", "kl"] = "cosine"
    temperature: float = 4.0
    gradient_clip: float | None = 1.0

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            InputError: a negative weight, or a temperature that is not positive.
        """
        if self.alpha < 0 or self.beta < 0:
            raise InputError(f"repair weights must be >= 0, got alpha={self.alpha}, beta={self.beta}")
        if self.temperature <= 0:
            raise InputError(f"repair temperature must be > 0, got temperature={self.temperature}")

    def weights(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Weights `(alpha_t, beta_t)` in epoch t = `epoch` + 1 of a phase of T = `epochs`.

        `alpha_t = alpha * (t - 1) / (T - 1)`, likewise beta: the first epoch is plain cross-entropy. A phase of one
        epoch cannot ramp and uses the full weights.

        Source: m2m_dc section 3.4.
        """
        share = min(1.0, epoch / (epochs - 1)) if self.ramp and epochs > 1 else 1.0
        return self.alpha * share, self.beta * share

    def to_dict(self) -> dict[str, Any]:
        """Fields as plain values, for the run's record."""
        return asdict(self)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over samples of `1 - cos(student, teacher)`; both [B, ...], flattened per sample. Range [0, 2]."""
    return 1 - F.cosine_similarity(student.flatten(1).float(), teacher.flatten(1).float(), dim=1).mean()


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T² · KL(softmax(teacher / T) ‖ softmax(student / T))` in nats, mean over samples; logits [B, K]."""
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


class FeatureTap:
    """Keeps the latest input of one module: the penultimate features, when the module is the classifier head."""

    def __init__(self, module: nn.Module) -> None:
        self.features: Tensor | None = None
        self._handle = module.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.features = args[0]

    def take(self) -> Tensor:
        """Returns the features of the last forward pass and forgets them."""
        if self.features is None:
            raise RuntimeError("the classifier head was not called in the last forward pass")
        features, self.features = self.features, None
        return features

    def remove(self) -> None:
        """Takes the hook off."""
        self._handle.remove()


class Distillation:
    """Loss term `alpha_t · d(z_s, z_t) + beta_t · (1 - cos(φ_s, φ_t))`.

    z are logits, φ the inputs of the classifier head; d is the cosine distance or the temperature divergence. The
    teacher is no submodule of the student: it is in no optimizer, no checkpoint and no DDP bucket.

    Args:
        repair: weights, ramp and form.
        student: network being trained; a hook on its head reads φ_s until `remove`.
        teacher: dense network; put in eval mode, its gradients are off.
        head: qualified name of the classifier head, the same in both.
        columns: teacher features at the student's kept positions; None when the widths are equal.

    Source: m2m_dc section 3.4; unequal widths: the kept index set.
    """

    def __init__(
        self, repair: Repair, student: nn.Module, teacher: nn.Module, head: str, columns: Sequence[int] | None = None
    ) -> None:
        self.repair = repair
        self.teacher = teacher.eval().requires_grad_(False)
        device = next(teacher.parameters()).device  # a copy in every step would make it wait
        self.columns = None if columns is None else torch.tensor(columns, dtype=torch.long, device=device)
        self._student_tap = FeatureTap(student.get_submodule(head))
        self._teacher_tap = FeatureTap(teacher.get_submodule(head))

    def __call__(self, step: TrainingStep) -> Tensor:
        """Value of the term for one batch, a scalar; the teacher runs only where a weight is not 0."""
        alpha, beta = self.repair.weights(step.phase_epoch, step.phase_epochs)
        features = self._student_tap.take()
        if alpha == beta == 0:
            return step.logits.new_zeros(())
        with torch.no_grad():
            target = self.teacher(step.images)
        wanted = self._teacher_tap.take()
        value = alpha * self._compare(step.logits, target)
        if not beta:
            return value
        if self.columns is not None:
            wanted = wanted[..., self.columns]
        return value + beta * cosine_distance(features, wanted)

    def _compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.repair.form == "kl":
            return divergence(student, teacher, self.repair.temperature)
        return cosine_distance(student, teacher)

    def remove(self) -> None:
        """Takes both hooks off."""
        self._student_tap.remove()
        self._teacher_tap.remove()
