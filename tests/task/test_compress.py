"""`compress` on answers that are no logits."""

import json

import pytest
import torch
from torch import nn

from lit_prune import compress
from lit_prune.compression import Recipe
from lit_prune.errors import InputError
from lit_prune.scores import score


class One(nn.Module):
    """One number for an image, or a detector's losses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Linear(6, 1)

    def number(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))[:, 0]

    def forward(self, x):
        return self.number(x)


class Detector(One):
    """Torchvision's protocol on images of one size."""

    def forward(self, images, targets=None):
        values = self.number(torch.stack(images))
        if self.training:
            return {"loss": (values - torch.stack([target["boxes"].sum() for target in targets])).square().mean()}
        return [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)} for _ in images]


def images(count=24):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_one_number_a_sample():
    recipe = Recipe(score="cmr_logit", allocation="global")
    small, report = compress(One().eval(), [(images(), images().mean((1, 2, 3)))], keep=0.7, recipe=recipe)
    assert report["compact"]["macs"] <= 0.7 * report["dense"]["macs"]
    assert {"mean_squared_error"} < set(report["compact"]) and report["images"] == 24
    assert small(images()).shape == (24,) and report["distortion"] < 1


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_answers_that_are_no_decisions_are_judged_by_their_variance(offset):
    """A number near 0 for one image, or a large mean of all, says nothing of how near two networks are."""
    model = One().eval()
    with torch.no_grad():
        model.head.bias += offset
    recipe = Recipe(score="cmr_logit", allocation="global", kind="delete")
    with pytest.warns(UserWarning, match=r"is off by \d+% of the variance"):
        _, report = compress(model, [(images(), images().mean((1, 2, 3)))], keep=0.2, recipe=recipe)
    assert report["agreement"] == 1 - report["distortion"]


def test_a_loss_for_a_batch_is_taken_image_by_image():
    targets = [{"boxes": torch.rand(1, 4), "labels": torch.ones(1).long()} for _ in range(8)]
    batches = [(list(images(8)), targets)]
    model = Detector().eval()
    found = score(model, "taylor", batches)
    assert all(values.isfinite().all() for values in found.values())


def test_nothing_that_can_be_solved_again_is_a_line():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2)).eval()
    with pytest.raises(InputError, match="every layer that reads channels which can be pruned is grouped"):
        score(net, "reconstruction", [images()])


def test_the_report_prints_what_was_asked_and_what_it_cost_and_the_warning_names_the_callers_line():
    recipe = Recipe(score="cmr_logit", allocation="global", kind="delete")
    with pytest.warns(UserWarning, match="is off by") as caught:
        _, report = compress(One().eval(), [(images(), images().mean((1, 2, 3)))], keep=0.2, recipe=recipe)
    said, dense, compact = str(report), report["dense"], report["compact"]
    assert f"MACs {dense['macs']:,} -> {compact['macs']:,} ({compact['macs'] / dense['macs']:.1%})" in said
    assert f"distortion of its prediction {report['distortion']:.3g}, on the 24 calibration samples" in said
    assert len(said) < 800 and json.loads(json.dumps(report)) == report
    assert {warning.filename for warning in caught} == {__file__}


class TwoStages(nn.Module):
    """A detector whose second head has a row for each proposal, of which there are as many as the first head says."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.rpn, self.roi_heads = nn.Module(), nn.Module()
        self.rpn.head, self.roi_heads.box_predictor = nn.Conv2d(8, 1, 1), nn.Linear(8, 4)

    def forward(self, images, targets=None):
        features = self.body(torch.stack(images))
        scores = self.rpn.head(features)
        rows = features.movedim(1, -1)[scores[:, 0] > scores.median()]
        boxes = self.roi_heads.box_predictor(rows)
        if self.training:
            return {"scores": scores.square().mean(), "boxes": boxes.square().mean()}
        return [{"boxes": boxes, "labels": boxes[:, 0], "scores": boxes[:, 0]} for _ in images]


def test_a_detector_with_proposals_is_compared_by_its_anchors_whatever_the_sizes_of_images():
    torch.manual_seed(1)
    sizes = [(6, 6), (6, 8), (5, 6)]
    batches = [
        ([torch.randn(3, *size) for _ in range(4)], [{"boxes": torch.zeros(1, 4), "labels": torch.zeros(1)}] * 4)
        for size in sizes
    ]
    recipe = Recipe(score="cmr_logit", allocation="global")
    _, report = compress(TwoStages().eval(), batches, keep=0.6, task="detection", seconds=1.0, recipe=recipe)
    assert 0 < report["distortion"] < 1 and report["images"] == 12
    assert report["repair"]["divergence_after"] <= report["repair"]["divergence_before"]


def test_one_number_a_sample_is_repaired():
    recipe = Recipe(score="cmr_logit", allocation="global", kind="constant")
    _, report = compress(One().eval(), [images(), images()], keep=0.7, seconds=1.0, recipe=recipe)
    assert report["repair"]["divergence_after"] < report["repair"]["divergence_before"]
