"""Checkpoints that are written beside training, and appear whole or not at all wherever the run folder lies."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lit_prune.files import whole_file


class WholeFileIO(TorchCheckpointIO):
    """Writes beside the checkpoint and renames.

    Lightning's own writer fills a file in the system's temporary folder and moves it; between file systems that is a
    copy, and a run killed while it lasts leaves half of a checkpoint in the place of the last whole one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes `checkpoint` to `path`, whole or not at all."""
        path = Path(path)
        for abandoned in path.parent.glob(f".{path.name}.*.partial"):  # of a run that was killed
            abandoned.unlink(missing_ok=True)
        with whole_file(path) as partial:
            torch.save(checkpoint, partial)


def checkpoint_writer() -> AsyncCheckpointIO:
    """Copies the state and writes it while training goes on; the run's end waits for it and raises what went wrong."""
    return AsyncCheckpointIO(WholeFileIO())
