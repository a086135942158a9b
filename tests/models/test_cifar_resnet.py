"""The padded shortcut against its formula, before and after channels go."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from lit_prune.models import PaddedShortcut, build_backbone


def _pruned_shortcut() -> PaddedShortcut:
    shortcut = PaddedShortcut(4, 8)
    shortcut.prune_in([1])
    shortcut.prune_out([0, 4])
    return shortcut


def _images(channels: int, size: int = 6) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def test_fresh_shortcut_is_option_a_of_he_et_al():
    images = _images(4)
    expected = functional.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
    assert torch.equal(PaddedShortcut(4, 8)(images), expected)


def test_removed_input_channel_acts_like_a_zero_one():
    dense, pruned = PaddedShortcut(4, 8), PaddedShortcut(4, 8)
    pruned.prune_in([0, 2])
    images = _images(4)
    zeroed = images.clone()
    zeroed[:, [0, 2]] = 0
    assert torch.equal(pruned(images[:, [1, 3]]), dense(zeroed))
    assert pruned.in_channels == 2 and pruned.out_channels == 8
    assert pruned.source == [-1, -1, -1, 0, -1, 1, -1, -1]


def test_removed_output_channel_disappears_and_the_others_stay():
    dense, pruned = PaddedShortcut(4, 8), PaddedShortcut(4, 8)
    pruned.prune_out([1, 3, 7])
    images = _images(4)
    assert torch.equal(pruned(images), dense(images)[:, [0, 2, 4, 5, 6]])
    assert pruned.in_channels == 4 and pruned.out_channels == 5


def test_removal_of_trailing_inputs_outputs_still_follows_the_table():
    """The kept sources are a run 0, 1 that is not all of the input: a plain pad would carry too many channels."""
    shortcut = PaddedShortcut(4, 8)
    shortcut.prune_out([4, 5])
    images = _images(4)
    assert torch.equal(shortcut(images), functional.pad(images[:, :2, ::2, ::2], (0, 0, 0, 0, 2, 2)))


def test_order_of_pruning_does_not_matter():
    first, second = PaddedShortcut(4, 8), PaddedShortcut(4, 8)
    first.prune_in([3])
    first.prune_out([2, 6])
    second.prune_out([2, 6])
    second.prune_in([3])
    assert first.source == second.source
    assert torch.equal(first(_images(3)), second(_images(3)))


@pytest.mark.parametrize("removal", [[4], [-1], [0, 1, 2, 3]])
def test_impossible_removal_is_refused_and_changes_nothing(removal):
    shortcut = PaddedShortcut(4, 8)
    with pytest.raises(ValueError, match="in_channels"):
        shortcut.prune_in(removal)
    assert shortcut.source == [-1, -1, 0, 1, 2, 3, -1, -1] and shortcut.in_channels == 4


def test_gradient_reaches_exactly_the_pixels_and_channels_that_pass():
    shortcut = _pruned_shortcut()
    images = _images(3).requires_grad_()
    shortcut(images).sum().backward()
    expected = torch.zeros(3, 6, 6)
    used = [source for source in shortcut.source if source >= 0]
    expected[used, ::2, ::2] = 1
    assert torch.equal(images.grad, expected.expand(2, -1, -1, -1)) and used == [0, 2]


@pytest.mark.parametrize("make", [lambda: PaddedShortcut(4, 8), _pruned_shortcut], ids=["dense", "pruned"])
def test_shortcut_survives_copy_memory_format_and_dtype(make):
    shortcut = make()
    images = _images(shortcut.in_channels)
    expected = shortcut(images)
    assert torch.equal(copy.deepcopy(shortcut)(images), expected)
    assert torch.equal(shortcut(images.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(shortcut.to(torch.float64)(images.double()).float(), expected)
    assert not shortcut.state_dict() and not list(shortcut.parameters())


@pytest.mark.cpu  # networks are exported from there
@pytest.mark.parametrize("make", [lambda: PaddedShortcut(4, 8), _pruned_shortcut], ids=["dense", "pruned"])
def test_shortcut_survives_export(make):
    shortcut = make()
    images = _images(shortcut.in_channels)
    exported = torch.export.export(shortcut, (images,), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert torch.equal(exported.module()(torch.cat([images, images])), torch.cat([shortcut(images)] * 2))


def test_table_stays_on_the_device_of_the_module():
    shortcut = PaddedShortcut(4, 8).to("meta")
    shortcut.prune_in([1])
    assert shortcut(torch.empty(2, 3, 6, 6, device="meta")).shape == (2, 8, 3, 3)
    assert all(buffer.device.type == "meta" for buffer in shortcut.buffers())


@pytest.mark.cpu  # networks are exported from there
def test_onnx_file_of_a_pruned_shortcut_computes_the_same(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    images = _images(3)
    shortcut = _pruned_shortcut().eval()
    torch.onnx.export(shortcut, (images,), str(tmp_path / "shortcut.onnx"), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "shortcut.onnx"), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert torch.equal(torch.from_numpy(output), shortcut(images))


def test_shortcuts_add_no_key_to_the_state_dict():
    names = {
        name for name, module in build_backbone("cifar_resnet20").named_modules() if type(module) is PaddedShortcut
    }
    assert names == {"layer2.0.shortcut", "layer3.0.shortcut"}
    assert not any("shortcut" in key for key in build_backbone("cifar_resnet20").state_dict())


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("cifar_resnet20", 10, 269_722),
        ("cifar_resnet32", 10, 464_154),
        ("cifar_resnet56", 10, 853_018),
        ("cifar_resnet8_wide_stem", 100, 112_452),
        ("cifar_resnet20_wide_stem", 100, 306_884),
        ("cifar_resnet32_projection", 200, 479_272),
    ],
)
def test_published_number_of_parameters(name, classes, parameters):
    assert sum(parameter.numel() for parameter in build_backbone(name, classes).parameters()) == parameters


def test_relu_follows_the_stage_not_the_block_in_the_wide_stem_network():
    model = build_backbone("cifar_resnet14_wide_stem", 10).eval()
    recorded = {}
    for name in ("layer1.0", "relu1"):
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: recorded.update({name: output.min().item()})
        )
    model(_images(3, 32))
    assert recorded["layer1.0"] < 0 and recorded["relu1"] == 0
    assert isinstance(model.linear, nn.Linear) and model.linear.in_features == 256
