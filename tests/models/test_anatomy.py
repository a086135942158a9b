"""Blocks, stages and protection of the papers' networks, and removal that changes nothing it should not."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import VGG, ConvNeXt, MobileNetV2, VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.vgg import make_layers

from lit_prune.errors import InputError
from lit_prune.models import Block, build_backbone, drop_blocks, dropped_by_keep_configuration, find_blocks, find_head


def _stages(blocks) -> dict[str, list[str]]:
    stages = {}
    for block in blocks:
        stages.setdefault(block.stage, []).append(block.name)
    return stages


def _protected(blocks) -> set[str]:
    return {block.name for block in blocks if block.protected}


def _meta(name, **arguments):
    with torch.device("meta"):
        return build_backbone(name, 10, **arguments), torch.empty(1, 3, 64, 64)


@pytest.mark.parametrize(
    ("name", "counts", "protected"),
    [
        ("resnet18", (2, 2, 2, 2), {"layer2.0", "layer3.0", "layer4.0"}),
        ("resnet34", (3, 4, 6, 3), {"layer2.0", "layer3.0", "layer4.0"}),
        ("resnet50", (3, 4, 6, 3), {"layer1.0", "layer2.0", "layer3.0", "layer4.0"}),
        ("timm/resnet18", (2, 2, 2, 2), {"layer2.0", "layer3.0", "layer4.0"}),
        ("cifar_resnet20", (3, 3, 3), {"layer2.0", "layer3.0"}),
    ],
)
def test_resnet_stages_and_protected_blocks(name, counts, protected):
    blocks = find_blocks(*_meta(name))
    expected = [f"layer{stage}.{index}" for stage, count in enumerate(counts, 1) for index in range(count)]
    assert [block.name for block in blocks] == expected
    assert [block.stage for block in blocks] == [name.split(".")[0] for name in expected]
    assert _protected(blocks) == protected


def test_reason_of_protection_tells_the_shapes():
    reasons = {block.name: block.protected for block in find_blocks(*_meta("resnet18", stem="cifar"))}
    assert reasons["layer2.0"] == "changes shape 64x64x64 -> 128x32x32"


def test_mobilenet_stages_are_runs_of_equal_width_and_transitions_are_protected():
    blocks = find_blocks(*_meta("mobilenet_v2"))
    assert list(_stages(blocks).values()) == [
        [f"features.{index}" for index in range(first, last + 1)]
        for first, last in ((1, 1), (2, 3), (4, 6), (7, 10), (11, 13), (14, 16), (17, 17))
    ]
    assert _protected(blocks) == {f"features.{index}" for index in (1, 2, 4, 7, 11, 14, 17)}


def test_vgg_blocks_are_convolutions_with_their_norm_and_relu_between_pools():
    blocks = find_blocks(*_meta("vgg16_bn"))
    assert list(_stages(blocks).values()) == [
        [f"features.{index}" for index in stage]
        for stage in ((0, 3), (7, 10), (14, 17, 20), (24, 27, 30), (34, 37, 40))
    ]
    assert _protected(blocks) == {f"features.{index}" for index in (0, 7, 14, 24)}
    assert blocks[1].members == ("features.3", "features.4", "features.5")


def test_convnext_and_transformer_blocks_in_their_stages():
    assert _stages(find_blocks(*_meta("convnext_tiny"))) == {
        f"features.{stage}": [f"features.{stage}.{index}" for index in range(count)]
        for stage, count in ((1, 3), (3, 3), (5, 9), (7, 3))
    }
    blocks = find_blocks(*_meta("deit_tiny", img_size=64))
    assert _stages(blocks) == {"blocks": [f"blocks.{index}" for index in range(12)]}
    assert not _protected(blocks)


@pytest.mark.parametrize("name", ["cifar_convnet", "mlp", "cifar_resnet8_wide_stem"])
def test_network_without_removable_blocks_has_none(name):
    arguments = {"image_size": 32} if name == "mlp" else {}
    assert find_blocks(build_backbone(name, 10, **arguments), torch.randn(1, 3, 32, 32)) == ()


class _Custom(nn.Module):
    """A network of no known family: like blocks in a Sequential, and one that halves the map."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_Layer(3), _Layer(3, stride=2), _Layer(3))
        self.tail = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))

    def forward(self, images):
        return self.tail(self.body(images)).mean((2, 3))


class _Layer(nn.Module):
    def __init__(self, width, stride=1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=1)

    def forward(self, images):
        return self.conv(images)


def test_unknown_network_gets_its_like_modules_and_measured_protection():
    blocks = find_blocks(_Custom(), torch.randn(1, 3, 8, 8))
    assert blocks == (
        Block("body.0", "body", ("body.0",)),
        Block("body.1", "body", ("body.1",), "changes shape 3x8x8 -> 3x4x4"),
        Block("body.2", "body", ("body.2",)),
    )


def test_block_with_its_own_shortcut_layers_is_protected_at_equal_shape():
    model, images = _meta("resnet18")
    model.layer1[1].downsample = nn.Sequential(nn.Conv2d(64, 64, 1, device="meta"))
    assert "layer1.1" in _protected(find_blocks(model, images))


def test_inverted_residual_without_a_sum_is_protected_at_equal_shape():
    model, images = _meta("mobilenet_v2")
    model.features[5].use_res_connect = False
    assert "features.5" in _protected(find_blocks(model, images))


def test_finding_blocks_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = build_backbone("cifar_resnet20", 10).train()
    model.layer2.eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    find_blocks(model, torch.zeros(1, 3, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_hooks_are_gone_after_a_forward_that_fails():
    model = build_backbone("cifar_resnet20", 10).train()
    with pytest.raises(RuntimeError):
        find_blocks(model, torch.zeros(1, 5, 32, 32))
    assert model.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def _zero(*modules: nn.Module) -> None:
    for module in modules:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)


def _resnet() -> tuple[nn.Module, str]:
    model = build_backbone("resnet18", 5, stem="cifar")
    _zero(model.layer3[1].bn2)
    return model, "layer3.1"


def _padded_resnet() -> tuple[nn.Module, str]:
    model = build_backbone("cifar_resnet20", 5)
    _zero(model.layer3[2].bn2)
    return model, "layer3.2"


def _linear_trunk() -> tuple[nn.Module, str]:
    model = build_backbone("cifar_resnet14_wide_stem", 5)
    _zero(model.layer1[1].bn2)
    return model, "layer1.1"


def _projection() -> tuple[nn.Module, str]:
    model = build_backbone("cifar_resnet32_projection", 5)
    _zero(model.blocks4[1].bn2)
    return model, "blocks4.1"


def _mobilenet() -> tuple[nn.Module, str]:
    setting = [[1, 8, 1, 1], [2, 12, 3, 2]]
    model = MobileNetV2(num_classes=5, inverted_residual_setting=setting)
    _zero(model.features[4].conv[3])
    return model, "features.4"


def _convnext() -> tuple[nn.Module, str]:
    model = ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 3)], num_classes=5)
    nn.init.zeros_(model.features[3][1].layer_scale)
    return model, "features.3.1"


def _vit() -> tuple[nn.Module, str]:
    model = VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    block = model.encoder.layers.encoder_layer_1
    _zero(block.self_attention.out_proj, block.mlp[3])
    return model, "encoder.layers.encoder_layer_1"


def _timm_vit() -> tuple[nn.Module, str]:
    model = build_backbone(
        "timm/vit_tiny_patch16_224", 5, img_size=32, patch_size=8, depth=3, embed_dim=24, num_heads=2
    )
    nn.init.normal_(model.head.weight)
    _zero(model.blocks[0].attn.proj, model.blocks[0].mlp.fc2)
    return model, "blocks.0"


def _vgg() -> tuple[nn.Module, str]:
    with torch.device("meta"):
        model = VGG(make_layers([8, "M", 8, 8, "M"]), num_classes=5)
    model.features = make_layers([8, "M", 8, 8, "M"])
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)
    nn.init.dirac_(model.features[5].weight)
    nn.init.zeros_(model.features[5].bias)
    return model, "features.5"


NETWORKS = [_resnet, _padded_resnet, _linear_trunk, _projection, _mobilenet, _convnext, _vit, _timm_vit, _vgg]


@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__.strip("_"))
def test_dropping_an_identity_block_changes_no_output_and_no_survivor(make):
    torch.manual_seed(0)
    model, name = make()
    model.eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    before = dict(model.named_parameters())
    head = find_head(model)
    block = next(block for block in find_blocks(model, images[:1]) if block.name == name)

    drop_blocks(model, [name], images[:1])

    assert torch.equal(model(images), expected) and expected.std() > 0
    gone = {key for key in before if any(key.startswith(f"{member}.") for member in block.members)}
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() - gone and gone
    assert all(after[key] is before[key] for key in after)
    assert find_head(model) == head
    assert name not in {block.name for block in find_blocks(model, images[:1])}


def test_parameters_after_the_papers_block_plan():
    """Source: M2M-DC, Block-KD row of ResNet-18: 9,631,562."""
    model, images = _meta("resnet18")
    drop_blocks(model, ["layer1.1", "layer2.1", "layer3.1"], images)
    assert sum(parameter.numel() for parameter in model.parameters()) == 9_631_562
    assert [block.name for block in find_blocks(model, images)] == [
        "layer1.0", "layer2.0", "layer3.0", "layer4.0", "layer4.1",
    ]  # fmt: skip


def test_dropping_needs_no_input_when_a_plan_is_replayed():
    model, _ = _meta("mobilenet_v2")
    drop_blocks(model, ["features.5", "features.16"])
    assert not hasattr(model.features, "5") and not hasattr(model.features, "16") and hasattr(model.features, "17")


@pytest.mark.parametrize("with_input", [True, False])
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["layer2.0"], "'layer2.0' is protected"),
        (["layer1.1", "layer1.7"], "'layer1.7' does not exist.*layer1"),
        (["layer1.0", "layer1.1"], "'layer1.0' would empty stage 'layer1'"),
        (["conv1"], "'conv1' does not exist"),
    ],
)
def test_forbidden_removals_name_the_block_and_remove_nothing(names, said, with_input):
    model, images = _meta("resnet18")
    before = list(model.state_dict())
    with pytest.raises(InputError, match=said):
        drop_blocks(model, names, images if with_input else None)
    assert list(model.state_dict()) == before


def test_keep_configuration_of_the_paper_names_what_goes():
    blocks = find_blocks(*_meta("resnet18"))
    kept = {"layer1": [0], "layer2": [0], "layer3": [0, 1]}
    assert dropped_by_keep_configuration(blocks, kept) == ("layer1.1", "layer2.1")


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({"layer9": [0]}, "stage 'layer9' is unknown"),
        ({"layer1": [0, 2]}, "positions 0 to 1, got 2"),
        ({"layer2": [1]}, "'layer2.0' is protected"),
        ({"layer1": []}, "would empty stage 'layer1'"),
    ],
)
def test_impossible_keep_configuration_is_refused(kept, said):
    with pytest.raises(InputError, match=said):
        dropped_by_keep_configuration(find_blocks(*_meta("resnet18")), kept)


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet32_projection"])
def test_pruned_network_still_trains_every_parameter(name):
    model = build_backbone(name, 4)
    images = torch.randn(2, 3, 32, 32)
    names = [block.name for block in find_blocks(model, images) if not block.protected][1:2]
    drop_blocks(model, names, images)
    model(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
