"""A compact network under Hugging Face's conventions: `save_pretrained`, `push_to_hub`, `from_pretrained`."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download
from torch import nn

from lit_prune.arguments import checked
from lit_prune.preparation import Preparation
from lit_prune.structure import load_compact
from lit_prune.structure.compact import CARD, REPORT, STRUCTURE, WEIGHTS, save_compact
from lit_prune.structure.record import note_record, record_of

FILES = (WEIGHTS, STRUCTURE, REPORT, CARD)


@checked
class HubNetwork(nn.Module, ModelHubMixin, library_name="lit_prune", tags=["pruning", "structured-pruning"]):
    """A network with its record, saved and loaded as a compact folder.

    `HubNetwork(load_compact(folder)).push_to_hub("me/small")`, `HubNetwork.from_pretrained("me/small")`; a local folder
    serves as well as a repository. What a repository names is not imported, as in `load_compact`: for a network that is
    not this package's, torchvision's or timm's give `model=`, the dense instance.

    Args:
        network: as `compress`, `apply_plan`, `load_compact` or `StagedPruning` leave it, with the record of its plans.
        report: figures for `report.json` and the card.
        preparation: of its images; None takes the record's.
    """

    def __init__(
        self, network: nn.Module, report: dict[str, Any] | None = None, preparation: Preparation | None = None
    ) -> None:
        super().__init__()
        if preparation is not None:
            note_record(network, replace(record_of(network), preparation=preparation))
        self.network = network
        self.report = report or {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the network."""
        return self.network(*args, **kwargs)

    @property
    def preparation(self) -> Preparation | None:
        """How images are prepared for the network; None where its record does not say."""
        return record_of(self.network).preparation

    def _save_pretrained(self, save_directory: Path) -> None:
        save_compact(save_directory, self.network, report=self.report)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        model: nn.Module | None = None,
        trust: Iterable[str] = (),
        **_: Any,
    ) -> "HubNetwork":
        folder = Path(model_id)
        if not folder.is_dir():
            found = snapshot_download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=list(FILES),
            )
            folder = Path(str(found))
        return cls(load_compact(folder, model=model, trust=trust))
