"""The callbacks on LightningModules of other people: nothing of ours inside them, `Trainer(callbacks=[...])` alone."""

import json
import warnings
from types import SimpleNamespace

import lightning_modules as modules
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning_modules import MEAN, STD, loaders, pruning, trainer
from torch import nn
from torch.utils.data import DataLoader

from lit_prune import (
    AxisTrace,
    Decorrelation,
    InputError,
    Repair,
    cost,
    load_compact,
    load_pruned,
    measure,
)
from lit_prune.structure.record import record_of
from lit_prune.train import samples

EXAMPLE = torch.zeros(1, 3, 8, 8)


def records(folder):
    return [json.loads(line) for line in (folder / "stages.jsonl").read_text().splitlines()]


CASES = {
    "own classifier": (modules.Classifier, "pairs", {"monitor": "val/acc"}),
    "loss as the monitor": (modules.Classifier, "pairs", {"monitor": "val/ce", "mode": "min"}),
    "no monitor": (modules.Classifier, "pairs", {}),
    "transfer hook": (modules.Transferring, "pairs", {"monitor": "val/acc"}),
    "dict batches": (modules.DictModule, "dicts", {"monitor": "val/acc"}),
    "segmentation": (modules.Segmenter, "pixels", {"monitor": "val/pixels"}),
    "manual optimization": (modules.Manual, "pairs", {"monitor": "val/acc", "network": "net"}),
    "anew": (modules.OneCycle, "pairs", {"optimizer": "anew"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_module_is_cut_and_trained_on_and_every_live_parameter_is_held(tmp_path, case):
    kind, data, options = CASES[case]
    module = kind()
    network = module.net if hasattr(module, "net") else module.model
    dense = sum(p.numel() for p in network.parameters())
    staged = pruning(**options)
    fit = trainer(tmp_path, staged)
    fit.fit(module, *loaders(data))
    small = module.net if hasattr(module, "net") else module.model
    assert sum(p.numel() for p in small.parameters()) < dense
    held = {id(p) for o in fit.optimizers for g in o.param_groups for p in g["params"]}
    assert held == {id(p) for p in module.parameters()}
    (record,) = records(tmp_path)
    assert record["macs"]["after"] == cost(small, EXAMPLE).macs <= 0.6 * record["macs"]["dense"]
    figures = record[record["metric"]["name"]]
    assert record["metric"]["name"] == options.get("monitor", "accuracy")
    assert all(value == value for value in figures.values()), "a figure was never measured"
    assert record["distillation"]["evaluations"] == 2 * 3, "two epochs of three batches"
    wrapped = ("training_step", "configure_optimizers", "on_load_checkpoint", "on_save_checkpoint", "log")
    assert not set(wrapped) & set(vars(module)), "something of ours is left in the module"


def test_the_monitor_in_the_record_is_what_validation_logs(tmp_path):
    class Ask(modules.Classifier):
        logged: list = []

        def on_validation_epoch_end(self):
            self.logged.append(float(self.trainer.callback_metrics["val/acc"]))

    fit = trainer(tmp_path, pruning(monitor="val/acc"))
    fit.fit(module := Ask(), *loaders())
    (record,) = records(tmp_path)
    assert record["val/acc"]["after_repair"] == pytest.approx(
        fit.validate(module, loaders()[1], verbose=False)[0]["val/acc"]
    )


def test_figures_in_between_leave_training_as_it_is(tmp_path):
    """Batches and the random state at every step are those of a run without the callback."""
    states = []

    class Watch(modules.Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            states.append((self.current_epoch, batch_idx, torch.get_rng_state(), batch[0].clone()))

    for staged in ([], [pruning(2, monitor="val/acc")]):
        torch.manual_seed(3)
        train = DataLoader(loaders()[0].dataset, batch_size=16, shuffle=True)
        trainer(tmp_path, *staged).fit(Watch(), train, loaders()[1])
    plain, pruned = states[: len(states) // 2], states[len(states) // 2 :]
    for one, other in zip(plain, pruned, strict=True):
        assert one[:2] == other[:2] and torch.equal(one[2], other[2]) and torch.equal(one[3], other[3])


@pytest.mark.parametrize("kind", [modules.Classifier, modules.Transferring])
def test_a_trace_measures_the_images_that_the_network_is_trained_on(tmp_path, kind):
    module = kind()
    trainer(tmp_path, AxisTrace(), epochs=1).fit(module, *loaders())
    found = pd.read_parquet(tmp_path / "trace" / "epoch=001.parquet").drop(columns="epoch")
    batches = [((pixels - MEAN) / STD, labels) for pixels, labels in loaders()[1]]
    pd.testing.assert_frame_equal(found, measure(module.net, batches), rtol=1e-4, atol=1e-6)


def test_distillation_that_is_recorded_is_evaluated_in_a_module_with_a_step_of_its_own(tmp_path):
    module, seen = modules.Classifier(), []
    staged = pruning(monitor="val/acc")
    original = staged.teaching.begin

    def begin(module, lesson):
        seen.append(lesson.teacher)
        original(module, lesson)

    staged.teaching.begin = begin
    losses = []

    class Loss(modules.Classifier):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            super().optimizer_step(epoch, batch_idx, optimizer, lambda: losses.append(closure()) or losses[-1])

    module = Loss()
    fit = trainer(tmp_path, staged)
    fit.fit(module, *loaders())
    assert records(tmp_path)[0]["distillation"]["evaluations"] == 6 and len(seen) == 1
    assert fit.callback_metrics["train/distillation"] > 0
    assert float(losses[-1]) > float(fit.callback_metrics["train/own"]), "the term is not in the loss"


def test_a_validation_that_borrows_the_training_step_takes_no_term(tmp_path):
    class Borrowing(modules.Classifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("val/own", self.training_step(batch, batch_idx))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    fit = trainer(tmp_path, pruning(monitor="val/own", mode="min", repair=Repair(ramp=False)))
    fit.fit(module := Borrowing(), *loaders())
    assert records(tmp_path)[0]["distillation"]["evaluations"] == 6
    found = fit.validate(module, loaders()[1], verbose=False)[0]
    assert found["val/own"] == pytest.approx(found["val/ce"])


@pytest.mark.parametrize("own", [True, False])
def test_every_rank_says_that_one_of_them_has_no_batch(monkeypatch, own):
    monkeypatch.setattr(samples, "sum_over_ranks", lambda trainer, sums: sums + 1)  # the other rank has none
    found = samples.Samples(SimpleNamespace(world_size=2), "net", lambda: [], "validation_step", "validation loader")
    if own:
        monkeypatch.setattr(samples.Samples, "_seen", lambda self, workers: iter([object()]))
    with pytest.raises(InputError, match=f"it holds no batch on {1 if own else 2} of 2 ranks; give more samples"):
        found.first()


def test_a_manual_loss_that_never_takes_the_term_stops_the_run(tmp_path):
    with pytest.raises(InputError, match="took no term in the whole epoch"):
        trainer(tmp_path, pruning(network="net")).fit(modules.Manual(takes_term=False), *loaders())
    with pytest.raises(InputError, match="never took the term"):
        trainer(tmp_path, Decorrelation(network="net")).fit(modules.Manual(takes_term=False), *loaders())


def test_decorrelation_changes_what_any_module_learns(tmp_path):
    ends = []
    for weight in (0.0, 30.0):
        fit = trainer(tmp_path, Decorrelation(weight, every_n_batches=1))
        fit.fit(modules.Classifier(), *loaders())
        ends.append(float(fit.callback_metrics["train/peer_overlap"]))
    assert ends[1] < 0.9 * ends[0]


class Stop(EarlyStopping):
    """Stops at the end of an epoch, as a metric without progress would."""

    def __init__(self, epoch):
        super().__init__("val/acc")
        self.epoch = epoch

    def on_validation_end(self, trainer, module):
        trainer.should_stop = trainer.should_stop or trainer.current_epoch >= self.epoch

    def on_train_epoch_end(self, trainer, module):
        pass


@pytest.mark.parametrize("options", [{"callbacks": [Stop(2)]}, {"max_steps": 7}, {"max_time": None}])
def test_a_run_that_ends_early_hands_over_what_it_has(tmp_path, options):
    callbacks = options.pop("callbacks", ())
    if "max_time" in options:

        class Enough(modules.Classifier):
            def on_train_batch_end(self, *_):
                self.trainer.should_stop = self.current_epoch == 2

        module, options = Enough(), {}
    else:
        module = modules.Classifier()
    fit = trainer(tmp_path, pruning(monitor="val/acc"), *callbacks, epochs=6, **options)
    fit.fit(module, *loaders())
    (record,) = records(tmp_path)
    after = fit.validate(module, loaders()[1], verbose=False)[0]["val/acc"]
    assert record["val/acc"]["after_repair"] == pytest.approx(after)
    small = load_compact(tmp_path / "compact", model=modules.network())
    assert all(torch.equal(value, module.net.state_dict()[name]) for name, value in small.state_dict().items())


def test_stages_that_were_not_reached_are_said(tmp_path):
    fit = trainer(tmp_path, pruning(2, monitor="val/acc"), Stop(0), epochs=6)
    with pytest.warns(UserWarning, match=r"stopped early at epoch 1, not done: channels \(epoch 2\); nothing was cut"):
        fit.fit(modules.Classifier(), *loaders())
    fit = trainer(tmp_path, pruning(2), epochs=6, max_steps=4)
    with pytest.raises(InputError, match="leaves no epoch for repair in a run of 2 epochs"):
        fit.fit(modules.Classifier(), *loaders())


def test_early_stopping_and_the_best_checkpoint_begin_anew_at_a_cut(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/ce", mode="min", filename="best-{epoch}")
    stop = EarlyStopping("val/ce", patience=1, mode="min", min_delta=-10)
    module = modules.Classifier()
    fit = trainer(tmp_path, pruning(2, monitor="val/ce", mode="min"), stop, best, epochs=4, enable_checkpointing=True)
    fit.fit(module, *loaders())
    assert records(tmp_path)[0]["protocol"]["forgot_best"] == ["EarlyStopping", "ModelCheckpoint"]
    saved = torch.load(best.best_model_path, weights_only=True)
    assert saved["epoch"] >= 2 and saved["state_dict"]["net.3.weight"].shape == module.net[3].weight.shape
    assert fit.test(module, loaders()[1], ckpt_path="best", verbose=False)


def test_checkpoints_carry_the_structure_to_test_and_to_a_new_process(tmp_path):
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
    fit = trainer(tmp_path, pruning(monitor="val/acc"), keep, enable_checkpointing=True)
    fit.fit(module := modules.Classifier(), *loaders())
    small = {name: value.clone() for name, value in module.state_dict().items()}
    fit.test(module, loaders()[1], ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert module.net[0].out_channels == 8 and not record_of(module.net).plans
    fit.test(module, loaders()[1], ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in small.items())
    fresh = modules.Classifier()
    trainer(tmp_path, pruning()).test(fresh, loaders()[1], ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in small.items())
    loaded = load_pruned(modules.Classifier, tmp_path / "epoch=2.ckpt")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in small.items())
    assert load_pruned(modules.Classifier, tmp_path / "epoch=0.ckpt").net[0].out_channels == 8
    with pytest.raises(InputError, match="no such file"):
        load_pruned(modules.Classifier, tmp_path / "none.ckpt")
    assert modules.Classifier.load_from_checkpoint(tmp_path / "epoch=0.ckpt").net[0].out_channels == 8
    with pytest.raises(RuntimeError, match=r"open this checkpoint with lit_prune\.load_pruned\(Class, path\)"):
        modules.Classifier.load_from_checkpoint(tmp_path / "epoch=2.ckpt")


@pytest.mark.parametrize("optimizer", [None, "anew"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, optimizer):
    def run(folder, epochs, checkpoint=None):
        keep = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
        staged = pruning(2, monitor="val/acc", optimizer=optimizer)
        stop = [] if epochs is None else [Stop(epochs)]
        fit = trainer(folder, staged, keep, *stop, epochs=4, enable_checkpointing=True)
        fit.fit(module := modules.OneCycle(), *loaders(), ckpt_path=checkpoint, weights_only=checkpoint and True)
        return module.state_dict()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = run(tmp_path / "whole", None)
        for epoch in (0, 1, 2):
            folder = tmp_path / f"parts{epoch}"
            run(folder, epoch)
            resumed = run(folder, None, folder / f"epoch={epoch}.ckpt")
            assert all(torch.equal(value, resumed[name]) for name, value in whole.items()), epoch


def rates_of(folder, callbacks):
    rates = []

    class Watch(modules.OneCycle):
        def on_train_batch_start(self, batch, batch_idx):
            rates.append(self.optimizers().param_groups[0]["lr"])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(folder, *callbacks, epochs=4).fit(Watch(), *loaders())
    return rates


def test_a_one_cycle_schedule_goes_on_over_the_cut_or_is_fitted_to_the_phase(tmp_path):
    plain = rates_of(tmp_path, [])
    assert rates_of(tmp_path, [pruning(2)]) == pytest.approx(plain)
    anew = rates_of(tmp_path, [pruning(2, optimizer="anew")])
    assert anew[:6] == pytest.approx(anew[6:]) and min(anew[:6]) == anew[5] < plain[5]


def test_an_optimizer_for_the_repair_is_used_in_modules_that_configure_their_own(tmp_path):
    used = []

    class Watch(modules.Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            used.append(type(self.optimizers().optimizer).__name__)

    trainer(tmp_path, pruning(optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))).fit(Watch(), *loaders())
    assert used == ["SGD"] * 3 + ["Adam"] * 6
    with pytest.raises(InputError, match="configure_optimizers gives 2 optimizers"):
        staged = pruning(optimizer=torch.optim.Adam, network="net")
        trainer(tmp_path, staged).fit(modules.Manual(), *loaders())


def test_a_second_run_in_one_folder_hands_over_its_own_network(tmp_path):
    staged = pruning(monitor="val/acc")
    runs = []
    for _ in range(2):  # the same callback object, on another module
        fit = trainer(tmp_path, staged)
        fit.fit(module := modules.Classifier(), *loaders())
        runs.append(records(tmp_path)[0])
        assert module.net[3].out_channels < 12, "the second module was not cut"
    assert staged.run and len(staged.records) == 1
    fit.fit_loop.max_epochs += 2
    fit.fit(module, *loaders())
    assert len(record_of(module.net).plans) == 1 and len(records(tmp_path)) == 1
    after = fit.validate(module, loaders()[1], verbose=False)[0]["val/acc"]
    assert records(tmp_path)[0]["val/acc"]["after_repair"] == pytest.approx(after)


REFUSED = {
    "backbone finetuning": ([BackboneFinetuning()], {}, "BackboneFinetuning adds parameter groups"),
    "weight averaging": ([WeightAveraging()], {}, "WeightAveraging keeps weights in the shape before"),
    "stochastic averaging": ([StochasticWeightAveraging(1e-2)], {}, "StochasticWeightAveraging keeps weights"),
    "unknown network": ([], {"network": "trunk"}, "Classifier has no submodule 'trunk'; its own are net"),
    "shuffling calibration": ([], {"calibration": DataLoader(loaders()[1].dataset, shuffle=True)}, "shuffles"),
    "no sample": ([], {"calibration": 0}, "calibration: 0 samples"),
    "never logged": ([], {"monitor": "val/miou", "epoch": 2}, "'val/miou' is not logged by a validation epoch"),
    "a field's name": ([], {"monitor": "epoch"}, "is the name of a field"),
    "no such mode": ([], {"mode": "most"}, "mode is 'most' .str.; give max or min"),
    "schedule alone": ([], {"scheduler": torch.optim.lr_scheduler.StepLR}, "no effect without"),
    "optimizer": ([], {"optimizer": "afresh"}, "optimizer is 'afresh' .str.; give a function, anew or None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_one_line_before_the_first_cut(tmp_path, case):
    callbacks, options, message = REFUSED[case]
    module = modules.Classifier()
    with pytest.raises(InputError, match=message) as raised:
        trainer(tmp_path, pruning(**options), *callbacks, enable_checkpointing=True).fit(module, *loaders())
    assert "\n" not in str(raised.value)
    assert module.net[3].out_channels == 12


class Odd(modules.Classifier):
    """A module whose network is shared, bypassed or compiled."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        if how == "shared":
            self.tied = nn.Linear(8, 4)
            self.tied.weight = self.net[10].weight
        elif how == "lazy":
            self.net[10] = nn.LazyLinear(4)
        elif how == "compiled":
            self.net = torch.compile(self.net, backend="eager")

    def setup(self, stage):
        if self.how == "compiled_in_setup":
            self.net.compile(backend="eager")

    def forward(self, pixels):
        if self.how == "bypassed":
            for layer in self.net:
                pixels = layer(pixels)
            return pixels
        return super().forward(pixels)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shared", "'net' shares the parameter tied.weight"),
        ("compiled", "goes through torch.compile"),
        ("compiled_in_setup", "goes through torch.compile"),
        ("lazy", "a lazy layer of Sequential has no weights before it runs"),
        ("bypassed", "validation_step of Odd does not call Sequential"),
    ],
)
def test_modules_that_cannot_be_cut_are_refused_in_one_line(tmp_path, how, message):
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, pruning(0), epochs=1).fit(Odd(how), *loaders())


def test_parts_of_the_network_that_the_module_holds_by_other_names_follow(tmp_path):
    class Aliased(modules.Classifier):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([self.net[0], self.net[3]])

    trainer(tmp_path, pruning()).fit(module := Aliased(), *loaders())
    assert module.parts[0] is module.net[0] and module.parts[1] is module.net[3]
    assert module.net[3].out_channels < 12


def test_two_validation_loaders_and_a_learning_rate_finder(tmp_path):
    class Two(modules.Classifier):
        def __init__(self):
            super().__init__()
            self.lr = 0.01

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    train, validation = loaders()
    staged = pruning(monitor="val/acc/dataloader_idx_1")
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    fit = trainer(tmp_path, staged, finder, epochs=6, enable_checkpointing=True)
    fit.fit(module := Two(), train, [validation, validation])
    assert module.lr != 0.01 and module.net[3].out_channels < 12
    assert set(records(tmp_path)[0]["val/acc/dataloader_idx_1"]) >= {"dense", "after_repair"}


def test_gradients_are_accumulated_and_clipped_as_the_trainer_says(tmp_path):
    fit = trainer(tmp_path, pruning(), accumulate_grad_batches=2, gradient_clip_val=0.1)
    fit.fit(module := modules.Classifier(), *loaders())
    assert fit.global_step == 6 and module.net[3].out_channels < 12
    assert F.cross_entropy(module(modules.images()), torch.arange(48) % 4).isfinite()
