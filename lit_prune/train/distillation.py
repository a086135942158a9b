"""Staged distillation from the dense teacher, as a term of the training loss."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.task.batches import describe
from lit_prune.task.detection import detector_heads
from lit_prune.task.outputs import shared_outputs, softmax_divergence

FORMS = ("cosine", "kl", "mse")


@checked
@dataclass(frozen=True)
class Repair:
    """How a network is taught by its dense teacher after surgery.

    Args:
        alpha: final weight of the output term.
        beta: final weight of the feature term.
        ramp: raise both weights linearly from 0 over the phase; off: full weight from the first epoch.
        form: of the output term: `cosine` compares directions, `kl` is the temperature-scaled divergence over
            dimension 1 (logits of classes), `mse` the mean square, for outputs whose size matters.
        temperature: of the `kl` form.
        gradient_clip: largest gradient norm in phases with an optimizer of their own (`StagedPruning(optimizer=...)`);
            None leaves clipping to the trainer.
    """

    alpha: float = 0.1
    beta: float = 0.1
    ramp: bool = True
    form: Literal["cosine", "kl", "mse"] = "cosine"
    temperature: float = 4.0
    gradient_clip: float | None = 1.0

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            InputError: a negative weight, a temperature or a gradient norm that is not positive, an unknown form.
        """
        if not (0 <= self.alpha < math.inf and 0 <= self.beta < math.inf):
            raise InputError(f"repair weights must be numbers >= 0, got alpha={self.alpha}, beta={self.beta}")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"repair temperature must be > 0, got temperature={self.temperature}")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise InputError(f"repair gradient_clip must be > 0, or None, got gradient_clip={self.gradient_clip}")
        if self.form not in FORMS:
            raise InputError(f"repair form={self.form!r} is none of {', '.join(FORMS)}")

    def weights(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Weights `(alpha_t, beta_t)` in epoch t = `epoch` + 1 of a phase of T = `epochs`.

        `alpha_t = alpha * (t - 1) / (T - 1)`, likewise beta: the first epoch is the module's own loss. A phase of one
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
    """`T² · KL(softmax(teacher / T) ‖ softmax(student / T))` in nats, mean over samples and positions; [B, K, ...]."""
    return softmax_divergence(teacher.float() / temperature, student.float() / temperature).mean() * temperature**2


def last_layer(network: nn.Module) -> str:
    """Name of the last Linear in module order, else of the last convolution: the head, whose inputs are the features.

    Raises:
        InputError: the network has neither.
    """
    for kinds in (nn.Linear, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        names = [name for name, layer in network.named_modules() if isinstance(layer, kinds)]
        if names:
            return names[-1]
    raise InputError(f"repair: {type(network).__name__} has no Linear or convolution whose inputs could be compared")


def input_width(network: nn.Module, name: str) -> int:
    """Channels that a layer reads."""
    layer = network.get_submodule(name)
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def nothing_shared(student: Any, teacher: Any) -> InputError:
    """The refusal of two outputs that have no tensor in common."""
    return InputError(
        f"distillation: the network answers {describe(student)} in training and its teacher {describe(teacher)}, "
        "with no tensor in common; set alpha=0 and beta=0 in repair"
    )


class Calls:
    """The calls of a network while it trains, what its last layer read and a detector's heads gave; until `remove`.

    Args:
        network: the student, or the teacher.
        layer: name of the layer whose inputs are the features; None keeps none.
        student: keep the calls of the network too, and nothing without gradients.
    """

    def __init__(self, network: nn.Module, layer: str | None, student: bool = True) -> None:
        self.network, self._student = network, student
        self._calls: list[tuple[bool, tuple[tuple, dict, Any]]] = []  # whether it was training, and the call
        self._features: list[tuple[bool, Tensor]] = []
        self._heads: list[Tensor] = []
        self._handles = [head.register_forward_hook(self._keep_head) for head in detector_heads(network)]
        if student:
            self._handles.append(network.register_forward_hook(self._keep_call, with_kwargs=True))
        if layer is not None:
            self._handles.append(network.get_submodule(layer).register_forward_pre_hook(self._keep_features))

    @property
    def _counts(self) -> bool:
        """Whether what runs now is kept."""
        return not self._student or torch.is_grad_enabled()

    def _keep_call(self, network: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._counts:
            self._calls.append((network.training, (args, kwargs, (output, self.take_heads()))))

    def _keep_head(self, head: nn.Module, args: tuple, output: Any) -> None:
        if self._counts:
            self._heads.append(output)

    def take_heads(self) -> list[Any]:
        """What the heads gave since the last time."""
        found, self._heads = self._heads, []
        return found

    def _keep_features(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._counts:
            self._features.append((self.network.training, args[0]))

    def take(self) -> tuple[list[tuple[tuple, dict, Any]], list[Tensor]]:
        """Calls and features since the last time: those in training mode, or all where the network never was in it."""
        trained = any(training for training, _ in self._calls)
        calls = [call for training, call in self._calls if training == trained]
        features = [values for training, values in self._features if training == trained]
        self._calls, self._features = [], []
        return calls, features

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()


class Distillation:
    """Loss term `alpha_t · d(z_s, z_t) + beta_t · (1 - cos(φ_s, φ_t))`, averaged over the step's calls of the network.

    z are the outputs that student and teacher share (by their place in tuples and dicts; a mean over them; of a
    detector what its heads give), φ the inputs of the last layer. The teacher gets the arguments that the student just
    got. It is no submodule of the student: it is in no optimizer, no checkpoint and no DDP bucket.

    Attributes:
        evaluations: steps in which the teacher was asked.

    Args:
        repair: weights, ramp and form.
        student: network being trained; hooks stay on it until `remove`.
        teacher: dense network; put in eval mode, its gradients are off.
        progress: epochs since the phase began, and its length.
        layer: qualified name of the last layer, the same in both; None leaves the features out.
        columns: teacher features at the student's kept positions; None when the widths are equal.

    Source: m2m_dc section 3.4; unequal widths: the kept index set.
    """

    def __init__(
        self,
        repair: Repair,
        student: nn.Module,
        teacher: nn.Module,
        progress: Callable[[], tuple[int, int]],
        layer: str | None = None,
        columns: Sequence[int] | None = None,
    ) -> None:
        self.repair, self.teacher, self.progress = repair, teacher.eval().requires_grad_(False), progress
        device = next(teacher.parameters()).device  # a copy in every step would make it wait
        self.columns = None if columns is None else torch.tensor(columns, dtype=torch.long, device=device)
        self.layer, self.evaluations = layer, 0
        self._student, self._teacher = Calls(student, layer), Calls(teacher, layer, student=False)

    def __call__(self) -> Tensor | None:
        """Value for the step that has just run; the teacher runs only where a weight is not 0.

        Raises:
            InputError: the step did not call the network, or the two have no output to compare.
        """
        alpha, beta = self.repair.weights(*self.progress())
        beta = beta if self.layer is not None else 0.0
        calls, features = self._student.take()
        if not calls:
            raise InputError(
                "distillation: training_step did not call the network with gradients since the last step; name the "
                "submodule that it calls by network=, or set the weights of repair to 0"
            )
        if alpha == beta == 0:
            return next(self._student.network.parameters()).new_zeros(())
        if beta and len(features) != len(calls):
            raise InputError(
                f"distillation: {self.layer} is called {len(features)} times in {len(calls)} calls of the network, so "
                "its inputs cannot be compared; set beta=0 in repair"
            )
        self.evaluations += 1
        terms = []
        for place, (args, kwargs, output) in enumerate(calls):
            with torch.no_grad():
                target = (self.teacher(*args, **kwargs), self._teacher.take_heads())
            wanted = self._teacher.take()[1]
            terms.append(alpha * self._compare(output, target))
            if beta:
                terms[-1] = terms[-1] + beta * self._compare_features(features[place], wanted[0])
        return torch.stack(terms).mean()

    def _compare_features(self, student: Tensor, teacher: Tensor) -> Tensor:
        if len(student) != len(teacher):
            raise InputError(
                f"distillation: {self.layer} reads {len(student)} samples in the network and {len(teacher)} in its "
                "teacher, so they cannot be compared; set beta=0 in repair"
            )
        return cosine_distance(student, teacher if self.columns is None else self._kept(teacher))

    def _kept(self, features: Tensor) -> Tensor:
        """The columns that the student has: the last axis of a linear layer's input, else axis 1."""
        assert self.layer is not None, "features are compared where there is a layer"
        linear = isinstance(self.teacher.get_submodule(self.layer), nn.Linear)
        return features[..., self.columns] if linear else features[:, self.columns]

    def _compare(self, student: tuple[Any, list], teacher: tuple[Any, list]) -> Tensor:
        """Mean distance over the tensors that both answer; of a detector, which answers losses, over its heads'."""
        single = False
        for own, wanted in zip(student, teacher, strict=True):
            pairs = shared_outputs(own, wanted)
            telling = [pair for pair in pairs if self.repair.form == "mse" or pair[0][0].numel() > 1]
            if telling:
                return torch.stack([self._distance(*pair) for pair in telling]).mean()
            single = single or bool(pairs)
        if single:
            raise InputError(
                f"repair form={self.repair.form}: the network's output has one value a sample, which has no direction; "
                "use form=mse"
            )
        raise nothing_shared(student[0], teacher[0])

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.repair.form == "mse":
            return F.mse_loss(student.float(), teacher.float())
        if self.repair.form == "kl":
            return divergence(student, teacher, self.repair.temperature)
        return cosine_distance(student, teacher)

    def forget(self) -> None:
        """Drops what was kept of a step whose loss took no term."""
        self._student.take()

    def remove(self) -> None:
        """Takes all hooks off."""
        self._student.remove()
        self._teacher.remove()
