"""Networks of somebody's own on the command line: `--model.backbone package.module:callable`."""

import sys
import types

import pytest
import torch
from torch import nn

from lit_prune import LitClassifier
from lit_prune.models import taken_arguments

DATA = {"num_classes": 4, "in_channels": 1}


class Plain(nn.Sequential):
    """Its channels and classes are written in it."""

    def __init__(self, width: int = 6):
        super().__init__(nn.Conv2d(1, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def with_classes(num_classes: int) -> nn.Module:
    return Plain()


def with_anything(**arguments) -> nn.Module:
    return Plain()


@pytest.fixture(autouse=True)
def mine(monkeypatch):
    module = types.ModuleType("mine")
    module.Plain, module.with_classes, module.with_anything = Plain, with_classes, with_anything
    monkeypatch.setitem(sys.modules, "mine", module)


@pytest.mark.parametrize(
    ("backbone", "taken"),
    [
        ("mine:Plain", {}),
        ("mine:with_classes", {"num_classes": 4}),
        ("mine:with_anything", DATA),
        ("resnet18", DATA),
    ],
)
def test_a_callable_gets_what_it_names(backbone, taken):
    assert taken_arguments(backbone, DATA) == taken


def test_a_network_without_arguments_for_the_data_is_trained_and_its_own_are_kept():
    module = LitClassifier("mine:Plain", num_classes=4, image_shape=(1, 8, 8), arguments={"width": 3})
    assert module.backbone(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
    assert module.arguments == {"width": 3}
