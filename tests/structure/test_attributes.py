"""What a network writes down of its own widths follows a cut: timm's attributes, heads and features."""

from types import SimpleNamespace

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


class Described(torch.nn.Module):
    """With the interface of Hugging Face: a `config`, and hidden states on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="made", num_channels=3, embedding_size=8, hidden_sizes=[12, 16])
        self.stem, self.one, self.two = (torch.nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 12), (12, 16)))
        self.classifier = torch.nn.Linear(16, 5)

    def forward(self, pixel_values, output_hidden_states=False):
        states = [self.stem(pixel_values).relu()]
        states += [self.one(states[-1]).relu()]
        states += [self.two(states[-1]).relu()]
        logits = self.classifier(states[-1].mean((2, 3)))
        return SimpleNamespace(logits=logits, hidden_states=states) if output_hidden_states else logits


def test_a_config_says_the_widths_that_are_left_and_that_of_the_dense_network_stays():
    model = Described().eval()
    plan = make_plan(model, score(model, "magnitude"), EXAMPLE, keep=0.5, budget="channels", allocation="uniform")
    small = apply_plan(model, plan, EXAMPLE)
    widths = [layer.out_channels for layer in (small.stem, small.one, small.two)]
    assert [small.config.embedding_size, *small.config.hidden_sizes] == widths and widths[2] < 16
    assert small.config.num_channels == 3 and model.config.hidden_sizes == [12, 16]


HUGGING_FACE = {
    "ResNet": ({"hidden_sizes": [32, 64, 96], "depths": [1, 1, 1], "embedding_size": 16, "layer_type": "basic"}, None),
    "ConvNext": ({"hidden_sizes": [16, 32, 48], "depths": [1, 1, 1], "num_stages": 3}, "width"),
    "ViT": ({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}, "width"),
    "Swin": ({"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}, "width"),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_networks_of_hugging_face_take_a_new_classifier_by_their_config_after_a_cut(name: str):
    transformers = pytest.importorskip("transformers")
    settings, only = HUGGING_FACE[name]
    sizes = {"image_size": 64, "patch_size": 4 if name == "Swin" else 16} if name in ("ViT", "Swin") else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings, **sizes, num_labels=7)
    model = getattr(transformers, f"{name}ForImageClassification")(config).eval()
    ranks = score(model, "magnitude")
    plan = make_plan(model, ranks, EXAMPLE, keep=0.5, budget="channels", allocation="uniform", only=only)
    small = apply_plan(model, plan, EXAMPLE)
    last = small(EXAMPLE.to(small.device), output_hidden_states=True).hidden_states[-1]
    width = getattr(small.config, "hidden_sizes", [getattr(small.config, "hidden_size", None)])[-1]
    assert width == last.shape[1 if last.ndim == 4 else -1]
    assert width < getattr(model.config, "hidden_sizes", [getattr(model.config, "hidden_size", None)])[-1]
    classifier = "classifier" if isinstance(small.classifier, torch.nn.Linear) else "classifier.1"
    small.set_submodule(classifier, torch.nn.Linear(width, 3))
    assert small(EXAMPLE.to(small.device)).logits.shape == (1, 3)
