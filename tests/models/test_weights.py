"""Published weights load strictly and give their accuracy; files that do not fit are refused in one line."""

import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lit_prune.errors import InputError
from lit_prune.models import build_backbone, find_head, load_weights

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR100 = ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))


def _normalised(images: np.ndarray, statistics) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    return (torch.tensor(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


@torch.no_grad()
def _correct(model, images, labels) -> int:
    model.eval()
    parts = zip(images.split(250), torch.from_numpy(labels).split(250), strict=True)
    return sum((model(part).argmax(1) == truth).sum().item() for part, truth in parts)


def test_layers_that_ask_for_their_version_take_tensors_of_a_file(tmp_path):
    """torchvision's MNASNet refuses tensors without a version, which safetensors do not keep."""
    model, other = (build_backbone("mnasnet0_5", 3) for _ in range(2))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    load_weights(other, tmp_path / "weights.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "file", "correct"),
    [
        ("cifar_resnet20", "cifar10_resnet20-12fca82f.th", 449),
        ("cifar_resnet32", "cifar10_resnet32-d509ac18.th", 463),
        ("cifar_resnet56", "cifar10_resnet56-4bfd9763.th", 461),
    ],
)
def test_published_cifar10_networks_classify_the_first_500_test_images(samples, cifar10_test, name, file, correct):
    """91.73, 92.63 and 93.39 % on all 10,000; rounding may flip one image of 500."""
    model = build_backbone(name, 10)
    report = load_weights(model, samples / "weights" / file)
    assert not report.skipped_head and all(name.endswith("num_batches_tracked") for name in report.filled)
    images, labels = cifar10_test
    assert abs(_correct(model, _normalised(images[:500], IMAGENET), labels[:500]) - correct) <= 1


@pytest.mark.parametrize(("depth", "correct"), [(8, 341), (14, 336), (20, 346)])
def test_published_cifar100_networks_classify_the_first_500_test_images(samples, depth, correct):
    """64.11, 68.30 and 69.69 % on all 10,000."""
    model = build_backbone(f"cifar_resnet{depth}_wide_stem", 100)
    report = load_weights(model, samples / "weights" / f"cifar100_resnet{depth}_wide_stem.safetensors")
    assert not report.filled and report.loaded == len(model.state_dict())
    images = np.asarray(Image.open(samples / "cifar100" / "test-000.webp")).reshape(-1, 32, 32, 3)
    labels = np.load(samples / "cifar100" / "labels.npz")["test"].astype("int64")[:500]
    assert abs(_correct(model, _normalised(images, CIFAR100), labels) - correct) <= 1


def test_published_tiny_imagenet_network_classifies_two_images_of_each_class(samples):
    """49.34 % on all 5,000."""
    model = build_backbone("cifar_resnet32_projection", 200)
    assert load_weights(model, samples / "weights" / "tinyimagenet32_resnet32.safetensors").filled == ()
    root = samples / "tiny-imagenet-200"
    files = [
        file
        for wnid in (root / "wnids.txt").read_text().split()
        for file in sorted((root / "val" / wnid).iterdir())[:2]
    ]
    images = [np.asarray(Image.open(f).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)) for f in files]
    assert abs(_correct(model, _normalised(np.stack(images), IMAGENET), np.repeat(np.arange(200), 2)) - 192) <= 1


@pytest.fixture
def source():
    torch.manual_seed(1)
    return build_backbone("cifar_convnet", 10, widths=[4, 8], hidden=16)


@pytest.fixture
def target():
    torch.manual_seed(2)
    return build_backbone("cifar_convnet", 10, widths=[4, 8], hidden=16)


def _same(model, state) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def _prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"model_state_dict": state},
        lambda state: {"state_dict": _prefixed(state, "module.")},
        lambda state: {"state_dict": {**_prefixed(state, "backbone."), "teacher.fc.weight": torch.zeros(2)}},
        lambda state: {"state_dict": _prefixed(state, "model._orig_mod.")},
    ],
    ids=["plain", "model", "model_state_dict", "module", "lightning", "compiled"],
)
def test_every_wrapping_of_the_same_weights_loads_the_same(wrap, source, target, tmp_path):
    torch.save(wrap(source.state_dict()), tmp_path / "weights.ckpt")
    assert not _same(target, source.state_dict())
    report = load_weights(target, tmp_path / "weights.ckpt")
    assert _same(target, source.state_dict()) and report.loaded == len(source.state_dict())


def test_head_of_other_classes_stays_as_initialised_and_is_reported(source, tmp_path, caplog):
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model = build_backbone("cifar_convnet", 3, widths=[4, 8], hidden=16)
    before = model.fc2.weight.clone()
    with caplog.at_level(logging.WARNING):
        report = load_weights(model, tmp_path / "weights.safetensors")
    assert report.skipped_head == ("fc2.weight", "fc2.bias") and len(caplog.records) == 1
    assert torch.equal(model.fc2.weight, before) and torch.equal(model.fc1.weight, source.fc1.weight)
    with pytest.raises(InputError, match="fc2.weight"):
        load_weights(model, tmp_path / "weights.safetensors", strict_head=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("features.0.weight"), "1 missing, first features.0.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), "1 unknown, first extra"),
        (lambda state: state.update({"fc1.bias": torch.zeros(5)}), r"first fc1.bias \(5 instead of 16\)"),
        (lambda state: state.update({"fc2.weight": torch.zeros(10, 5)}), r"first fc2.weight \(10x5 instead of 10x16\)"),
    ],
)
def test_weights_of_another_network_are_refused_and_the_model_untouched(change, said, source, target, tmp_path):
    state = dict(source.state_dict())
    change(state)
    torch.save(state, tmp_path / "weights.pt")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(InputError, match=f"another network.*{said}") as caught:
        load_weights(target, tmp_path / "weights.pt")
    assert "\n" not in str(caught.value) and _same(target, before)


class _Exploit:
    """Runs code when an unrestricted unpickler meets it."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (self.trace, "w"))


def test_file_with_code_is_refused_without_running_it(target, tmp_path):
    torch.save({"state_dict": _Exploit(str(tmp_path / "ran"))}, tmp_path / "weights.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(_Exploit(str(tmp_path / "ran")), protocol=2))
    for name in ("weights.pth", "plain.pth"):
        with pytest.raises(InputError, match="not readable") as caught:
            load_weights(target, tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_empty_and_missing_files_are_refused(suffix, source, target, tmp_path):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), path)
    content = path.read_bytes()
    for part in (content[: len(content) // 2], b"", b"not weights at all"):
        path.write_bytes(part)
        with pytest.raises(InputError, match="not readable"):
            load_weights(target, path)
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        load_weights(target, path)
    with pytest.raises(InputError, match="suffix"):
        load_weights(target, tmp_path / "weights.npz")


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {"a": 1}}, torch.zeros(2)])
def test_content_that_is_no_state_dict_is_refused(content, target, tmp_path):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="no state_dict"):
        load_weights(target, tmp_path / "weights.pt")


def test_network_without_a_linear_layer_has_no_head():
    with pytest.raises(InputError, match="no Linear"):
        find_head(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)))
