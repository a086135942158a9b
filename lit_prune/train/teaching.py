"""Who teaches a run after surgery: the saved dense network, put into the module's loss and taken out again."""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lit_prune.errors import InputError
from lit_prune.models import find_head
from lit_prune.structure import kept_columns, load_compact
from lit_prune.train.distillation import Distillation, Repair

if TYPE_CHECKING:
    from lit_prune.train.classifier import LitClassifier

TERM = "distillation"


class Teaching:
    """The distillation term of a LightningModule, for as long as a phase lasts.

    Args:
        repair: weights and form of the term.
        given: folder of a saved network (`save_compact`) to learn from; None: the run's own dense one.
    """

    def __init__(self, repair: Repair, given: Path | None = None) -> None:
        self._repair, self._given = repair, given
        self._term: Distillation | None = None

    @property
    def is_own(self) -> bool:
        """Whether the teacher is the run's own dense network."""
        return self._given is None

    def folder(self, run_dir: str) -> Path:
        """Folder of the teacher."""
        return self._given or Path(run_dir) / "teacher"

    def network(self, run_dir: str, module: "LitClassifier") -> nn.Module:
        """The teacher, on the module's device and in its memory format.

        Raises:
            InputError: it is not there.
        """
        folder = self.folder(run_dir)
        if not folder.is_dir():
            raise InputError(f"teacher missing: {folder} is no folder; it is written before the first stage of a run")
        return load_compact(folder, trust=(module.backbone_name,)).to(module.device, memory_format=module.memory_format)

    def begin(self, run_dir: str, module: "LitClassifier", since: int) -> None:
        """Puts the term into the module's loss; nothing where both weights are 0.

        Args:
            run_dir: the run folder.
            module: the student.
            since: plans that the run's own teacher has had itself; those after them say which features are left.

        Raises:
            InputError: no teacher, or one with other features where features are compared.
        """
        if self._repair.alpha == self._repair.beta == 0:
            return
        teacher = self.network(run_dir, module)
        head = find_head(teacher)
        columns = kept_columns(teacher, module.plans[since:], head, module.example_input) if self.is_own else None
        width = module.backbone.get_submodule(head).in_features
        if self._repair.beta and len(columns or range(teacher.get_submodule(head).in_features)) != width:
            raise InputError(f"teacher {self._given} has other features than the student; set repair beta to 0")
        self._term = module.loss_terms[TERM] = Distillation(self._repair, module.backbone, teacher, head, columns)

    def end(self, module: "LitClassifier") -> None:
        """Takes the term out of the loss again."""
        if self._term is not None:
            self._term.remove()
            self._term = None
        module.loss_terms.pop(TERM, None)
