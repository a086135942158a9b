"""Stand-ins, interchange and recalibration from inputs alone, on networks that are no classifiers."""

import copy
import math

import pytest
import torch
from torch import nn

from lit_prune.replace import Replacement, interchange, replace_mechanisms
from lit_prune.structure import Plan
from lit_prune.task import Segmentation
from lit_prune.train.batchnorm import recalibrate_batchnorm

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
PLAN = Plan(keep_channels={"first": (0, 1, 3, 5)}, sizes={"first": 8})


class Dense(nn.Module):
    """Answers a map."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return {"out": self.head(torch.relu(self.second(torch.relu(self.norm(self.first(x))))))}


class Both(nn.Module):
    """Reads an image and a vector."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.vector, self.head = nn.Linear(5, 6), nn.Linear(12, 2)

    def forward(self, image, vector):
        maps = torch.relu(self.second(torch.relu(self.first(image))))
        return self.head(torch.cat([maps.mean((2, 3)), torch.relu(self.vector(vector))], 1))


CASES = {
    "x": (Dense, [IMAGES[:6], IMAGES[6:]]),
    "dict": (Dense, [{"image": IMAGES[:6]}, {"image": IMAGES[6:]}]),
    "x, y": (Dense, [(IMAGES[:6], torch.randint(4, (6, 8, 8))), (IMAGES[6:], torch.randint(4, (6, 8, 8)))]),
    "two inputs": (Both, [((IMAGES[:6], VECTORS[:6]), None), ((IMAGES[6:], VECTORS[6:]), None)]),
}


@pytest.mark.parametrize("case", CASES)
def test_stand_ins_and_swaps_need_inputs_alone(case):
    build, batches = CASES[case]
    model = build().eval()
    errors = {}
    for kind in ("delete", "constant", "affine", "refit"):
        settings = Replacement(ridge=1e-9, held_out=0.0, clipped=False) if kind == "refit" else Replacement()
        reduced = replace_mechanisms(model, PLAN, batches, kind=kind, settings=settings)
        errors[kind] = reduced.report["layers"]["second"]["error"]
        assert reduced.report["images"] == 12 and reduced.model.first.out_channels == 4
    assert errors["refit"] <= errors["affine"] * 1.01 <= errors["constant"] * 1.02 <= errors["delete"] * 1.03
    found = interchange(model, reduced, batches)
    assert found.low.shape == found.high.shape and found.low.shape[0] == 2000 and found.iia <= 1
    report = found.report()
    assert report["certificate"] is None and math.isnan(report["kl"])


def test_swaps_of_a_segmentation_count_pixels():
    build, batches = CASES["x, y"]
    model = build().eval()
    reduced = replace_mechanisms(model, PLAN, batches, kind="refit")
    found = interchange(model, reduced, batches, task=Segmentation())
    same = (found.low.argmax(1) == found.high.argmax(1)).double().mean()
    assert found.iia == pytest.approx(float(same))


def test_recalibration_reads_no_labels():
    one, two = Dense(), Dense()
    assert recalibrate_batchnorm(one, CASES["x"][1]) == recalibrate_batchnorm(two, CASES["x, y"][1]) == 2
    assert torch.equal(one.norm.running_mean, two.norm.running_mean)
    outputs = Dense().first(IMAGES)
    torch.testing.assert_close(one.norm.running_mean, outputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    assert not copy.deepcopy(one).norm.running_mean.equal(torch.zeros(8))
