"""Detectors whose second stage reads what their first stage proposes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from lit_prune import compress
from lit_prune.compression import Recipe
from lit_prune.replace import Replacement, replace_mechanisms
from lit_prune.structure import Plan, apply_plan, trace_groups
from lit_prune.structure.example import Example
from lit_prune.task import find_task


class Levels(nn.Sequential):
    """Maps of two sizes."""

    out_channels = 8

    def forward(self, images):
        fine = super().forward(images)
        return {"0": fine, "1": F.max_pool2d(fine, 2)}


@pytest.fixture
def detector() -> FasterRCNN:
    torch.manual_seed(0)
    body = Levels(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    anchors = AnchorGenerator(((8, 16), (16, 32)), ((1.0,), (1.0,)))
    sizes = {"min_size": 32, "max_size": 64, "box_batch_size_per_image": 12, "rpn_pre_nms_top_n_test": 40}
    sampled = {"rpn_post_nms_top_n_train": 30, "rpn_post_nms_top_n_test": 30, "rpn_pre_nms_top_n_train": 40}
    heads = {"box_roi_pool": MultiScaleRoIAlign(["0", "1"], 7, 2)}
    heads |= {"box_head": TwoMLPHead(8 * 49, 16), "box_predictor": FastRCNNPredictor(16, 3)}
    return FasterRCNN(body, rpn_anchor_generator=anchors, **heads, **sizes, **sampled).eval()


def scenes(count: int, targets: bool) -> list:
    draw = torch.Generator().manual_seed(1)
    batches = []
    for width in (32, 40, 32):
        images = [torch.rand(3, 32, width, generator=draw) for _ in range(count)]
        boxes = {"boxes": torch.tensor([[4.0, 4.0, 20.0, 24.0]]), "labels": torch.tensor([1])}
        batches.append((images, [dict(boxes) for _ in images]) if targets else images)
    return batches


@pytest.mark.parametrize("targets", [True, False])
def test_a_layer_of_the_second_stage_is_compared_on_the_originals_proposals(detector, targets):
    """A twin with another first stage proposes other boxes, and has the original's rows all the same."""
    task = find_task("detection")
    twin = copy.deepcopy(detector)
    nn.init.normal_(twin.rpn.head.cls_logits.weight, generator=torch.Generator().manual_seed(2))
    rows: list[torch.Tensor] = []
    for network in (detector, twin):
        network.roi_heads.box_head.fc6.register_forward_pre_hook(lambda _, args: rows.append(args[0].clone()))
    with torch.no_grad():
        with task.paired(detector, twin):
            for batch in scenes(2, targets):
                for network in (detector, twin):
                    task.run(network, batch)
        paired, rows[:] = list(rows), []
        for network in (detector, twin):
            task.run(network, scenes(2, targets)[0])
    for mine, its in zip(paired[::2], paired[1::2], strict=True):
        torch.testing.assert_close(its, mine)
    assert rows[0].shape != rows[1].shape or not torch.allclose(rows[0], rows[1])


@pytest.mark.parametrize("training", [False, True])
def test_maps_that_both_stages_read_are_cut_as_if_they_were_silenced(detector, training):
    images = scenes(2, targets=False)[0]
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 20.0, 24.0]]), "labels": torch.tensor([1])} for _ in images]
    graph = trace_groups(detector, Example((images,), {}))
    assert not graph.by_name["backbone.2"].protected
    plan = Plan(keep_channels={"backbone.2": (0, 2, 3, 5, 7)}, sizes={"backbone.2": 8})
    small = apply_plan(detector, plan, Example((images,), {}))
    with torch.no_grad():
        for part in (detector.backbone[2].weight, detector.backbone[2].bias):
            part[[1, 4, 6]] = 0
    answers = []
    for network in (detector, small):
        torch.manual_seed(3)
        answers.append(network.train(training)(images, targets) if training else network.eval()(images))
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-5)


def test_layers_of_both_stages_are_solved_again_though_the_cut_moves_the_proposals(detector):
    """Half of the units between the two layers of the second stage are copies, so that its reader loses nothing."""
    with torch.no_grad():
        for part in (detector.roi_heads.box_head.fc6.weight, detector.roi_heads.box_head.fc6.bias):
            part[8:] = part[:8]
    keep = {"backbone.0": tuple(range(6)), "roi_heads.box_head.fc6": tuple(range(8))}
    plan = Plan(keep_channels=keep, sizes={"backbone.0": 8, "roi_heads.box_head.fc6": 16})
    errors = {}
    for kind in ("delete", "constant", "affine", "refit"):
        settings = Replacement(unsupported="delete")
        found = replace_mechanisms(detector, plan, scenes(4, targets=True), kind, settings=settings, task="detection")
        errors[kind] = found.report["layers"]["roi_heads.box_head.fc7"]["error"]
    assert max(errors["refit"], errors["affine"]) < 0.5 * min(errors["constant"], errors["delete"])


def test_it_is_compressed_and_repaired(detector):
    recipe = Recipe(score="cmr_logit", allocation="global")
    small, report = compress(detector, scenes(4, targets=True), keep=0.8, task="detection", seconds=1.0, recipe=recipe)
    assert report["compact"]["macs"] <= 0.8 * report["dense"]["macs"]
    assert report["repair"]["divergence_after"] <= report["repair"]["divergence_before"]
    assert "select_training_samples" not in vars(small.roi_heads) and not small.rpn._forward_hooks
