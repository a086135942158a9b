import re

import pytest

from lit_prune.data import ImageNet100Data
from lit_prune.data.imagenet100 import published_classes
from lit_prune.errors import InputError


@pytest.fixture
def make_tree(tmp_path, write_image):
    def make(wnids):
        first = write_image(tmp_path / "image.png")
        for split in ("train", "val"):
            for wnid in wnids:
                (tmp_path / "imagenet" / split / wnid).mkdir(parents=True)
                (tmp_path / "imagenet" / split / wnid / "0.png").write_bytes(first.read_bytes())
        return str(tmp_path / "imagenet")

    return make


def test_the_published_list_has_a_hundred_sorted_wnids():
    classes = published_classes()
    assert len(set(classes)) == 100 and list(classes) == sorted(classes)
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in classes)


def test_a_full_tree_is_reduced_to_the_published_classes(make_tree):
    data = ImageNet100Data(root=make_tree([*published_classes(), "n00000001", "n99999999"]), num_workers=0)
    assert data.classes == published_classes() and data.num_classes == 100
    data.setup()
    for split in ("train", "val"):
        source = data.load_split(split)
        assert source.labels.tolist() == list(range(100))
        assert all(wnid in file for wnid, file in zip(data.classes, source.files, strict=True))


def test_a_tree_of_any_hundred_classes_is_used_as_it_is(samples):
    data = ImageNet100Data(root=str(samples / "imagenet-100-sample"), num_workers=0)
    assert data.num_classes == 100 and set(data.classes) != set(published_classes())
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (100, 3, 224, 224) and labels.tolist() == list(range(100))


def test_an_incomplete_tree_names_the_layout(make_tree, tmp_path):
    with pytest.raises(InputError, match="has 99 class folders, 1 of the 100 published ones missing; expected .*train"):
        ImageNet100Data(root=make_tree(published_classes()[1:]))
    with pytest.raises(InputError, match="has 0 class folders"):
        ImageNet100Data(root=str(tmp_path / "nowhere"))
