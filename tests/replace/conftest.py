"""A classifier small enough for closed forms, and labelled images for it."""

import pytest
import torch
from torch import nn


class Classifier(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Linear(5, 7)
        self.head = nn.Linear(7, classes)

    def forward(self, images):
        return self.head(torch.relu(self.body(images)))


@pytest.fixture
def make_classifier():
    def make(seed: int = 0, classes: int = 4) -> nn.Module:
        torch.manual_seed(seed)
        return Classifier(classes).double().eval()

    return make


@pytest.fixture
def net(make_classifier):
    return make_classifier()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(30, 5, generator=generator, dtype=torch.float64), torch.randint(4, (30,), generator=generator))
        for _ in range(2)
    ]
