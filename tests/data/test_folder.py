import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional, v2

from lit_prune.data import ImageFolderData
from lit_prune.data.augmentation import PadCropFlip
from lit_prune.data.sources import SHOW_PROGRESS_FROM, FileImages, describe_conversions
from lit_prune.errors import InputError
from lit_prune.image_files import read_image

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def images_of(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return torch.cat([images for images, _ in loader])


def test_classes_are_known_after_construction_and_labels_follow_torchvision(image_tree):
    data = ImageFolderData(root=str(image_tree), num_workers=0)
    assert (data.num_classes, data.classes, data.image_shape) == (3, ("ant", "bee", "cat"), (3, 224, 224))
    reference = ImageFolder(image_tree / "train")
    source = data.load_split("train")
    assert source.labels.tolist() == reference.targets
    assert [os.path.relpath(file) for file in source.files] == [os.path.relpath(file) for file, _ in reference.samples]


def test_files_in_memory_are_the_stored_pixels_and_augmented_by_padded_crops(image_tree):
    data = ImageFolderData(root=str(image_tree), resident=True, resolution=16, batch_size=6, **PLAIN)
    reference = ImageFolder(image_tree / "test", transform=functional.pil_to_tensor)
    stored = torch.stack([image for image, _ in reference])
    assert torch.equal((images_of(data.test_dataloader()) * 255).round().byte(), stored)
    train = data.train_dataloader()
    assert isinstance(train.augmentation, PadCropFlip)
    train.sampler.set_epoch(1)
    order, draws = train.sampler.order(), train.augmentation.draws(1)
    expected = train.augmentation.apply(data.load_split("train").load().pixels, draws)[order]
    assert torch.equal((images_of(train, 1) * 255).round().byte(), expected)


def test_automatic_residence_gives_the_same_batches_from_memory_and_from_workers(image_tree, monkeypatch):
    options = {"root": str(image_tree), "resident": "auto", "resolution": 16, "batch_size": 6, "num_workers": 0}
    memory = images_of(ImageFolderData(**options).train_dataloader(), 2)
    monkeypatch.setattr("lit_prune.data.resident.free_bytes", lambda device: 0)
    loader = ImageFolderData(**options).train_dataloader()
    assert type(loader).__name__ == "WorkerLoader"
    assert torch.equal(images_of(loader, 2), memory)


def test_photographs_are_resized_and_cut_to_the_centre(tmp_path, write_image):
    file = write_image(tmp_path / "val" / "a" / "1.png", size=(300, 400))
    data = ImageFolderData(root=str(tmp_path), num_workers=0, **PLAIN)
    transform = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
    expected = transform(Image.open(file))[None]
    assert torch.equal((images_of(data.val_dataloader()) * 255).round().byte(), expected)


def test_views_of_photographs_do_not_depend_on_workers_or_batch_size(image_tree):
    def views(**options):
        data = ImageFolderData(root=str(image_tree), resolution=12, **options)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(3)
        images = images_of(loader, 3)
        return images[loader.sampler.order().argsort()]

    alone = views(batch_size=18, num_workers=0)
    assert torch.equal(alone, views(batch_size=3, num_workers=2))


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_one_held_out_folder_serves_as_both(image_tree, held_out):
    (image_tree / "test").rename(image_tree / held_out)
    data = ImageFolderData(root=str(image_tree), num_workers=0, resolution=16)
    data.setup()
    assert data.fingerprint()["sizes"] == {"train": 18, "val": 9, "test": 9}


def test_validation_and_test_folders_stay_apart(image_tree, write_image):
    write_image(image_tree / "val" / "ant" / "0.png")
    data = ImageFolderData(root=str(image_tree), num_workers=0, resolution=16)
    assert data.fingerprint()["sizes"] == {"train": 18, "val": 1, "test": 9}


def test_a_tree_without_training_images_can_be_tested_and_says_what_training_lacks(image_tree):
    (image_tree / "train").rename(image_tree / "unused")
    data = ImageFolderData(root=str(image_tree), num_workers=0, resolution=16)
    data.setup("test")
    assert data.fingerprint()["sizes"] == {"val": 9, "test": 9}
    with pytest.raises(InputError, match="has no folder train/"):
        data.setup("fit")


def test_missing_root_is_refused_at_construction(tmp_path):
    with pytest.raises(InputError, match=r"no class folders; expected .*/train/<class>/<image>"):
        ImageFolderData(root=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("content", [b"", b"no image", None])
@pytest.mark.parametrize(("resident", "num_workers"), [(True, 0), (False, 0), (False, 1)])
def test_a_broken_image_is_named_in_one_line(image_tree, content, resident, num_workers):
    broken = image_tree / "test" / "bee" / "1.png"
    broken.write_bytes(broken.read_bytes()[:200] if content is None else content)
    data = ImageFolderData(root=str(image_tree), resident=resident, resolution=16, num_workers=num_workers)
    with pytest.raises(InputError, match=r"^cannot decode the image .*test/bee/1\.png \(.*\); replace[^\n]*$"):
        images_of(data.test_dataloader())


def test_an_empty_class_folder_and_an_unknown_class_are_refused(image_tree):
    (image_tree / "train" / "dog").mkdir()
    with pytest.raises(InputError, match="dog holds no image"):
        ImageFolderData(root=str(image_tree)).setup("fit")
    (image_tree / "train" / "dog").rmdir()
    (image_tree / "test" / "dog").mkdir()
    with pytest.raises(InputError, match="the class dog, which the training split lacks"):
        ImageFolderData(root=str(image_tree)).setup("test")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_image_mode_becomes_rgb(tmp_path, mode):
    grey = Image.fromarray(np.full((4, 4), 100, dtype=np.uint8))
    file = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    grey.convert("RGB").convert(mode).save(file)
    pixels = np.asarray(read_image(file)).astype(int)
    assert pixels.shape == (4, 4, 3) and abs(pixels - 100).max() <= 2


def test_sixteen_bit_images_keep_their_differences(tmp_path):
    """Read as 8 bits without scaling, every value above 255 is white and the classes of a set become one."""
    for name, value in (("dark", 3000), ("middle", 30000), ("bright", 65535)):
        Image.fromarray(np.full((4, 4), value, dtype=np.uint16)).save(tmp_path / f"{name}.png")
    found = [read_image(tmp_path / f"{name}.png").getpixel((0, 0)) for name in ("dark", "middle", "bright")]
    assert found == [(12,) * 3, (117,) * 3, (255,) * 3]
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "real.tif")
    with pytest.raises(InputError, match="real.tif .*whose range is not known; save it with 8 or 16 bits"):
        read_image(tmp_path / "real.tif")


def test_conversions_are_said(tmp_path):
    kinds = {"grey.png": ("L", (4, 4)), "clear.png": ("RGBA", (4, 6)), "plain.png": ("RGB", (4, 4))}
    for name, (mode, size) in kinds.items():
        Image.new(mode, size).save(tmp_path / name)
    files = [str(tmp_path / name) for name in kinds]
    said = "grey is repeated in three channels; alpha is dropped; images that are not square are cut to the centre"
    assert describe_conversions(files) == said and describe_conversions(files[2:]) == ""


def test_decoding_many_files_shows_progress_and_few_do_not(image_tree, capsys):
    file = str(next((image_tree / "test" / "ant").iterdir()))
    for count, shown in ((10, False), (SHOW_PROGRESS_FROM, True)):
        FileImages((file,) * count, torch.zeros(count).long(), 16, 16).load()
        assert ("decoding images" in capsys.readouterr().out) == shown


def test_cifar10_names_sorted_are_in_the_official_order(samples):
    names = [str(name) for name in np.load(samples / "cifar10" / "labels.npz")["classes"]]
    assert names == sorted(names) and len(names) == 10


def test_cifar10_as_png_files_equals_the_packed_images(samples, cifar10_test, tmp_path):
    images, labels = cifar10_test
    names = np.load(samples / "cifar10" / "labels.npz")["classes"]
    for i, (image, label) in enumerate(zip(images[:40], labels[:40], strict=True)):
        file = tmp_path / "test" / str(names[label]) / f"{i:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    data = ImageFolderData(root=str(tmp_path), resident=True, resolution=32, **PLAIN)
    served, classes = next(iter(data.test_dataloader()))
    by_class = np.argsort(labels[:40], kind="stable")
    assert torch.equal(classes, torch.from_numpy(labels[:40][by_class]))
    assert np.array_equal((served * 255).round().byte().permute(0, 2, 3, 1).numpy(), images[by_class])
