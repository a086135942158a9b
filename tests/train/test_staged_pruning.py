import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lit_prune import BlockStage, cost, load_compact
from lit_prune.errors import InputError


@pytest.fixture(scope="module")
def finished():
    return []


@pytest.fixture
def run(finished, make_run, tmp_path_factory):
    """One finished two-stage run, shared by the tests that only read it: folder, module, data, records."""
    if not finished:  # trained within a test, on the device of the tests
        folder = tmp_path_factory.mktemp("run")
        trainer, module, data = make_run(folder, settings={})
        trainer.fit(module, datamodule=data)
        finished.extend((folder, module, data))
    records = [json.loads(line) for line in (finished[0] / "stages.jsonl").read_text().splitlines()]
    return *finished, records


def test_records_tell_what_was_removed_and_what_it_cost(run):
    folder, module, _, records = run
    assert [record["name"] for record in records] == ["blocks", "channels"]
    assert [record["epoch"] for record in records] == [2, 4]
    assert records[0]["macs"]["after"] == records[1]["macs"]["before"] < records[0]["macs"]["before"]
    counted = cost(module.backbone, module.example_input)
    assert records[1]["macs"]["after"] == counted.macs and records[1]["params"]["after"] == counted.params
    assert records[1]["macs"]["after"] <= 0.5 * records[0]["macs"]["dense"]
    for record in records:
        assert all(0 <= value <= 1 for value in record["accuracy"].values())
        assert set(record["seconds"]) == {"plan", "surgery", "recalibration", "repair"}
    widths = {name: layer.out_channels for name, layer in counted.layers.items()}
    final = {name: width["after"] for name, width in records[1]["widths"].items() if width["after"]}
    assert final == widths


def test_compact_folder_is_the_trained_network_bit_for_bit_and_trains_on(run):
    folder, module, data, _ = run
    images, labels = next(iter(data.val_dataloader()))
    compact, trained = (net.eval().to(images.device) for net in (load_compact(folder / "compact"), module.backbone))
    assert torch.equal(compact(images), trained(images))
    loss = torch.nn.functional.cross_entropy(compact.train()(images), labels)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in compact.parameters() if p.ndim > 1)


def test_report_has_the_figures_of_the_contract(run):
    folder, _, _, records = run
    report = json.loads((folder / "compact" / "report.json").read_text())
    fields = {
        "accuracy",
        "macs",
        "params",
        "latency_ms",
        "throughput",
        "throughput_batch",
        "bytes",
        "latency_spread_ms",
        "noisy",
    }
    assert set(report["dense"]) == set(report["compact"]) == fields
    assert report["compact"]["macs"] == records[-1]["macs"]["after"]
    assert report["compact"]["accuracy"] == records[-1]["accuracy"]["after_repair"]
    assert [stage["name"] for stage in report["stages"]] == ["blocks", "channels"]


def test_teacher_is_the_dense_network_and_no_part_of_the_checkpoint(run):
    folder, _, _, records = run
    teacher = load_file(folder / "teacher" / "model.safetensors")
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert not any("teacher" in name for name in checkpoint["state_dict"])
    dense = torch.load(folder / "checkpoints" / "dense.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, dense[f"backbone.{name}"]) for name, value in teacher.items())


@pytest.mark.parametrize(
    ("stages", "epochs", "message"),
    [
        ([("blocks", 3), ("channels", 2)], 6, r"stage epochs must increase, one stage an epoch, got \[3, 2\]"),
        ([("blocks", 2), ("channels", 6)], 6, "stage channels at epoch 6 leaves no epoch for repair"),
        ([("blocks", 9)], 6, "leaves no epoch for repair in a run of 6 epochs"),
    ],
)
def test_schedules_that_cannot_work_are_refused_before_training(tmp_path, make_run, stages, epochs, message):
    trainer, module, data = make_run(tmp_path, stages=stages, max_epochs=epochs)
    with pytest.raises(InputError, match=message):
        trainer.fit(module, datamodule=data)


def test_missing_teacher_is_named(tmp_path, make_run):
    trainer, module, data = make_run(tmp_path, stages=[("blocks", 0)], max_epochs=1, teacher=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="teacher missing: .*nowhere"):
        trainer.fit(module, datamodule=data)


def test_a_stage_that_removes_nothing_is_an_error(tmp_path, make_run):
    trainer, module, data = make_run(tmp_path, stages=[("blocks", 0)], max_epochs=1)
    staged = next(callback for callback in trainer.callbacks if hasattr(callback, "stages"))
    staged.stages = (BlockStage(0, remove_ratio=0.05),)
    with pytest.raises(InputError, match="removes nothing"):
        trainer.fit(module, datamodule=data)


@pytest.mark.real  # on another, a network whose graph a traceback holds cannot be moved
def test_nan_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, make_run):
    from lightning.pytorch import Callback

    class Poison(Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            if trainer.current_epoch == 1:
                with torch.no_grad():
                    pl_module.backbone.linear.weight.fill_(float("nan"))

    trainer, module, data = make_run(tmp_path, stages=[], max_epochs=3, callbacks=[Poison()])
    with pytest.raises(InputError, match="loss is NaN or infinite in epoch 1"):
        trainer.fit(module, datamodule=data)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["epoch"] == 0 and all(value.isfinite().all() for value in saved["state_dict"].values())


def test_frozen_parameters_are_refused(tmp_path, make_run):
    trainer, module, data = make_run(tmp_path, stages=[])
    module.requires_grad_(False)
    with pytest.raises(InputError, match="all parameters of cifar_resnet20 are frozen"):
        trainer.fit(module, datamodule=data)


def test_checkpoint_of_another_network_is_refused(run, tmp_path, make_run):
    from lit_prune.train.classifier import LitClassifier

    folder, *_ = run
    trainer, _, data = make_run(tmp_path)
    other = LitClassifier("cifar_resnet32", 10, data.image_shape)
    with pytest.raises(InputError, match="checkpoint of another network: it holds cifar_resnet20"):
        trainer.fit(other, datamodule=data, ckpt_path=folder / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("kind", ["constant", "affine", "refit"])
def test_stand_ins_survive_training_and_the_compact_folder(tmp_path, make_run, kind):
    trainer, module, data = make_run(tmp_path, stages=[("mid", 1)], max_epochs=2)
    data.calibration_size = 96  # 4 positions each: more than the 288 values that a layer reads
    staged = next(callback for callback in trainer.callbacks if hasattr(callback, "stages"))
    staged.stages = (replace(staged.stages[0], replace=kind),)
    trainer.fit(module, datamodule=data)
    images, _ = next(iter(data.val_dataloader()))
    compact, trained = (net.eval().to(images.device) for net in (load_compact(tmp_path / "compact"), module.backbone))
    assert torch.equal(compact(images), trained(images))
    record = json.loads((tmp_path / "stages.jsonl").read_text())
    assert record["protocol"]["stage"]["replace"] == kind and record["macs"]["after"] <= 0.5 * record["macs"]["dense"]


def test_frontier_hands_over_the_last_stage_whose_repair_held(tmp_path, make_run):
    trainer, module, data = make_run(tmp_path, stages=[("blocks", 1), ("mid", 2), ("channels", 3)], max_epochs=5)
    staged = next(callback for callback in trainer.callbacks if hasattr(callback, "stages"))
    staged.tolerance = 1.0  # never fails by itself
    failing = {"count": 0}
    original = staged.figures.measure

    def measure(trainer, path):
        if len(staged.records) == 2 and trainer.current_epoch == 2:  # the repair of the second stage "fails"
            failing["count"] += 1
            return -1.0
        return original(trainer, path)

    staged.figures.measure = measure
    trainer.fit(module, datamodule=data)
    assert failing["count"] and trainer.current_epoch == 3
    report = json.loads((tmp_path / "compact" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["blocks"]
    held = torch.load(tmp_path / "checkpoints" / "1-blocks.ckpt", weights_only=True)["state_dict"]
    compact = load_compact(tmp_path / "compact").state_dict()
    assert all(torch.equal(value, held[f"backbone.{name}"]) for name, value in compact.items())


def test_statistics_are_measured_anew_only_where_nothing_has_solved_them(tmp_path, make_run):
    trainer, module, data = make_run(
        tmp_path, stages=[("blocks", 0), ("mid", 1)], max_epochs=2, recalibration_batches=None, settings={}
    )
    trainer.fit(module, datamodule=data)
    blocks, channels = (json.loads(line) for line in (tmp_path / "stages.jsonl").read_text().splitlines())
    assert blocks["protocol"]["recalibration_batches"] == 50 and channels["protocol"]["recalibration_batches"] == 0
    assert channels["accuracy"]["after_recalibration"] == channels["accuracy"]["after_surgery"]
