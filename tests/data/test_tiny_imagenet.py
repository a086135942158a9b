import hashlib
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from lit_prune.data import TinyImageNetData
from lit_prune.errors import InputError

WNIDS = ("n01443537", "n01629819")


class TwoClasses(TinyImageNetData):
    CLASSES = 2


def make_tree(folder, write_image, official):
    """Three training and two validation images a class, in the layout of the archive or as class folders."""
    lines = []
    for label, wnid in enumerate(WNIDS):
        place = folder / "train" / wnid / "images" if official else folder / "train" / wnid
        for i in range(3):
            write_image(place / f"{wnid}_{i}.JPEG", seed=10 * label + i, size=(64, 64))
        for i in range(2):
            name = f"val_{2 * i + label}.JPEG"
            place = folder / "val" / "images" if official else folder / "val" / wnid
            write_image(place / name, seed=50 + 10 * label + i, size=(64, 64))
            lines.append(f"{name}\t{wnid}\t0\t0\t63\t63\n")
        if official:
            (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("box\n")
    if official:
        (folder / "val" / "val_annotations.txt").write_text("".join(lines))


def everything(root):
    """Label and bytes of every image of both splits, sorted."""
    data = TwoClasses(root=str(root), batch_size=1)
    sources = [data.load_split(split).load() for split in ("train", "test")]
    pairs = [(int(y), x.numpy().tobytes()) for s in sources for x, y in zip(s.pixels, s.labels, strict=True)]
    return sorted(pairs)


@pytest.fixture
def official(tmp_path, write_image):
    make_tree(tmp_path / "official" / "tiny-imagenet-200", write_image, official=True)
    return tmp_path / "official"


def test_both_layouts_give_the_same_images_and_labels(official, tmp_path, write_image):
    make_tree(tmp_path / "flat" / "tiny-imagenet-200", write_image, official=False)
    assert everything(official) == everything(tmp_path / "flat")
    assert len(everything(official)) == 10
    assert everything(tmp_path / "flat" / "tiny-imagenet-200") == everything(official)  # root may be the folder itself


def test_grey_files_become_three_equal_channels(official, write_image):
    write_image(official / "tiny-imagenet-200" / "val" / "images" / "val_0.JPEG", size=(64, 64), channels=1)
    source = TwoClasses(root=str(official)).load_split("test")
    image = source.image([file.endswith("val_0.JPEG") for file in source.files].index(True))
    assert image.shape == (3, 64, 64) and torch.equal(image[0], image[2])


def test_annotations_with_an_unknown_class_are_refused(official):
    file = official / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    file.write_text(file.read_text() + "val_9.JPEG\tn99999999\t0\t0\t1\t1\n")
    with pytest.raises(InputError, match="val_annotations.txt gives no known class for .*val_9"):
        TwoClasses(root=str(official)).setup("test")


def test_missing_files_name_the_layout_and_the_remedy(tmp_path):
    with pytest.raises(InputError, match="has 0 of 200 class folders; expected train/<wnid>/.*set download to true"):
        TinyImageNetData(root=str(tmp_path)).setup()


def test_resizing_is_pillow_s_bilinear(samples):
    data = TinyImageNetData(root=str(samples), resolution=32)
    source = data.load_split("test")
    assert (data.num_classes, len(data.classes), data.image_shape) == (200, 200, (3, 32, 32))
    for index in (0, 2500, 4999):
        resized = Image.open(source.files[index]).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
        assert np.array_equal(source.image(index).permute(1, 2, 0).numpy(), np.asarray(resized))


@pytest.fixture
def served(official, tmp_path, monkeypatch):
    """The official tree as an archive behind a local server; its address and checksum are those of the class."""
    archive = tmp_path / "served" / "tiny-imagenet-200.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as content:
        for file in sorted((official / "tiny-imagenet-200").rglob("*")):
            content.write(file, file.relative_to(official))
    handler = partial(SimpleHTTPRequestHandler, directory=str(archive.parent))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(TwoClasses, "URL", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        monkeypatch.setattr(TwoClasses, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
        yield archive
        server.shutdown()


def test_download_makes_the_folder_and_only_it(served, official, tmp_path):
    data = TwoClasses(root=str(tmp_path / "new"), download=True)
    data.setup()
    assert everything(tmp_path / "new") == everything(official)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tiny-imagenet-200"]
    served.unlink()
    data.prepare_data()  # what is there is not fetched again


@pytest.mark.parametrize("fault", ["checksum", "missing", "no archive", "other folder"])
def test_failed_download_is_explained_and_leaves_nothing_behind(served, tmp_path, monkeypatch, fault):
    messages = {
        "checksum": "md5 of http://.* is .*, not 0000",
        "missing": "download of http://.* failed .*404",
        "no archive": "is no intact zip archive",
        "other folder": "has no folder tiny-imagenet-200",
    }
    if fault == "missing":
        served.unlink()
    if fault == "no archive":
        served.write_bytes(b"hello")
    if fault == "other folder":
        with zipfile.ZipFile(served, "w") as content:
            content.writestr("elsewhere/file", "hello")
    if fault != "missing":
        monkeypatch.setattr(TwoClasses, "MD5", hashlib.md5(served.read_bytes()).hexdigest())
    if fault == "checksum":
        monkeypatch.setattr(TwoClasses, "MD5", "0000")
    with pytest.raises(InputError, match=messages[fault]):
        TwoClasses(root=str(tmp_path / "new" / "data"), download=True).prepare_data()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(InputError):
        TwoClasses(root=str(tmp_path / "old"), download=True).prepare_data()
    assert list((tmp_path / "old").iterdir()) == []  # a root that was there stays
