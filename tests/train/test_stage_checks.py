"""What stages ask of the network is compared with it before anything is trained."""

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

import lit_prune
from lit_prune import BlockStage, ChannelStage, StagedPruning
from lit_prune.errors import InputError
from lit_prune.models import build_backbone
from lit_prune.train.distillation import Repair
from lit_prune.train.stage_checks import check_stages

SHAPE = (1, 8, 8)
PAPER = {"score": "proxy", "allocation": "uniform", "replace": "delete"}


@pytest.fixture
def resnet() -> nn.Module:
    return build_backbone("cifar_resnet20", num_classes=10, in_channels=1)


IMPOSSIBLE = {
    "no such group": ([ChannelStage(0.5, protect=("layer9",))], "stage channels: protect: no group is called 'layer9'"),
    "in a later stage": ([BlockStage(0, 0.3), ChannelStage(0.5, 1, protect=("x",))], "no group is called 'x'"),
    "nothing is left to cut": ([ChannelStage(0.5, part="mid", protect=("MID",))], "no group of channels may be cut"),
    "no block goes": ([BlockStage(0, remove_ratio=0.05)], "removes nothing"),
    "no such stage": ([BlockStage(0, keep_blocks={"layer7": [0]})], "stage 'layer7' is unknown"),
    "no such block": ([BlockStage(0, keep_blocks={"layer1": [0, 5]})], "layer1 has positions 0 to 2, got 5"),
    "blocks are too few": ([BlockStage(0, keep=0.01)], "cannot reach keep=0.01"),
    "channels are too few": ([ChannelStage(0.01, part="mid", cap=0.5)], "cannot reach keep=0.01 of macs: with every"),
    "more than there are": ([BlockStage(0, remove_count=99)], "asks for 99 blocks, and 6 can go"),
    "more in all": ([BlockStage(0, remove_count=4), BlockStage(1, remove_count=3)], "7 blocks, and 6 can go"),
    "keep is all": ([ChannelStage(1.0)], "removes nothing: keep=1.0 of the dense macs, and the dense network leaves 1"),
    "keep rises": ([ChannelStage(0.4), ChannelStage(0.5, 1)], "stage channels before it leaves 0.4"),
    "no group is so wide": ([ChannelStage(0.9, round_to=64)], "stage channels: round_to=64: none of the 12 selected"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_the_network_does_not_have_or_cannot_lose_is_refused(resnet, case):
    stages, message = IMPOSSIBLE[case]
    if "MID" in getattr(stages[0], "protect", ()):
        graph = lit_prune.structure.trace_groups(resnet, torch.randn(1, *SHAPE))
        names = tuple(group.name for group in graph.prunable if group.role == "mid")
        stages = [ChannelStage(0.5, part="mid", protect=names)]
    before = {name: value.clone() for name, value in resnet.state_dict().items()}
    with pytest.raises(InputError, match=message) as raised:
        check_stages(resnet, stages, torch.randn(1, *SHAPE))
    assert "\n" not in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in resnet.state_dict().items())


def test_a_network_whose_layers_are_chosen_by_the_data_is_refused():
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.low, self.high, self.head = (nn.Linear(size, 8) for size in (64, 8, 8, 8))

        def forward(self, images):
            seen = self.trunk(images.flatten(1)).relu()
            return self.head(self.high(seen) if seen.mean() > 0.5 else self.low(seen))

    with pytest.raises(InputError, match="whether layer '(high|low)' runs depends on values of the input") as raised:
        check_stages(Chooses(), [ChannelStage(0.5)], torch.randn(1, *SHAPE))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("stages", [
    [BlockStage(0, 0.3), ChannelStage(0.5, 1)],
    [BlockStage(0, keep=0.8), ChannelStage(0.5, 1, part="planes"), ChannelStage(0.4, 2, part="mid")],
    [BlockStage(0, keep_blocks={"layer1": [0]}), ChannelStage(0.5, 1, protect=("layer1.1.conv1",))],
    [ChannelStage(0.5, budget="channels"), ChannelStage(0.5, 1, budget="channels", allocation="global")],
])  # fmt: skip
def test_stages_that_work_are_not_refused(resnet, stages):
    assert check_stages(resnet, stages, torch.randn(1, *SHAPE))


def test_a_network_without_blocks_is_named():
    with pytest.raises(InputError, match="Sequential has no block that could go"):
        check_stages(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), [BlockStage(0, 0.3)], torch.randn(1, *SHAPE))


def staged_of(trainer) -> StagedPruning:
    return next(callback for callback in trainer.callbacks if isinstance(callback, StagedPruning))


def test_a_protected_group_that_goes_with_its_block_stops_no_later_stage(tmp_path, make_run):
    trainer, module, data = make_run(tmp_path, max_epochs=3)
    last = ChannelStage(0.5, 2, protect=("layer1.1.conv1",), **PAPER)
    staged_of(trainer).stages = (BlockStage(1, keep_blocks={"layer1": [0]}), last)
    trainer.fit(module, datamodule=data)
    assert len(staged_of(trainer).records) == 2


def save(folder, **arguments) -> str:
    arguments = {"num_classes": 10, "in_channels": 1, **arguments}
    model = build_backbone("cifar_resnet20", **arguments)
    details = {"backbone": "cifar_resnet20", "arguments": arguments, "input_shape": (arguments["in_channels"], 8, 8)}
    lit_prune.save_compact(folder, model, plans=[], **details)
    return str(folder)


TEACHERS = {
    "other classes": ({"num_classes": 7}, {}, [("mid", 1)], "no tensor in common"),
    "other images": ({"in_channels": 3}, {}, [("mid", 1)], "teacher: the network does not take"),
    "features are cut": ({}, {}, [("planes", 1)], "has features that a stage cuts"),
}


@pytest.mark.parametrize("case", TEACHERS)
def test_a_teacher_that_the_network_cannot_be_compared_with_is_refused_before_training(tmp_path, make_run, case):
    arguments, options, stages, message = TEACHERS[case]
    teacher = save(tmp_path / "teacher", **arguments)
    trainer, module, data = make_run(tmp_path / "run", stages=stages, teacher=teacher, **options)
    with pytest.raises(InputError, match=message):
        trainer.fit(module, datamodule=data)
    assert trainer.global_step == 0


def test_a_teacher_with_features_that_stay_or_are_not_compared_is_taken(tmp_path, make_run):
    teacher = save(tmp_path / "teacher")
    for stages, repair in (([("mid", 1)], Repair()), ([("planes", 1)], Repair(beta=0.0))):
        folder = tmp_path / stages[0][0]
        trainer, module, data = make_run(folder, stages=stages, max_epochs=3, teacher=teacher, repair=repair)
        trainer.fit(module, datamodule=data)
        assert staged_of(trainer).records[0]["distillation"]["evaluations"] > 0


class StopAtEpochFour(Callback):
    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 4:
            raise InterruptedError


def test_a_resumed_run_takes_corrected_stages_where_they_are_not_done_yet(tmp_path, make_run):
    def run(*stages, **options):
        trainer, module, data = make_run(tmp_path, max_epochs=7, **options)
        staged_of(trainer).stages = stages
        last = tmp_path / "checkpoints" / "last.ckpt"
        trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=last.exists())
        return [record["name"] for record in staged_of(trainer).records]

    done = BlockStage(2, 0.3)
    with pytest.raises(InterruptedError):
        run(done, ChannelStage(0.5, 5, **PAPER), callbacks=[StopAtEpochFour()])
    with pytest.raises(InputError, match="stage blocks at epoch 2 is done, with remove_ratio=0.3"):
        run(BlockStage(2, 0.5), ChannelStage(0.5, 5))
    with pytest.raises(InputError, match="was not done, and the checkpoint is already at epoch 4"):
        run(done, ChannelStage(0.5, 3))
    assert run(done, ChannelStage(0.6, 5, "mid", **PAPER)) == ["blocks", "mid"]
