"""The examples of CONTRIBUTING.md do what it says."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lit_prune
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
