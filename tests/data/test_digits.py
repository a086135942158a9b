import torch
from sklearn.datasets import load_digits
from torchvision.transforms import functional

from lit_prune.data import DigitsData


def test_unscaled_batches_are_scikit_learn_s_images():
    data = DigitsData(resolution=None, pad=1, mean=(0,), std=(1,))
    rows = torch.cat([data.load_split(split).pixels for split in ("train", "test")]).flatten(1)
    expected = (torch.from_numpy(load_digits().data) * 255 / 16).round().to(torch.uint8)
    assert sorted(rows.tolist()) == sorted(expected.tolist())


def test_split_is_balanced_and_independent_of_the_seed():
    data, other = DigitsData(), DigitsData(seed=5)
    assert data.fingerprint()["sizes"] == {"train": 1437, "val": 360, "test": 360}
    counts = torch.bincount(data.load_split("test").labels)
    assert counts.tolist() == [36] * 10
    assert data.fingerprint() == other.fingerprint()


def test_scaling_is_bilinear():
    small, large = (DigitsData(resolution=size).load_split("test").pixels for size in (None, 32))
    expected = functional.resize(small[:5].float(), [32, 32]).round().to(torch.uint8)
    assert torch.equal(large[:5], expected)


def test_training_images_are_normalised_to_zero_mean_and_unit_variance():
    data = DigitsData(channels=3)
    images = torch.cat([images for images, _ in data.calibration_dataloader()])
    assert images.shape[1:] == data.image_shape == (3, 32, 32)
    assert images.mean().abs() < 1e-3 and (images.std() - 1).abs() < 1e-3
