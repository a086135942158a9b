"""What `reduce` is asked for: where, how much, by which methods, how verified."""

import math
from dataclasses import dataclass, field
from typing import Literal

from lit_prune.arguments import check_seeds
from lit_prune.errors import InputError
from lit_prune.replace import Replacement, Swaps, find_stand_in
from lit_prune.train.distillation import Repair

Extra = Literal["stress", "curvature"]


@dataclass(frozen=True)
class ReduceMethod:
    """A way to reduce: which units go, and what stands in for them.

    Attributes:
        score: a name of `lit_prune.scores.SCORES`; for attention heads see `lit_prune.replace.heads.HEAD_SCORES`.
        kind: what stands in, a name of `lit_prune.replace.STAND_INS` or `package.module:Class`.
        objective: of constants and affine stand-ins: "distortion", "curvature", "loss" or "joint_loss" (see
            `Replacement`).
        parents: affine: kept units that stand in for a removed one; None: all.
        parent_rule: affine: "pearson", "weighted_pearson" or "random".
        ridge: affine and refit: relative ridge; None: 1e-6, or chosen on held-out images (refit).
        curvature: "gauss_newton" or "hutchinson"; at the classifier head the curvature is exact either way.
        steps: scores are computed again after each of so many equal steps down to the width asked for.
        name: in tables; empty: made of the fields.
    """

    score: str = "cmr_logit"
    kind: str = "constant"
    objective: Literal["distortion", "curvature", "loss", "joint_loss"] = "distortion"
    parents: int | None = 16
    parent_rule: Literal["pearson", "weighted_pearson", "random"] = "pearson"
    ridge: float | None = None
    curvature: Literal["gauss_newton", "hutchinson"] = "gauss_newton"
    steps: int = 1
    name: str = ""

    def __post_init__(self) -> None:
        """Checks the values. InputError: one is outside its range."""
        if self.steps < 1:
            raise InputError(f"method {self.score}: steps={self.steps} must be at least 1")
        find_stand_in(self.kind).check(self.settings(0))

    @property
    def label(self) -> str:
        """Name in tables."""
        if self.name:
            return self.name
        words = [self.score] + ([self.kind] if self.kind != "constant" else [])
        if self.objective != "distortion":
            words.append(f"by {self.objective.replace('_', ' ')}")
        if self.kind == "affine":
            words.append(f"r={'all' if self.parents is None else self.parents}")
            words += [self.parent_rule] if self.parent_rule != "pearson" else []
        if self.ridge is not None:
            words.append(f"ridge={self.ridge:g}")
        words += [self.curvature] if self.curvature != "gauss_newton" else []
        words += [f"{self.steps} steps"] if self.steps > 1 else []
        return " ".join(words)

    def settings(self, seed: int) -> Replacement:
        """Settings of the replacement."""
        return Replacement(
            ridge="held_out" if self.ridge is None else self.ridge,
            parents=self.parents,
            parent_rule=self.parent_rule,
            objective=self.objective,
            curvature=self.curvature,
            seed=seed,
        )


@dataclass(frozen=True)
class ReduceRequest:
    """One layer, several methods and widths, several seeds.

    Attributes:
        layer: a group of channels (by the layer that produces it), the classifier or another linear layer (its inputs),
            or an attention module of timm (its heads); None: the inputs of the classifier.
        kept: what stays of the layer: shares below 1, or numbers of units.
        methods: how. The first is the one that the others are compared with.
        seeds: of networks (where `reduce` trains them), calibration draws, swaps, random scores.
        calibration_sizes: numbers of calibration images, at most those of the data module.
        calibration_classes: only images of these classes; None: all.
        swaps: interchange interventions on test images; its seed is added to each seed.
        extras: "stress" (kept sets after function-preserving rescaling), "curvature" (off-diagonal ratio, remainder
            bound).
        stress_draws: rescalings a seed and range.
        repair_epochs: epochs of training after the compilation; 0: none.
        repair: distillation from the original network while repairing; None: cross-entropy alone.
        test_images: most test images for accuracies; None: all.

    Raises:
        InputError: a value outside its range.
    """

    layer: str | None = None
    kept: tuple[float, ...] = (0.75, 0.5, 0.25)
    methods: tuple[ReduceMethod, ...] = (ReduceMethod("cmr_logit"), ReduceMethod("variance"), ReduceMethod("random"))
    seeds: tuple[int, ...] = (0,)
    calibration_sizes: tuple[int, ...] = (2000,)
    calibration_classes: tuple[int, ...] | None = None
    swaps: Swaps = field(default_factory=Swaps)
    extras: tuple[Extra, ...] = ()
    stress_draws: int = 10
    repair_epochs: int = 0
    repair: Repair | None = None
    test_images: int | None = None

    def __post_init__(self) -> None:
        """Turns lists into tuples and checks the ranges. InputError: a value outside its range."""
        for name in ("kept", "methods", "seeds", "calibration_sizes", "calibration_classes", "extras"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("kept", "methods", "seeds", "calibration_sizes"):
            if not getattr(self, name):
                raise InputError(f"request.{name} is empty; give at least one")
        labels = [method.label for method in self.methods]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice:
            raise InputError(f"request.methods: {twice!r} is there twice; give the methods different names")
        check_seeds(*self.seeds)
        wrong = [share for share in self.kept if not 0 < share < math.inf]
        if wrong:
            raise InputError(f"request.kept={wrong[0]} leaves nothing; give shares in (0, 1) or numbers of units")
        if min(self.calibration_sizes) < 2 or self.repair_epochs < 0 or self.stress_draws < 1:
            raise InputError(
                f"request: calibration_sizes={list(self.calibration_sizes)} must be at least 2, stress_draws="
                f"{self.stress_draws} at least 1, repair_epochs={self.repair_epochs} at least 0"
            )
        unknown = [extra for extra in self.extras if extra not in ("stress", "curvature")]
        if unknown:
            raise InputError(f"request.extras: {unknown[0]!r} is unknown; use stress, curvature")

    def width(self, kept: float, size: int) -> int:
        """Units that stay of `size`. InputError: none, or not fewer than there are."""
        width = round(kept * size) if kept < 1 else int(kept)
        if not 1 <= width < size:
            what = "leaves nothing" if width < 1 else "removes nothing"
            raise InputError(
                f"request.kept={kept:g} {what} of the {size} units of layer {self.layer!r}; "
                f"give shares in (0, 1) or 1 to {size - 1} units"
            )
        return width
