"""What may stand in for removed units: each way is a class, registered under its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lit_prune.errors import InputError
from lit_prune.registry import Kinds, Named

if TYPE_CHECKING:
    from lit_prune.replace.job import Job
    from lit_prune.replace.settings import Replacement

Done = tuple[dict[str, dict], list[str]]
"""Report by layer, and the layers that gained a bias."""


class StandInMethod(Named):
    """A way to fill the place of what a plan removes. Most are a `Folding` of `replace.fitting`: they say how to fit.

    Attributes:
        objectives: values of `Replacement.objective` that it can be fitted to.
        curvatures: values of `Replacement.curvature` where the objective is one of a loss.
        changes: whether it changes the layers that read what goes; those that cannot be changed are then refused.
        carries: whether a carrier may hold its constants (`Replacement.border`).
        renews: whether it puts BatchNorm statistics right too, so that a stage need not recalibrate them.
    """

    objectives: ClassVar[tuple[str, ...]] = ("distortion",)
    curvatures: ClassVar[tuple[str, ...]] = ("gauss_newton",)
    changes: ClassVar[bool] = True
    carries: ClassVar[bool] = False
    renews: ClassVar[bool] = False

    def put(self, job: Job, batches: Sequence[Any], settings: Replacement) -> Done:
        """Fills the places in `job.reduced`, in place.

        Args:
            job: the networks and who reads what goes.
            batches: what the job's task reads.
            settings: see `Replacement`.
        """
        raise NotImplementedError

    def check(self, settings: Replacement) -> None:
        """Refuses settings that have no meaning here.

        Raises:
            InputError: such a one.
        """
        for name, allowed in (("objective", self.objectives), ("curvature", self.curvatures)):
            value = getattr(settings, name)
            if value not in allowed and (name == "objective" or settings.objective != "distortion"):
                raise InputError(
                    f"{name}={value!r} is not for kind={self.name!r}, which takes {', '.join(allowed)}; change one"
                )


STAND_INS = Kinds("kind", StandInMethod)


def register_stand_in(name: str) -> Callable[[type[StandInMethod]], type[StandInMethod]]:
    """Class decorator: what goes may be replaced so, under this name."""
    return STAND_INS.register(name)


def find_stand_in(name: str) -> StandInMethod:
    """The method of a name, or of the class that `package.module:Class` names.

    Raises:
        InputError: unknown name, or no `StandInMethod`.
    """
    return STAND_INS.make(name)
