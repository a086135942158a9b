"""The decorrelation term: what it measures, what it leaves alone, and that it outlives surgery."""

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lit_prune.errors import InputError
from lit_prune.measurement.local_axis import correlation_matrix, peer_overlap
from lit_prune.train.decorrelation import Decorrelation, sampled_overlap, spaced_convolutions


def outputs(channels=7, dead=()):
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(channels, channels, generator=generator)
    values = torch.einsum("bchw,dc->bdhw", torch.randn(5, channels, 3, 3, generator=generator), mixed)
    values[:, list(dead)] = 2.0
    return values


def test_overlap_of_all_pairs_is_the_mean_peer_overlap_of_the_channel_table():
    values = outputs(dead=[2])
    samples = values.transpose(0, 1).flatten(1).double()
    dead = torch.arange(7) == 2
    expected = peer_overlap(correlation_matrix(torch.cov(samples, correction=0)), dead)[~dead].mean()
    assert float(sampled_overlap(values, 7)) == pytest.approx(float(expected), rel=1e-5)


def test_overlap_of_references_is_the_mean_over_their_columns():
    values = outputs()
    pairs = -0.5 * torch.log1p(-torch.corrcoef(values.transpose(0, 1).flatten(1)).square().clamp_max(1 - 2e-6))
    expected = pairs[:, :3].masked_fill(torch.eye(7, dtype=torch.bool)[:, :3], 0).sum() / (7 * 3 - 3)
    assert float(sampled_overlap(values, 3)) == pytest.approx(float(expected), rel=1e-4)


def test_gradient_of_the_overlap_agrees_with_finite_differences_and_is_finite_for_dead_channels():
    values = outputs().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: sampled_overlap(v, 4), values)
    values = outputs(dead=[0, 5]).requires_grad_()
    (gradient,) = torch.autograd.grad(sampled_overlap(values, 7), values)
    assert bool(gradient.isfinite().all()) and not gradient[:, [0, 5]].any()


def test_convolutions_are_at_most_six_spaced_over_depth_with_first_and_last():
    many = nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(16)))
    assert list(spaced_convolutions(many)) == ["0", "3", "6", "9", "12", "15"]
    assert list(spaced_convolutions(many[:3])) == ["0", "1", "2"]
    with pytest.raises(InputError, match="no Conv2d"):
        spaced_convolutions(nn.Linear(2, 2))


class Watch(Callback):
    """Names of the hooked layers and the value of the term, batch by batch."""

    def __init__(self, regulariser):
        self.regulariser, self.overlaps, self.hooked = regulariser, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.overlaps.append(None if self.regulariser._latest is None else float(self.regulariser._latest))
        names = [name for name, module in pl_module.backbone.named_modules() if module._forward_hooks]
        self.hooked.append([name for name in names if name in spaced_convolutions(pl_module.backbone)])


def train(make_run, folder, *callbacks, stages=(), max_epochs=1, **options):
    trainer, module, data = make_run(folder, stages=stages, max_epochs=max_epochs, callbacks=callbacks)
    trainer.fit(module, datamodule=data, **options)
    return trainer, module


def test_zero_weight_trains_bit_for_bit_as_without_and_still_measures(tmp_path, make_run):
    _, plain = train(make_run, tmp_path / "plain")
    regulariser = Decorrelation(weight=0)
    watch = Watch(regulariser)
    trainer, measured = train(make_run, tmp_path / "zero", watch, regulariser)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, measured.state_dict()[name]), name
    assert trainer.callback_metrics["train/peer_overlap"] > 0
    assert "training_step" not in vars(measured) and not any(m._forward_hooks for m in measured.backbone.modules())


def test_term_is_in_the_loss_of_every_second_batch_only(tmp_path, make_run):
    regulariser = Decorrelation(weight=1.0)
    watch = Watch(regulariser)
    trainer, _ = train(make_run, tmp_path, watch, regulariser)
    assert [overlap is not None for overlap in watch.overlaps] == [True, False, True]
    seen = [overlap for overlap in watch.overlaps if overlap is not None]
    assert float(trainer.callback_metrics["train/peer_overlap"]) == pytest.approx(sum(seen) / 2, rel=1e-5)
    assert float(trainer.callback_metrics["train/decorrelation"]) == pytest.approx(sum(seen) / 3, rel=1e-5)


def test_strong_regulariser_ends_with_less_overlap_than_none(tmp_path, make_run):
    ends = []
    for weight in (0.0, 30.0):
        trainer, _ = train(make_run, tmp_path / str(weight), Decorrelation(weight, every_n_batches=1), max_epochs=3)
        ends.append(float(trainer.callback_metrics["train/peer_overlap"]))
    assert ends[1] < 0.8 * ends[0]


@pytest.mark.parametrize("first", [True, False])
def test_regulariser_holds_on_to_the_network_that_surgery_leaves(tmp_path, make_run, first):
    regulariser = Decorrelation(weight=0.1)
    watch = Watch(regulariser)
    trainer, module, data = make_run(tmp_path, (("channels", 1),), 2, callbacks=(regulariser, watch))
    if not first:  # its hooks run after those of the pruning
        trainer.callbacks.append(trainer.callbacks.pop(trainer.callbacks.index(regulariser)))
        trainer.callbacks.append(trainer.callbacks.pop(trainer.callbacks.index(watch)))
    trainer.fit(module, datamodule=data)
    assert all(len(names) == 6 for names in watch.hooked) and len(watch.hooked) == 6
    assert [overlap is not None for overlap in watch.overlaps] == [True, False, True] * 2


def test_resumed_training_equals_the_uninterrupted_one(tmp_path, make_run):
    _, whole = train(make_run, tmp_path / "whole", Decorrelation(), max_epochs=2)

    class Stop(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise KeyError("stop")

    with pytest.raises(KeyError):
        train(make_run, tmp_path / "parts", Stop(), Decorrelation(), max_epochs=2)
    checkpoint = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    options = {"ckpt_path": checkpoint, "weights_only": True}
    _, resumed = train(make_run, tmp_path / "parts", Decorrelation(), max_epochs=2, **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("arguments", [{"weight": -1.0}, {"every_n_batches": 0}])
def test_bad_arguments_are_named(arguments):
    with pytest.raises(InputError, match=f"{next(iter(arguments))}: "):
        Decorrelation(**arguments)
