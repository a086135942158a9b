"""Tasks whose output answers with one tensor."""

from typing import Any

from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.task.base import Task
from lit_prune.task.outputs import answer


class Answered(Task):
    """The prediction is the one tensor that answers (`answer`), and targets are tensors."""

    def prediction(self, output: Any) -> Tensor:
        """The answer, [B, ...]; logits where the task has classes or labels."""
        return answer(output)

    @classmethod
    def fits(cls, output: Any, target: Any, size: int) -> bool:
        """Whether an answer and a target are of this task, see `suits`."""
        try:
            values = answer(output)
        except InputError:
            return False
        return isinstance(target, Tensor) and cls.suits(values, target, size)

    @classmethod
    def suits(cls, values: Tensor, target: Tensor, size: int) -> bool:
        """Whether this answer to so many samples goes with this target."""
        return False
