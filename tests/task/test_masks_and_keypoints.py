"""Detectors that answer masks or keypoints beside boxes: third branches of the second stage are cut like the others."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import KeypointRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from lit_prune.structure import Plan, apply_plan, trace_groups
from lit_prune.structure.example import Example

BRANCHES = {
    "masks": ("roi_heads.mask_head.0.0", "roi_heads.mask_head.1.0", "roi_heads.mask_predictor.conv5_mask"),
    "keypoints": ("roi_heads.keypoint_head.0", "roi_heads.keypoint_head.2"),
}
STAGES = ("backbone.0", "backbone.2", "rpn.head.conv.0.0", "roi_heads.box_head.fc6", "roi_heads.box_head.fc7")


class Levels(nn.Sequential):
    """Maps of two sizes."""

    out_channels = 8

    def forward(self, images):
        fine = super().forward(images)
        return {"0": fine, "1": F.max_pool2d(fine, 2)}


def _detector(answers: str) -> nn.Module:
    torch.manual_seed(0)
    body = Levels(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    anchors = AnchorGenerator(((8, 16), (16, 32)), ((1.0,), (1.0,)))
    parts = {"rpn_anchor_generator": anchors, "min_size": 32, "max_size": 64, "box_batch_size_per_image": 12}
    parts |= {f"rpn_{when}_nms_top_n_{mode}": 20 for when in ("pre", "post") for mode in ("train", "test")}
    parts |= {"box_roi_pool": MultiScaleRoIAlign(["0", "1"], 7, 2), "box_head": TwoMLPHead(8 * 49, 16)}
    parts["box_predictor"] = FastRCNNPredictor(16, 3)
    pool = MultiScaleRoIAlign(["0", "1"], 7, 2)
    if answers == "masks":
        branch = {"mask_head": MaskRCNNHeads(8, (8, 6), 1), "mask_predictor": MaskRCNNPredictor(6, 6, 3)}
        return MaskRCNN(body, mask_roi_pool=pool, **branch, **parts).eval()
    branch = {"keypoint_head": KeypointRCNNHeads(8, (8, 6)), "keypoint_predictor": KeypointRCNNPredictor(6, 3)}
    return KeypointRCNN(body, keypoint_roi_pool=pool, **branch, **parts).eval()


def _images() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.rand(3, 32, 40, generator=draw) for _ in range(2)]


def _targets() -> list[dict[str, torch.Tensor]]:
    masks = torch.zeros(1, 32, 40, dtype=torch.uint8)
    masks[:, 4:24, 4:20] = 1
    points = torch.tensor([[[6.0, 8.0, 1.0], [10.0, 12.0, 1.0], [18.0, 20.0, 1.0]]])
    boxes = {"boxes": torch.tensor([[4.0, 4.0, 20.0, 24.0]]), "labels": torch.tensor([1])}
    return [boxes | {"masks": masks, "keypoints": points} for _ in range(2)]


def _silence(model: nn.Module, lost: dict[tuple[str, str], list[int]]) -> None:
    """Writers give zeros in the channels that go: no norm follows them, and ReLU keeps a zero."""
    for (name, axis), positions in lost.items():
        if axis == "out":
            layer = model.get_submodule(name)
            with torch.no_grad():
                layer.bias[positions] = 0
                layer.weight.transpose(0, int(isinstance(layer, nn.ConvTranspose2d)))[positions] = 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("answers", BRANCHES)
def test_every_branch_is_cut_as_if_its_channels_were_silenced(answers: str, training: bool) -> None:
    detector, images = _detector(answers), _images()
    graph = trace_groups(detector, Example((images,), {}))
    assert {group.name for group in graph.prunable} == {*STAGES, *BRANCHES[answers]}
    removed = {group.name: range(1, group.size, 3) for group in graph.prunable}
    keep = {g.name: tuple(sorted({*range(g.size)} - {*removed[g.name]})) for g in graph.prunable}
    plan = Plan(keep_channels=keep, sizes={group.name: group.size for group in graph.prunable})
    small = apply_plan(detector, plan, Example((images,), {}))
    silenced = copy.deepcopy(detector)
    _silence(silenced, graph.removed_positions(removed))
    found = []
    for network in (silenced, small):
        torch.manual_seed(3)
        found.append(network.train(training)(images, _targets()) if training else network(images))
    assert training or all(len(one["boxes"]) and answers in one for one in found[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
