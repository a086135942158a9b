"""What the tracing callbacks share: the calibration images, the network, the folder."""

from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.layers import Batches


def share_batches(batches: Batches, rank: int, ranks: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's images of each batch, every `ranks`-th one, of the first `limit` images of the same batches.

    Raises:
        InputError: on every rank, if the first batch has fewer images than there are ranks.
    """
    seen = 0
    for images, labels in batches:
        kept = len(images) if limit is None else min(len(images), limit - seen)
        if seen == 0 and kept < ranks:
            raise InputError(f"calibration: {kept} images in the first batch for {ranks} ranks; make it larger")
        seen += kept
        if rank < kept:
            yield images[:kept][rank::ranks], labels[:kept][rank::ranks]
        if seen == limit:
            return


def is_fresh(trainer: Trainer) -> bool:
    """Whether the fit starts at its first epoch and not from a checkpoint."""
    return trainer.current_epoch == 0 and trainer.ckpt_path is None


def trace_folder(trainer: Trainer) -> Path:
    """`trace/` in the run folder."""
    return Path(trainer.default_root_dir) / "trace"


def calibration_batches(callback: Callback, trainer: Trainer, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the first `limit` calibration images of the DataModule.

    Raises:
        InputError: the run has no calibration data.
    """
    data = getattr(trainer, "datamodule", None)
    if not hasattr(data, "calibration_dataloader"):
        name = type(callback).__name__
        raise InputError(f"{name}: no calibration data; fit with a DataModule that has calibration_dataloader()")
    return share_batches(data.calibration_dataloader(), trainer.global_rank, trainer.world_size, limit)


def backbone_of(callback: Callback, pl_module: LightningModule) -> nn.Module:
    """The network of a LightningModule, without what torch.compile wraps around it.

    Raises:
        InputError: it has no `backbone`.
    """
    backbone = getattr(pl_module, "backbone", None)
    if not isinstance(backbone, nn.Module):
        names = type(callback).__name__, type(pl_module).__name__
        raise InputError(f"{names[0]}: {names[1]} has no `backbone`; name its network so")
    return getattr(backbone, "_orig_mod", backbone)


def check_cadence(every_n_epochs: int, limit: int | None) -> None:
    """Raises InputError unless both are positive (None: no limit)."""
    if every_n_epochs < 1:
        raise InputError(f"every_n_epochs: {every_n_epochs} is below 1")
    if limit is not None and limit < 1:
        raise InputError(f"limit: {limit} is below 1; give a number of images, or None for all")
