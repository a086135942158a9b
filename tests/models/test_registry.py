"""Every backbone by name: shape, gradient, stem, head, and errors that help."""

import copy
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn

from lit_prune.errors import InputError
from lit_prune.models import backbone_names, build_backbone, find_head
from lit_prune.models.stems import use_cifar_stem

CIFAR = {"stem": "cifar"}
SMALL_VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
FAST = [
    ("cifar_resnet20", {}, 32, "linear"),
    ("cifar_resnet8_wide_stem", {}, 32, "linear"),
    ("cifar_resnet32_projection", {}, 32, "fc"),
    ("cifar_convnet", {}, 32, "fc2"),
    ("mlp", {"image_size": 32}, 32, "layers.4"),
    ("resnet18", CIFAR, 32, "fc"),
    ("mobilenet_v2", CIFAR, 32, "classifier.1"),
    ("timm/vit_tiny_patch16_224", SMALL_VIT, 32, "head"),
    ("timm/resnet18", {}, 32, "fc"),
    ("timm/convnext_atto", {}, 32, "head.fc"),
]
FULL = [
    ("resnet34", {}, 224, "fc"),
    ("resnet50", {}, 224, "fc"),
    ("vgg16_bn", {}, 224, "classifier.6"),
    ("vgg16_bn", CIFAR, 32, "classifier.6"),
    ("alexnet", {}, 224, "classifier.6"),
    ("alexnet", CIFAR, 32, "classifier.6"),
    ("mobilenet_v2", {}, 224, "classifier.1"),
    ("convnext_tiny", {}, 224, "classifier.2"),
    ("vit_b_16", {}, 224, "heads.head"),
    ("deit_tiny", {}, 224, "head"),
    ("googlenet", {}, 224, "fc"),
    ("inception_v3", {}, 299, "fc"),
]


def _check_forward_and_backward(name, arguments, size, head):
    torch.manual_seed(0)
    model = build_backbone(name, 7, **arguments)
    logits = model(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    idle = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not idle
    assert find_head(model) == head and model.get_submodule(head).out_features == 7


@pytest.mark.parametrize(("name", "arguments", "size", "head"), FAST)
def test_logits_and_gradients_of_every_parameter(name, arguments, size, head):
    _check_forward_and_backward(name, arguments, size, head)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments", "size", "head"), FULL)
def test_logits_and_gradients_at_full_size(name, arguments, size, head):
    _check_forward_and_backward(name, arguments, size, head)


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [("resnet18", 10, 11_181_642), ("resnet34", 10, 21_289_802), ("mobilenet_v2", 100, 2_351_972)],
)
def test_parameters_of_the_papers_networks(name, classes, parameters):
    """Source: M2M-DC tables: 11,181,642; 21.290 M; 2.352 M."""
    with torch.device("meta"):
        model = build_backbone(name, classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_cifar_stem_keeps_more_of_the_map(name):
    def trunk_size(stem):
        sizes = []
        with torch.device("meta"):
            model = build_backbone(name, 10, stem=stem).eval()
            trunk = model.layer4 if name == "resnet18" else model.features
            trunk.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[-1]))
            model(torch.empty(1, 3, 32, 32))
        return sizes[0]

    expected = {"resnet18": (1, 4), "mobilenet_v2": (1, 2)}[name]
    assert (trunk_size("imagenet"), trunk_size("cifar")) == expected


def _small_classifier_vgg() -> nn.Module:
    with torch.device("meta"):
        model = torchvision.models.vgg11(num_classes=5)
    model.features = nn.Sequential(nn.Conv2d(3, 512, 3, stride=32, padding=1), nn.ReLU())
    model.classifier = nn.Sequential(nn.Linear(512 * 49, 8), nn.ReLU(), nn.Linear(8, 5))
    return model.eval()


def test_vgg_cifar_stem_computes_the_same_function_at_32_pixels():
    torch.manual_seed(0)
    model = _small_classifier_vgg()
    folded = copy.deepcopy(model)
    use_cifar_stem(folded)
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(folded(images), model(images))
    assert folded.classifier[0].in_features == 512


def test_alexnet_cifar_stem_folds_its_classifier_exactly():
    torch.manual_seed(0)
    with torch.device("meta"):
        folded = torchvision.models.alexnet(num_classes=5)
    folded.features = nn.Sequential(nn.Conv2d(3, 256, 3, stride=11), nn.ReLU())  # 32 -> 3 pixels
    folded.classifier = nn.Sequential(nn.Dropout(), nn.Linear(256 * 36, 8), nn.ReLU(), nn.Linear(8, 5))
    unfolded = copy.deepcopy(folded).eval()
    use_cifar_stem(folded.eval())
    folded.features = unfolded.features  # undoes the new first convolution, so that only the head differs
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(folded(images), unfolded(images))
    assert folded.classifier[1].in_features == 256 * 9


def test_other_families_refuse_the_cifar_stem_and_list_who_has_it():
    with torch.device("meta"), pytest.raises(InputError, match="ConvNeXt.*AlexNet, MobileNetV2, ResNet, VGG"):
        build_backbone("convnext_tiny", 10, stem="cifar")


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_convnet", "mobilenet_v2", "timm/resnet18"])
def test_grey_images(name):
    assert build_backbone(name, 10, in_channels=1)(torch.randn(2, 1, 32, 32)).shape == (2, 10)


def test_mlp_takes_its_widths_as_arguments():
    model = build_backbone("mlp", 2, in_features=8, hidden=[64, 32])
    shapes = [tuple(module.weight.shape) for module in model.modules() if isinstance(module, nn.Linear)]
    assert shapes == [(64, 8), (32, 64), (2, 32)]


def test_convnet_penultimate_layer_has_256_units_and_affine_consumers():
    model = build_backbone("cifar_convnet", 10)
    assert model.fc1.out_features == model.fc2.in_features == 256
    assert not any(isinstance(module, nn.MaxPool2d) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet19", "resnet18"),
        ("vgg16bn", "vgg16_bn"),
        ("cifar_resnet21", "cifar_resnet20"),
        ("timm/deit_tinny", "deit"),
    ],
)
def test_unknown_name_is_answered_with_near_ones(name, near):
    with pytest.raises(InputError, match=f"{name}.*{near}") as caught:
        build_backbone(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "mlp", "stem": "tiny"}, "stem='tiny'"),
        ({"name": "mlp", "num_classes": 0}, "num_classes=0"),
        ({"name": "mlp", "depth": 3}, "depth"),
        ({"name": "resnet18", "depth": 3}, "depth"),
        ({"name": "mlp", "hidden": {1, 2}}, "JSON"),
        ({"name": "mlp", "pretrained": True}, "no weights to download"),
    ],
)
def test_bad_argument_is_named_in_one_line(arguments, said):
    with pytest.raises(InputError, match=said) as caught:
        build_backbone(**arguments)
    assert "\n" not in str(caught.value)


def test_names_hold_the_networks_of_the_papers():
    papers = {"resnet18", "resnet34", "vgg16_bn", "mobilenet_v2", "convnext_tiny", "deit_tiny", "cifar_resnet56"}
    assert papers <= set(backbone_names())


@pytest.fixture
def published(monkeypatch) -> dict[str, torch.Tensor]:
    """Stands in for torchvision's download: a seeded state_dict of a 1000-class MobileNetV2."""
    torch.manual_seed(3)
    state = torchvision.models.mobilenet_v2().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_args, **_kwargs: dict(state))
    return state


def test_pretrained_body_is_kept_and_the_head_is_new(published):
    model = build_backbone("mobilenet_v2", 7, pretrained=True)
    state = model.state_dict()
    assert all(torch.equal(state[name], published[name]) for name in state if not name.startswith("classifier"))
    assert state["classifier.1.weight"].shape[0] == 7
    fresh = build_backbone("mobilenet_v2", 7).state_dict()
    assert {name: value.shape for name, value in fresh.items()} == {name: value.shape for name, value in state.items()}


def test_pretrained_kernels_see_a_grey_image_as_three_equal_channels(published):
    grey = build_backbone("mobilenet_v2", 1000, in_channels=1, pretrained=True).eval()
    colour = build_backbone("mobilenet_v2", 1000, pretrained=True).eval()
    images = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(images), colour(images.expand(-1, 3, -1, -1)))


def test_failed_download_is_an_input_error(monkeypatch):
    def fail(*_args, **_kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(InputError, match="no pretrained weights for 'mobilenet_v2'.*no route to host"):
        build_backbone("mobilenet_v2", pretrained=True)
