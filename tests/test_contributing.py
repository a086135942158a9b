"""The examples of CONTRIBUTING.md do what it says."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lit_prune
from lit_prune.lab.analyze.analysis import analyze
from lit_prune.lab.analyze.extras import PARTS, extra_names
from lit_prune.lab.analyze.request import AnalyzeRequest
from lit_prune.models import find_blocks
from lit_prune.models.families import FAMILIES
from lit_prune.scores import SCORES
from lit_prune.task.base import TASKS

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text()
BLOCKS = {title: block for title, block in re.findall(r"### (A[^\n]*)\n.*?```python\n(.*?)```", TEXT, re.DOTALL)}


def names_of(title: str) -> dict:
    """What the example under a title defines."""
    names: dict = {"__name__": "contributed"}
    exec(BLOCKS[title], names)
    return names


def test_the_score_is_found_by_name_and_ranks_channels(tiny_net):
    try:
        names_of("A score")
        found = lit_prune.score(tiny_net, "largest_weight", [(torch.randn(4, 3, 8, 8), torch.arange(4))])
    finally:
        SCORES.pop("largest_weight", None)
    assert found["conv1"].argmax() == tiny_net.conv1.weight.detach().abs().flatten(1).amax(1).argmax()


def test_the_data_set_serves_batches():
    data = names_of("A data set")["StripesData"](batch_size=8, calibration_size=8, num_workers=0)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 1, 16, 16) and set(labels.tolist()) <= {0, 1}


def test_the_task_gives_a_loss_to_any_network():
    task = names_of("A task")["Positive"]()
    assert TASKS.pop("positive") is type(task)
    images = torch.randn(4, 1, 3, 3)
    loss = task.loss(nn.Conv2d(1, 2, 3)(images), (images,))
    assert loss.shape == (4,) and (loss >= 0).all()


@pytest.mark.parametrize("title", BLOCKS)
def test_every_example_is_python(title):
    compile(BLOCKS[title], title, "exec")


def test_the_family_finds_its_blocks():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(3)))

        def forward(self, values):
            return self.tower(values)

    try:
        names_of("A family of blocks")
        blocks = find_blocks(Tower(), torch.randn(1, 3, 4, 4))
    finally:
        FAMILIES[:] = [family for family in FAMILIES if family.__module__ != "contributed"]
    assert [(block.name, block.stage) for block in blocks] == [(f"tower.{i}", "tower") for i in range(3)]


def test_the_extra_adds_its_table(tiny_net):
    extra_names.cache_clear()
    try:
        names_of("An extra of `analyze`")
        batches = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)]
        tables = analyze(tiny_net, batches, AnalyzeRequest(extras=("widths",)))
    finally:
        PARTS.pop("widths", None)
        extra_names.cache_clear()
    assert tables["widths"]["conv1"].tolist() == [8]
