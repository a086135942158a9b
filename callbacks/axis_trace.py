"""Watches every channel on the two axes while the network trains."""

import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.files import whole_file
from lit_prune.information.target_axis import TARGETS
from lit_prune.layers import Batches
from lit_prune.measure import channel_table, collect_sums, layer_table
from lit_prune.protocol import DEFAULT_PROTOCOL, Protocol


class AxisTrace(Callback):
    """Writes the channel table of the network at initialisation and after every k-th training epoch.

    Hooks: `on_train_start` (initialisation, skipped on resume) and `on_train_epoch_end`. Nothing is kept in the
    callback's state. The calibration images of the DataModule go once through `pl_module.backbone` in evaluation mode;
    the training state, the random state included, is left as found. Under DDP the ranks share each batch and add their
    sums, and rank 0 writes. Supported strategies: one device and DDP, where each rank holds the whole network.

    Files, whole or not at all, in `<default_root_dir>/trace/`: `epoch=000.parquet` (initialisation),
    `epoch=004.parquet` (after epoch 3, counted from 0), with the columns of `lit_prune.measure` and `epoch`; and
    `layers.parquet`, the coupling and the column means of each layer at each traced epoch, derived from the former. On
    resume the epochs already written are kept, an epoch that runs again replaces its own file; a fresh fit starts the
    trace anew. Logged: `trace/<layer>/coupling` and `trace/seconds`, the time it took.

    Args:
        every_n_epochs: trace after epochs n-1, 2n-1, ... (counted from 0).
        layers: names or fnmatch patterns of the layers; None takes every Conv2d and Linear. Layers may disappear later
            as blocks are removed.
        target: task variable, as in `lit_prune.measure`.
        limit: number of calibration images; None takes all.
        protocol: measurement conventions; None takes the defaults.

    Raises:
        InputError: a value out of range; at fit start: no calibration data, no `backbone`, fewer images in the first
            batch than ranks.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        layers: list[str] | None = None,
        target: str = "true_margin",
        limit: int | None = None,
        protocol: Protocol | None = None,
    ) -> None:
        if every_n_epochs < 1:
            raise InputError(f"every_n_epochs: {every_n_epochs} is below 1")
        if target not in TARGETS:
            raise InputError(f"target: {target!r} is not one of {', '.join(TARGETS)}")
        if limit is not None and limit < 1:
            raise InputError(f"limit: {limit} is below 1; give a number of images, or None for all")
        self.every_n_epochs = every_n_epochs
        self.layers = layers
        self.target = target
        self.limit = limit
        self.protocol = protocol or DEFAULT_PROTOCOL

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Traces the initialisation of a fresh fit."""
        if trainer.current_epoch == 0 and trainer.ckpt_path is None:
            if trainer.is_global_zero:
                _clear(_folder(trainer))
            self._trace(trainer, pl_module, epoch=0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Traces the state after every `every_n_epochs`-th epoch."""
        finished = trainer.current_epoch + 1
        if finished % self.every_n_epochs == 0:
            self._trace(trainer, pl_module, epoch=finished)

    def _trace(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        start = time.perf_counter()
        backbone = _backbone(pl_module)
        batches = share_batches(_calibration(trainer), trainer.global_rank, trainer.world_size, self.limit)
        sums = collect_sums(backbone, batches, self.target, self.layers, self.protocol).all_reduce()
        if not trainer.is_global_zero:
            return
        channels = channel_table(backbone, sums, self.protocol)
        layers = write_epoch(_folder(trainer), epoch, channels)
        seconds = time.perf_counter() - start
        defined = layers.dropna(subset="coupling")
        scalars = {f"trace/{row.layer}/coupling": row.coupling for row in defined.itertuples()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars | {"trace/seconds": seconds}, step=trainer.global_step)
        rank_zero_info(f"trace: epoch {epoch}, {len(layers)} layers, {sums.images} images, {seconds:.2f} s")


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


def write_epoch(folder: Path, epoch: int, channels: pd.DataFrame) -> pd.DataFrame:
    """Writes one epoch's channel table, brings `layers.parquet` in line, returns this epoch's layer rows."""
    with whole_file(folder / f"epoch={epoch:03d}.parquet") as partial:
        channels.assign(epoch=epoch).to_parquet(partial, index=False)
    file = folder / "layers.parquet"
    known = pd.read_parquet(file) if file.exists() else pd.DataFrame({"epoch": []})
    known = known[known["epoch"] != epoch]
    missing = [path for path in sorted(folder.glob("epoch=*.parquet")) if _epoch(path) not in set(known["epoch"])]
    added = [layer_table(pd.read_parquet(path)).assign(epoch=_epoch(path)) for path in missing]
    every = pd.concat([known, *added] if len(known) else added, ignore_index=True)
    every.insert(0, "epoch", every.pop("epoch"))
    every = every.sort_values(["epoch", "depth"], kind="stable", ignore_index=True)
    with whole_file(file) as partial:
        every.to_parquet(partial, index=False)
    return every[every["epoch"] == epoch]


def _epoch(file: Path) -> int:
    return int(file.stem.removeprefix("epoch="))


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "trace"


def _clear(folder: Path) -> None:
    """Removes the trace of an earlier run, which would mix with the new one."""
    for file in [*folder.glob("epoch=*.parquet"), folder / "layers.parquet"]:
        file.unlink(missing_ok=True)


def _calibration(trainer: Trainer) -> Batches:
    data = getattr(trainer, "datamodule", None)
    if not hasattr(data, "calibration_dataloader"):
        raise InputError("AxisTrace: no calibration data; fit with a DataModule that has calibration_dataloader()")
    return data.calibration_dataloader()


def _backbone(pl_module: LightningModule) -> nn.Module:
    backbone = getattr(pl_module, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise InputError(f"AxisTrace: {type(pl_module).__name__} has no `backbone`; name its network so")
    return getattr(backbone, "_orig_mod", backbone)  # what torch.compile wraps
