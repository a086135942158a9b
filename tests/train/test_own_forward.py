"""Modules without a network apart: the layers lie in the LightningModule, whose own `forward` is the network's."""

import copy
import io
import json
import warnings

import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import Itself, loaders, pruning, trainer
from torch import nn

from lit_prune import AxisTrace, InputError, cost, load_compact, load_pruned, measure
from lit_prune.train.locate import find_path, network_at, told_apart

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Plain(nn.Module):
    """The same function as a network of its own."""

    def __init__(self, module: Itself) -> None:
        super().__init__()
        self.stem, self.branches, self.head, self.share = module.stem, module.branches, module.head, module.share
        self.temperature, self.features, self.join = 1.0, None, lambda maps: Itself.joined(self, maps)
        self.sides = list(self.branches.values())

    def forward(self, pixels):
        return Itself.forward(self, pixels)


@pytest.mark.parametrize("network", [None, "."])
def test_the_module_is_cut_taught_and_trained_on(tmp_path, network):
    module = Itself()
    fit = trainer(tmp_path, pruning(network=network, monitor="val/acc"))
    fit.fit(module, *loaders())
    assert module.stem[0].out_channels < 8 and module.branches["left"].out_channels < 12
    held = {id(p) for o in fit.optimizers for g in o.param_groups for p in g["params"]}
    assert held == {id(p) for p in module.parameters()}
    (record,) = [json.loads(line) for line in (tmp_path / "stages.jsonl").read_text().splitlines()]
    assert record["macs"]["after"] == cost(Plain(module), EXAMPLE).macs <= 0.6 * record["macs"]["dense"]
    assert record["distillation"]["evaluations"] == 2 * 3, "two epochs of three batches"
    small, images = load_compact(tmp_path / "compact", model=Itself()), next(iter(loaders()[0]))[0]
    assert torch.equal(small.eval()(images), module.eval()(images))


def test_what_the_forward_leaves_in_the_module_is_there_and_its_own_attributes_count():
    module = Itself().train()
    network, images = network_at(module, "."), torch.rand(4, 3, 8, 8)
    cool = module(images)
    assert module.features is not None and torch.equal(module.features, network_at(module, ".").features)
    module.temperature = 2.0
    torch.testing.assert_close(module(images), cool / 2)
    network.eval()
    assert module.training, "the network's mode is its own"
    torch.testing.assert_close(network(images), Plain(module).eval()(images))


def test_a_copy_of_the_module_computes_its_own_function():
    module = Itself().eval()
    network_at(module, ".")
    twin, images = copy.deepcopy(module), torch.rand(2, 3, 8, 8)
    before = twin(images)
    with torch.no_grad():
        module.head.weight.zero_()
    assert torch.equal(twin(images), before) and not torch.equal(module(images), before)


def test_after_a_run_nothing_of_ours_is_left_and_the_module_can_be_saved(tmp_path):
    trainer(tmp_path, pruning(), AxisTrace()).fit(module := Itself(), *loaders())
    assert not {"forward", "training_step", "on_save_checkpoint"} & set(vars(module))
    torch.save(module, io.BytesIO())


def test_a_resumed_run_equals_the_uninterrupted_one_and_its_checkpoint_opens(tmp_path):
    class Stop(ModelCheckpoint):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            trainer.should_stop = trainer.current_epoch == 1

    def run(folder, kind, checkpoint=None):
        keep = kind(folder, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
        fit = trainer(folder, pruning(), keep, epochs=4, enable_checkpointing=True)
        fit.fit(module := Itself(), *loaders(), ckpt_path=checkpoint, weights_only=checkpoint and True)
        return module.state_dict()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = run(tmp_path / "whole", ModelCheckpoint)
        run(tmp_path / "part", Stop)
        resumed = run(tmp_path / "part", ModelCheckpoint, tmp_path / "part" / "epoch=1.ckpt")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    opened = load_pruned(Itself, tmp_path / "whole" / "epoch=3.ckpt")
    assert all(torch.equal(value, opened.state_dict()[name]) for name, value in whole.items())


def test_a_trace_is_that_of_the_same_network_apart(tmp_path):
    trainer(tmp_path, AxisTrace(), epochs=1).fit(module := Itself(), *loaders())
    found = pd.read_parquet(tmp_path / "trace" / "epoch=001.parquet").drop(columns="epoch")
    pd.testing.assert_frame_equal(found, measure(Plain(module), loaders()[1]), rtol=1e-4, atol=1e-6)


def test_a_step_that_calls_parts_alone_is_refused_in_one_line(tmp_path):
    class Around(Itself):
        def training_step(self, batch, batch_idx):
            return self.joined(self.stem(batch[0])).mean()

        validation_step = LightningModule.validation_step

    with pytest.raises(InputError, match=r"Around does not call Around; name .* \(stem, branches, head\)"):
        trainer(tmp_path, pruning()).fit(Around(), loaders()[0])


def test_where_the_network_is():
    class Silent(LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)

    class Container(Itself):
        def __init__(self):
            super().__init__()
            self.model = nn.Module()  # holds the layers, and nobody calls it
            self.model.stem, self.model.branches, self.model.head = self.stem, self.branches, self.head

    assert find_path(Itself()) == find_path(Container()) == "."
    with pytest.raises(InputError, match="Silent itself, which has no forward"):
        find_path(Silent(), ".")
    with pytest.raises(InputError, match="holds several; name one by network=: encoder"):
        find_path(Silent())


def test_a_network_that_is_a_part_of_the_module_is_said():
    class Detector(LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Linear(4, 5), nn.Linear(5, 14)  # 25 and 84 parameters

        def forward(self, values):
            return self.head(self.backbone(values))

    module = Detector()
    assert find_path(module) == "backbone"
    said = told_apart(module, "backbone")
    assert "'backbone', 23% of the parameters of Detector" in said and "network='.' takes the whole module" in said
    assert told_apart(module, ".") == ""
