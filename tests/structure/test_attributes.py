"""What a network writes down of its own widths follows a cut: timm's attributes, heads and features."""

import pytest
import timm
import torch
from timm.models._features import FeatureListNet

from lit_prune import apply_plan, cost, make_plan, score

EXAMPLE = torch.zeros(1, 3, 64, 64)


def half(name: str):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    plan = make_plan(model, score(model, "magnitude"), EXAMPLE, keep=0.5, budget="channels", allocation="uniform")
    return model, plan, apply_plan(model, plan, EXAMPLE)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "mobilenetv3_small_050", "convnext_atto"])
def test_timm_networks_take_a_new_classifier_and_give_features_after_a_cut(name):
    model, _, small = half(name)
    features = small.forward_features(EXAMPLE)
    assert small.num_features == features.shape[1]
    assert small.head_hidden_size == small.forward_head(features, pre_logits=True).shape[1]
    assert "convnext" in name or small.num_features < model.num_features  # its trunk stays whole
    whole = [entry["num_chs"] for entry in model.feature_info]
    nested = any("." in entry["module"] for entry in small.feature_info)
    extractor = FeatureListNet(small, out_indices=tuple(range(len(whole))), flatten_sequential=nested)
    assert extractor.feature_info.channels() == [feature.shape[1] for feature in extractor(EXAMPLE)]
    small.reset_classifier(3)
    assert small(EXAMPLE).shape == (1, 3)
    assert [entry["num_chs"] for entry in model.feature_info] == whole
    assert model.num_features == timm.create_model(name).num_features


def test_plans_and_costs_say_in_a_line_what_they_hold():
    model, plan, _ = half("resnet18")
    assert len(repr(plan)) < 120 and "units kept in" in repr(plan) and "[" not in repr(plan)
    assert repr(cost(model, EXAMPLE)).startswith("Cost(") and len(repr(cost(model, EXAMPLE))) < 80
