import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_prune.errors import InputError
from lit_prune.measurement.channel_table import layer_table, measure
from lit_prune.measurement.summaries import rank_persistence, velocity
from lit_prune.train.axis_trace import AxisTrace, dynamics_table
from lit_prune.train.capture import Seen
from lit_prune.train.tracing import share_samples

EPOCHS = 4


class Data(LightningDataModule):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(40, 3, 6, 6, generator=generator)
        self.set = TensorDataset(images, torch.arange(40) % 4)

    def train_dataloader(self):
        return DataLoader(self.set, batch_size=20, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.set, batch_size=20)

    def calibration_dataloader(self):
        return DataLoader(self.set, batch_size=11)


class Module(LightningModule):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.backbone(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("val/loss", nn.functional.cross_entropy(self.backbone(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def make_module():
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(6, 5, 3),
        nn.Flatten(),
        nn.Linear(20, 4),
    )
    return Module(backbone)


def fit(folder, *callbacks, epochs=EPOCHS, resume=None, **arguments):
    seed_everything(1, verbose=False)
    trainer = Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"logger": False, "enable_checkpointing": False, "devices": 1} | arguments,
    )
    module = make_module()
    trainer.fit(module, Data(), ckpt_path=resume)
    return module, trainer


def names(folder):
    return sorted(file.name for file in (folder / "trace").iterdir())


def test_each_traced_epoch_holds_the_table_of_the_network_at_that_time(tmp_path):
    tables = []

    class Measurer(Callback):
        def on_train_start(self, trainer, pl_module):
            tables.append(measure(pl_module.backbone, trainer.datamodule.calibration_dataloader()))

        def on_train_epoch_end(self, trainer, pl_module):
            tables.append(measure(pl_module.backbone, trainer.datamodule.calibration_dataloader()))

    fit(tmp_path, AxisTrace(every_n_epochs=2), Measurer())
    assert names(tmp_path) == [
        "dynamics.parquet",
        "epoch=000.parquet",
        "epoch=002.parquet",
        "epoch=004.parquet",
        "layers.parquet",
    ]
    for epoch in (0, 2, 4):
        table = pd.read_parquet(tmp_path / "trace" / f"epoch={epoch:03d}.parquet")
        assert (table.pop("epoch") == epoch).all()
        pd.testing.assert_frame_equal(table, tables[epoch])
    assert not tables[0].equals(tables[2])


def test_layers_file_has_one_row_a_layer_and_epoch_with_the_coupling(tmp_path):
    fit(tmp_path, AxisTrace(layers=["4", "6"]))
    layers = pd.read_parquet(tmp_path / "trace" / "layers.parquet")
    assert layers[["epoch", "layer"]].values.tolist() == [[e, name] for e in range(EPOCHS + 1) for name in ("4", "6")]
    last = layer_table(pd.read_parquet(tmp_path / "trace" / "epoch=004.parquet"))
    assert layers.tail(2)["coupling"].tolist() == last["coupling"].tolist()


def test_training_is_bit_for_bit_the_same_with_and_without_the_trace(tmp_path):
    plain, _ = fit(tmp_path / "plain")
    traced, _ = fit(tmp_path / "traced", AxisTrace())
    for key, value in plain.state_dict().items():
        assert torch.equal(value, traced.state_dict()[key]), key


@pytest.mark.parametrize("cut", [1, 3])
def test_an_interrupted_and_resumed_trace_equals_the_uninterrupted_one(tmp_path, cut):
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def run(folder, **arguments):
        saver = ModelCheckpoint(folder, filename="end", save_on_train_epoch_end=True, enable_version_counter=False)
        fit(folder, AxisTrace(), Reseed(), saver, enable_checkpointing=True, **arguments)

    run(whole)
    run(parts, epochs=cut)
    before = {name: (parts / "trace" / name).stat().st_mtime_ns for name in names(parts) if name.startswith("epoch")}
    run(parts, resume=parts / "end.ckpt")
    assert names(parts) == names(whole)
    for name in names(whole):
        one, other = (pd.read_parquet(folder / "trace" / name) for folder in (whole, parts))
        pd.testing.assert_frame_equal(one, other)
    assert all((parts / "trace" / name).stat().st_mtime_ns == time for name, time in before.items())


class Reseed(Callback):
    """Makes the data order and dropout functions of the step, so that a resumed run can repeat them."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(100 + trainer.global_step)

    def setup(self, trainer, pl_module, stage):
        data = trainer.datamodule
        data.train_dataloader = lambda: DataLoader(data.set, batch_size=20)


def test_a_fresh_fit_starts_the_trace_anew(tmp_path):
    fit(tmp_path, AxisTrace())
    fit(tmp_path, AxisTrace(), epochs=1)
    assert names(tmp_path) == ["dynamics.parquet", "epoch=000.parquet", "epoch=001.parquet", "layers.parquet"]
    assert set(pd.read_parquet(tmp_path / "trace" / "layers.parquet")["epoch"]) == {0, 1}


def test_coupling_and_time_are_logged(tmp_path):
    logger = CSVLogger(tmp_path, name="log", version=0)
    fit(tmp_path, AxisTrace(), epochs=1, logger=logger)
    logged = pd.read_csv(tmp_path / "log" / "version_0" / "metrics.csv")
    layers = pd.read_parquet(tmp_path / "trace" / "layers.parquet")
    assert logged["trace/4/coupling"].dropna().tolist() == pytest.approx(
        layers[layers["layer"] == "4"]["coupling"].tolist()
    )
    assert (logged["trace/seconds"].dropna() > 0).sum() == 2


def test_dynamics_agree_with_the_summaries_and_end_at_persistence_one(tmp_path):
    fit(tmp_path, AxisTrace(), epochs=2)
    trace = [pd.read_parquet(tmp_path / "trace" / f"epoch={epoch:03d}.parquet") for epoch in range(3)]
    found = pd.read_parquet(tmp_path / "trace" / "dynamics.parquet").set_index(["epoch", "layer"])
    for layer in ("0", "4", "6"):
        rows = [table[table["layer"] == layer] for table in trace]
        assert found.loc[(1, layer), "velocity"] == pytest.approx(velocity(rows[0], rows[1]), nan_ok=True)
        for column, name in (("input_capture", "persistence_capture"), ("task_information", "persistence_task")):
            assert found.loc[(0, layer), name] == pytest.approx(rank_persistence(rows[0], rows[2], column), nan_ok=True)
            assert found.loc[(2, layer), name] == pytest.approx(1)
    assert found.loc[0, "velocity"].isna().all()


def test_dynamics_across_a_cut_are_not_defined():
    channels = pd.DataFrame({"layer": "a", "depth": 0, "channel": range(6)})
    random = np.random.default_rng(0)
    epochs = []
    for epoch, kept in enumerate((6, 6, 4, 4)):
        values = {name: random.random(kept) for name in ("input_capture", "task_information")}
        epochs.append(channels[:kept].assign(**values, epoch=epoch))
    table = dynamics_table(pd.concat(epochs))
    assert table["velocity"].isna().tolist() == [True, False, True, False]
    assert table["persistence_task"].isna().tolist() == [True, True, False, False]


def test_plane_is_a_picture_in_tensorboard(tmp_path):
    fit(tmp_path, AxisTrace(), epochs=1, logger=TensorBoardLogger(tmp_path, name="", version="tensorboard"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shots = events.Images("trace/plane")
    assert len(shots) == 2 and shots[0].width > shots[0].height > 100
    assert shots[0].encoded_image_string != shots[1].encoded_image_string


def test_limit_takes_the_first_images(tmp_path):
    module, trainer = fit(tmp_path, AxisTrace(limit=15), epochs=1)
    images, labels = trainer.datamodule.set[:15]
    found = pd.read_parquet(tmp_path / "trace" / "epoch=001.parquet").drop(columns="epoch")
    expected = measure(module.backbone, [(images[:11], labels[:11]), (images[11:], labels[11:])])
    pd.testing.assert_frame_equal(found, expected)


@dataclass(frozen=True)
class Given:
    """Samples that all ranks read."""

    limit: int | None = None
    shared = True

    def __iter__(self):
        left = self.limit or 22
        for start, stop in ((0, 11), (11, 22)):
            values = torch.arange(start, min(stop, start + left))
            left -= len(values)
            if len(values):
                yield Seen((values,), {}, (values, values))


def test_ranks_share_every_image_once():
    for limit in (None, 14, 22, 100):
        shared = [seen.args[0] for rank in range(3) for seen in share_samples(Given(), rank, 3, limit)]
        assert sorted(torch.cat(shared).tolist()) == list(range(min(22, limit or 22)))
    for rank in range(3):
        with pytest.raises(InputError, match="2 samples in the first batch for 3 ranks"):
            list(share_samples(Given(), rank, 3, limit=2))


class Witness(Callback):
    """Leaves a file for each process."""

    def on_train_start(self, trainer, pl_module):
        (Path(trainer.default_root_dir) / f"{trainer.world_size}-{trainer.global_rank}").touch()


def test_two_processes_write_the_trace_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    fit(one, AxisTrace(), epochs=1)
    subprocess.run([sys.executable, __file__, two], check=True, timeout=120)
    assert (two / "2-0").exists()
    assert (two / "2-1").exists()
    assert names(two) == names(one)
    expected, found = (pd.read_parquet(folder / "trace" / "epoch=000.parquet") for folder in (one, two))
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arguments", [{"every_n_epochs": 0}, {"target": "margin"}, {"limit": 0}])
def test_bad_arguments_are_named(arguments):
    with pytest.raises(InputError, match=f"{next(iter(arguments))}: "):
        AxisTrace(**arguments)


def test_a_network_that_is_not_found_is_named(tmp_path):
    module = make_module()
    module.other = nn.Linear(500, 10)
    quiet = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    for wanted, message in ((None, "holds several; name one by network=: stem"), ("trunk", "no submodule 'trunk'")):
        module = make_module()
        module.stem, module.head = module.backbone, nn.Linear(500, 10)
        del module.backbone
        trainer = Trainer(default_root_dir=tmp_path, max_epochs=1, callbacks=[AxisTrace(network=wanted)], **quiet)
        with pytest.raises(InputError, match=message):
            trainer.fit(module, datamodule=Data())


if __name__ == "__main__":  # both ranks of the two-process test run this file
    fit(sys.argv[1], AxisTrace(), Witness(), epochs=1, devices=2, strategy="ddp")
