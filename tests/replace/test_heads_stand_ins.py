"""What stands in for a head: constants in the projection's bias, the other heads' values, a projection solved again."""

import pytest
import timm
import torch
from torch import nn
from torchvision import models

from lit_prune.replace import replace_mechanisms
from lit_prune.structure import Plan, apply_plan, trace_groups

NETWORKS = {
    "timm": lambda: timm.models.VisionTransformer(16, 4, embed_dim=12, depth=2, num_heads=3, num_classes=3),
    "torchvision": lambda: models.VisionTransformer(16, 4, 2, 3, 12, 16, num_classes=3),
    "swin": lambda: models.SwinTransformer([4, 4], 12, [2], [3], [2, 2], num_classes=3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_stand_ins_bring_the_output_nearer_and_replay(name: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5, 0.5) if parameter.dim() == 1 else nn.init.normal_(parameter, std=0.3)
    images = torch.randn(32, 3, 16, 16)
    heads = [group for group in trace_groups(model, images).prunable if group.role == "heads"]
    plan = Plan((), {g.name: (0, 2) for g in heads}, {g.name: g.size for g in heads})
    with torch.no_grad():
        wanted = model(images)
    distance = {}
    for kind in ("delete", "constant", "affine", "refit"):
        reduced = replace_mechanisms(model, plan, [(images, None)], kind, images)
        assert not reduced.report["refused"]
        assert len(reduced.report["layers"]) >= len(heads)  # refit solves what comes after, too
        with torch.no_grad():
            distance[kind] = float((reduced.model(images) - wanted).square().mean())
        replayed = apply_plan(model, reduced.plan, images)
        replayed.load_state_dict(reduced.model.state_dict())
        torch.testing.assert_close(replayed(images), reduced.model(images))
    assert max(distance["constant"], distance["affine"]) < distance["delete"]
    assert distance["refit"] < distance["affine"] < distance["constant"]
