import pickle

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from lit_prune.data import CIFAR10Data, CIFAR100Data
from lit_prune.errors import InputError

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def write_batch(file, count, label_key, classes):
    random = np.random.default_rng(count)
    data = random.integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = [i % classes for i in range(count)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps({"data": data, label_key: labels}))
    return data.reshape(-1, 3, 32, 32), labels


class SmallCIFAR10(torchvision.datasets.CIFAR10):
    train_list, test_list = [["data_batch_1", None]], [["test_batch", None]]
    meta = torchvision.datasets.CIFAR10.meta | {"md5": None}


class SmallCIFAR100(torchvision.datasets.CIFAR100):
    train_list, test_list = [["train", None]], [["test", None]]
    meta = torchvision.datasets.CIFAR100.meta | {"md5": None}


@pytest.mark.parametrize(
    ("module", "dataset", "label_key", "classes"),
    [(CIFAR10Data, SmallCIFAR10, "labels", 10), (CIFAR100Data, SmallCIFAR100, "fine_labels", 100)],
)
def test_batches_are_the_stored_pixels_and_labels(tmp_path, monkeypatch, module, dataset, label_key, classes):
    monkeypatch.setattr(module, "DATASET", dataset)
    folder = tmp_path / dataset.base_folder
    write_batch(folder / dataset.train_list[0][0], 3 * classes, label_key, classes)
    pixels, labels = write_batch(folder / dataset.test_list[0][0], 2 * classes, label_key, classes)
    names = [f"class {i}" for i in range(classes)]
    (folder / dataset.meta["filename"]).write_bytes(pickle.dumps({dataset.meta["key"]: names}))
    data = module(root=str(tmp_path), **PLAIN)
    assert (data.num_classes, data.image_shape) == (classes, (3, 32, 32))
    data.setup()
    images, targets = next(iter(data.test_dataloader()))
    assert np.array_equal((images * 255).round().byte().numpy(), pixels) and targets.tolist() == labels
    assert data.classes == tuple(names)
    assert data.fingerprint()["sizes"] == {"train": 3 * classes, "val": 2 * classes, "test": 2 * classes}


@pytest.mark.parametrize(
    ("module", "layout"),
    [(CIFAR10Data, "cifar-10-batches-py/.*data_batch_1"), (CIFAR100Data, "cifar-100-python/.*train, test")],
)
def test_missing_files_name_the_layout_and_the_remedy(tmp_path, module, layout):
    with pytest.raises(InputError, match=f"{layout}.*set download to true"):
        module(root=str(tmp_path)).setup()


def test_failed_download_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(InputError, match=r"^download of http://127.0.0.1:9/[^\n]* failed [^\n]*by hand[^\n]*$"):
        CIFAR10Data(root=str(tmp_path / "new"), download=True).prepare_data()
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_original_cifar100_files_are_accepted(samples, tmp_path):
    source, folder = samples / "cifar100", tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "meta").write_bytes((source / "meta").read_bytes())
    labels = np.load(source / "labels.npz")
    for split in ("train", "test"):
        strips = [np.asarray(Image.open(f)).reshape(-1, 32, 32, 3) for f in sorted(source.glob(f"{split}-*.webp"))]
        pixels = np.concatenate(strips).transpose(0, 3, 1, 2)
        (folder / split).write_bytes((source / f"{split}.head").read_bytes() + pixels.tobytes() + b"tbu.")
    data = CIFAR100Data(root=str(tmp_path))
    data.setup()
    for split, loader in (("train", data.calibration_dataloader()), ("test", data.test_dataloader())):
        served = torch.cat([targets for _, targets in loader])
        expected = labels[split] if split == "test" else labels[split][data.calibration_indices]
        assert sorted(served.tolist()) == sorted(expected.tolist())
    assert torch.bincount(served).tolist() == [100] * 100
    assert data.fingerprint()["sizes"] == {"train": 50_000, "val": 10_000, "test": 10_000}
