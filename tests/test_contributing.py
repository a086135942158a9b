"""The examples of CONTRIBUTING.md do what it says."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lit_prune
from lit_prune.lab.analyze.analysis import analyze
from lit_prune.lab.analyze.extras import EXTRAS, extra_names
from lit_prune.lab.analyze.request import AnalyzeRequest
from lit_prune.models import find_blocks
from lit_prune.models.families import FAMILIES
from lit_prune.replace import STAND_INS
from lit_prune.report import write_report
from lit_prune.report.sections import SECTIONS
from lit_prune.scores import SCORES
from lit_prune.structure import CostModel, trace_groups
from lit_prune.structure.budgets import BUDGETS, find_budget
from lit_prune.structure.layers import LAYERS
from lit_prune.task.base import TASKS
from lit_prune.train.stages import ChannelStage

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


@pytest.fixture
def image():
    return torch.randn(2, 3, 8, 8)


def test_the_budget_is_kept_by_a_plan(tiny_net, image):
    try:
        names_of("A budget")
        ranks = lit_prune.score(tiny_net, "magnitude")
        plan = lit_prune.make_plan(tiny_net, ranks, image, budget="traffic", keep=0.6)
        small = lit_prune.apply_plan(tiny_net, plan, image)
        traffic = find_budget("traffic")
        assert traffic.of(small, image) <= 0.6 * traffic.of(tiny_net, image)
        assert ChannelStage(0.6, budget="traffic").budget == "traffic"
    finally:
        BUDGETS.pop("traffic", None)


def test_the_stand_in_folds_into_its_readers(tiny_net, image):
    plan = lit_prune.make_plan(tiny_net, lit_prune.score(tiny_net, "magnitude"), image, keep=0.6)
    try:
        names_of("A stand-in")
        batches = [(torch.randn(64, 3, 8, 8), None)]
        found = {
            kind: lit_prune.replace_mechanisms(tiny_net, plan, batches, kind).report["layers"]
            for kind in ("nearest", "delete")
        }
    finally:
        STAND_INS.pop("nearest", None)
    errors = {kind: sum(layer["error"] for layer in layers.values()) for kind, layers in found.items()}
    assert errors["nearest"] < errors["delete"]


def test_the_type_of_layer_is_cut_like_the_networks_silenced_units():
    try:
        equalized = names_of("A type of layer")["Equalized"]
        model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), equalized(12, 9), nn.ReLU(), nn.Linear(9, 3))
        values = torch.randn(4, 5)
        graph = trace_groups(model, values)
        assert [(group.name, group.size) for group in graph.prunable] == [("0", 12), ("2", 9)]
        plan = lit_prune.Plan(keep_channels={"0": (0, 3, 7), "2": (1, 2, 8)}, sizes={"0": 12, "2": 9})
        small = lit_prune.apply_plan(model, plan, values)
        counted = CostModel.build(model, graph, values)
        assert lit_prune.cost(small, values).macs == counted.macs(counted.widths(plan.keep_channels)) == 33
    finally:
        LAYERS.pop("equalized linear", None)
    silenced = [torch.zeros(size).scatter(0, torch.tensor(kept), 1) for size, kept in ((12, [0, 3, 7]), (9, [1, 2, 8]))]
    inner = torch.relu(model[2](torch.relu(model[0](values)) * silenced[0])) * silenced[1]
    torch.testing.assert_close(small(values), model[4](inner))


def test_the_section_stands_on_the_page(tmp_path):
    try:
        names_of("A section of the report")
        (tmp_path / "config.yaml").write_text("seed_everything: 1\n")
        assert "Length of the configuration" in write_report(tmp_path).read_text()
    finally:
        SECTIONS.pop("length", None)


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
        FAMILIES.pop("towers", None)
    assert [(block.name, block.stage) for block in blocks] == [(f"tower.{i}", "tower") for i in range(3)]


def test_the_extra_adds_its_table(tiny_net):
    extra_names.cache_clear()
    try:
        names_of("An extra of `analyze`")
        batches = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)]
        tables = analyze(tiny_net, batches, AnalyzeRequest(extras=("widths",)))
    finally:
        EXTRAS.pop("widths", None)
        extra_names.cache_clear()
    assert tables["widths"]["conv1"].tolist() == [8]
