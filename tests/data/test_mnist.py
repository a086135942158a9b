import pytest
import torch
import torchvision
from torchvision.transforms import functional

from lit_prune.data import MNISTData
from lit_prune.errors import InputError


def test_unscaled_batches_are_the_stored_images(samples):
    data = MNISTData(root=str(samples), resolution=None, mean=(0,), std=(1,))
    reference = torchvision.datasets.MNIST(str(samples), train=False)
    assert (data.num_classes, data.image_shape) == (10, (1, 28, 28))
    images, labels = next(iter(data.test_dataloader()))
    assert torch.equal((images[:, 0] * 255).round().byte(), reference.data[:512])
    assert torch.equal(labels, reference.targets[:512])


def test_scaling_is_bilinear_and_may_give_three_equal_channels(samples):
    data = MNISTData(root=str(samples), channels=3, mean=(0, 0, 0), std=(1, 1, 1))
    images, _ = next(iter(data.test_dataloader()))
    assert images.shape[1:] == data.image_shape == (3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 2])
    original = torchvision.datasets.MNIST(str(samples), train=False).data[:512, None].float()
    expected = functional.resize(original, [32, 32]).round() / 255
    assert torch.allclose(images[:, :1], expected, atol=1e-5)


def test_digits_are_never_mirrored_by_default():
    assert not MNISTData().flip


def test_missing_files_name_the_layout_and_the_remedy(tmp_path):
    with pytest.raises(InputError, match="MNIST/raw/.*set download to true"):
        MNISTData(root=str(tmp_path)).setup()


def test_a_failed_download_leaves_no_empty_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(InputError, match="download of MNIST failed .*by hand"):
        MNISTData(root=str(tmp_path / "new"), download=True).prepare_data()
    assert not (tmp_path / "new").exists()
