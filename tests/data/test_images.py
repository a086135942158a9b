from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prune.data.sources import MemoryImages
from lit_prune.errors import InputError


def images_of(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return torch.cat([images for images, _ in loader])


def attached(data, rank, world_size):
    """The data module as it is on one rank of a trainer."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, strategy=strategy, overfit_batches=0)
    return data


def test_same_epoch_same_batches_and_other_epoch_other_batches(random_data):
    first, second = (images_of(random_data(batch_size=32).train_dataloader(), epoch=4) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, images_of(random_data(batch_size=32).train_dataloader(), epoch=5))


def test_two_ranks_together_see_the_batches_of_one(random_data):
    alone = images_of(random_data(batch_size=32).train_dataloader(), epoch=1)
    parts = [images_of(attached(random_data(batch_size=16), r, 2).train_dataloader(), epoch=1) for r in range(2)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), alone)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader", "recalibration_dataloader"])
def test_workers_make_the_pixels_of_the_resident_loader(random_data, loader, num_workers):
    resident = getattr(random_data(batch_size=32, resident=True), loader)()
    workers = getattr(random_data(batch_size=32, resident=False, num_workers=num_workers), loader)()
    for epoch in (0, 3):
        assert torch.equal(images_of(resident, epoch), images_of(workers, epoch))
    assert len(resident) == len(workers) == len(list(workers))


def test_batches_leave_the_global_generator_alone(random_data):
    for resident in (True, False):
        data = random_data(batch_size=32, resident=resident, num_workers=0)
        before = torch.get_rng_state()
        images_of(data.train_dataloader()), data.calibration_indices
        assert torch.equal(torch.get_rng_state(), before)


def test_validation_of_all_ranks_is_exact(random_data):
    whole = random_data(eval_batch_size=8)
    parts = [list(attached(random_data(eval_batch_size=8), r, 3).val_dataloader()) for r in range(3)]
    rows = torch.cat([images for part in parts for images, _ in part]).flatten(1)
    expected = images_of(whole.val_dataloader()).flatten(1)
    assert sorted(rows.tolist()) == sorted(expected.tolist())


def test_evaluation_images_are_the_normalised_pixels(random_data):
    data = random_data(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    pixels = data.load_split("test").pixels
    assert torch.allclose(images_of(data.test_dataloader()), (pixels / 255 - 0.5) / 0.25, atol=1e-5)
    images, labels = next(iter(data.predict_dataloader()))
    assert images.dtype == torch.float32 and labels.dtype == torch.int64


def test_calibration_images_are_the_unaugmented_images_at_the_indices(random_data):
    data = random_data(calibration_size=20, mean=(0, 0, 0), std=(1, 1, 1))
    served = (images_of(data.calibration_dataloader()) * 255).round().byte().flatten(1)
    expected = data.load_split("train").pixels[data.calibration_indices].flatten(1)
    assert sorted(served.tolist()) == sorted(expected.tolist())
    assert data.calibration_indices == sorted(set(data.calibration_indices))
    counts = torch.bincount(data.load_split("train").labels[data.calibration_indices], minlength=4)
    assert counts.tolist() == [5] * 4


def test_calibration_and_recalibration_are_the_same_on_every_rank(random_data):
    whole = random_data(calibration_size=20, batch_size=16)
    for rank in range(2):
        part = attached(random_data(calibration_size=20, batch_size=16), rank, 2)
        assert part.calibration_indices == whole.calibration_indices
        for loader in ("calibration_dataloader", "recalibration_dataloader"):
            assert torch.equal(images_of(getattr(part, loader)()), images_of(getattr(whole, loader)()))


def test_recalibration_draws_are_not_those_of_training(random_data):
    data = random_data(batch_size=32)
    assert not torch.equal(images_of(data.recalibration_dataloader()), images_of(data.train_dataloader()))


def test_calibration_depends_on_the_seed_and_is_at_most_the_training_split(random_data):
    assert (
        random_data(calibration_size=20).calibration_indices
        != random_data(seed=1, calibration_size=20).calibration_indices
    )
    assert random_data().calibration_indices == list(range(96))


def test_held_out_images_and_subset_are_disjoint_stratified_and_from_the_training_split(random_data):
    data = random_data(val_size=16, train_size=40, batch_size=8, mean=(0, 0, 0), std=(1, 1, 1))
    data.setup()
    assert data.fingerprint()["sizes"] == {"train": 40, "val": 16, "test": 37}
    pixels = {row: i for i, row in enumerate(map(tuple, data.load_split("train").pixels.flatten(1).tolist()))}
    held_out = [
        pixels[tuple(row)] for row in (images_of(data.val_dataloader()) * 255).round().long().flatten(1).tolist()
    ]
    assert not set(held_out) & set(data.train_positions.tolist())
    labels = data.load_split("train").labels
    assert torch.bincount(labels[held_out]).tolist() == [4] * 4
    assert torch.bincount(labels[data.train_positions]).tolist() == [10] * 4
    assert set(data.calibration_indices) == set(data.train_positions.tolist())


def test_fingerprint_changes_with_labels_pixels_and_normalisation(random_data):
    class OtherLabel(random_data):
        def load_split(self, split):
            images = super().load_split(split)
            return MemoryImages(images.pixels, images.labels.roll(1))

    class OtherPixels(random_data):
        def load_split(self, split):
            images = super().load_split(split)
            return MemoryImages(255 - images.pixels, images.labels)

    original = random_data().fingerprint()
    assert original == random_data(resident=False).fingerprint()
    changed = [
        {key for key, value in data.fingerprint().items() if value != original[key]}
        for data in (OtherLabel(), OtherPixels(), random_data(mean=(0, 0, 0)))
    ]
    assert changed == [{"name", "labels_sha256"}, {"name", "pixels_sha256"}, {"normalisation"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is too small"),
        ({"seed": -1}, "seed=-1"),
        ({"mean": (0.5,)}, "one value a channel"),
        ({"train_size": 90, "val_size": 7}, "needs 97 images, the training split has 96"),
        ({"batch_size": 97}, "batch_size=97 on 1 rank"),
        ({"mean": (0.5,), "std": (0.5,)}, "1 value.* 3 channel"),
        ({"padding": "reflect", "pad": 8}, "pad=8 is too large .* at most 7"),
    ],
)
def test_wrong_arguments_are_refused(random_data, arguments, message):
    with pytest.raises(InputError, match=message):
        random_data(**arguments).train_dataloader()


def test_labels_out_of_range_are_refused(random_data):
    class TooFew(random_data):
        CLASSES = 3

    with pytest.raises(InputError, match="from 0 to 3, but the data set has 3 classes"):
        TooFew().setup()


class Recorder(LightningModule):
    """Keeps the sum of every training batch, by epoch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.sums = {}

    def training_step(self, batch, index):
        self.sums.setdefault(self.current_epoch, []).append(float(batch[0].double().sum()))
        return self.layer(batch[0].mean().view(1, 1)).sum()

    def validation_step(self, batch, index):
        pass

    def predict_step(self, batch, index):
        return batch[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def trainer(folder, epochs, **options):
    save = ModelCheckpoint(folder, save_last=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(max_epochs=epochs, callbacks=[save], devices=1, **quiet, **options)


@pytest.mark.parametrize("resident", [True, False])
def test_resumed_training_continues_with_the_batches_of_the_uninterrupted_run(random_data, tmp_path, resident):
    options = {"batch_size": 32, "resident": resident, "num_workers": 0}
    whole, before, after = Recorder(), Recorder(), Recorder()
    trainer(tmp_path / "whole", 4).fit(whole, datamodule=random_data(**options))
    trainer(tmp_path / "part", 2).fit(before, datamodule=random_data(**options))
    torch.manual_seed(1234)
    trainer(tmp_path / "part", 4).fit(after, datamodule=random_data(**options), ckpt_path=tmp_path / "part/last.ckpt")
    assert before.sums | after.sums == whole.sums
    assert len(whole.sums) == 4 and len({tuple(sums) for sums in whole.sums.values()}) == 4


@pytest.mark.parametrize("resident", [True, False])
def test_prediction_keeps_the_order_and_overfitting_repeats_its_images(random_data, tmp_path, resident):
    data = random_data(eval_batch_size=8, batch_size=32, resident=resident, num_workers=0)
    labels = torch.cat(trainer(tmp_path, 1).predict(Recorder(), datamodule=data))
    assert torch.equal(labels, data.load_split("test").labels)
    data = random_data(batch_size=32, resident=resident, num_workers=0, pad=0, flip=False)
    recorder = Recorder()
    trainer(tmp_path, 2, overfit_batches=2).fit(recorder, datamodule=data)
    assert recorder.sums[0] == recorder.sums[1]
