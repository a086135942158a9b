"""Checkpoints that are written beside training, and appear whole or not at all wherever the run folder lies."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lit_prune.errors import InputError
from lit_prune.files import whole_file
from lit_prune.tensor_files import read_torch

NEEDED = ("state_dict", "epoch", "global_step", "pytorch-lightning_version")


class WholeFileIO(TorchCheckpointIO):
    """Writes beside the checkpoint and renames.

    Lightning's own writer fills a file in the system's temporary folder and moves it; between file systems that is a
    copy, and a run killed while it lasts leaves half of a checkpoint in the place of the last whole one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes `checkpoint` to `path`, whole or not at all."""
        with whole_file(path) as partial, partial.open("wb") as opened:  # torch's own does not say that a disk is full
            torch.save(checkpoint, opened)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """The plain values and tensors of a checkpoint, on the CPU; nothing in it is executed.

        Raises:
            InputError: the file is missing, a URL, damaged, holds pickled objects, or is no Lightning checkpoint.
        """
        checkpoint = read_torch(path, "ckpt_path")
        missing = [key for key in NEEDED if key not in checkpoint] if isinstance(checkpoint, dict) else list(NEEDED)
        if missing:
            raise InputError(
                f"ckpt_path: {path} is no checkpoint of a fit ({missing[0]} is missing); "
                "plain weights go to --model.weights"
            )
        return checkpoint


def checkpoint_writer() -> AsyncCheckpointIO:
    """Copies the state and writes it while training goes on; the run's end waits for it and raises what went wrong."""
    return AsyncCheckpointIO(WholeFileIO())
