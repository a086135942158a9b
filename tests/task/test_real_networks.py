"""Trained networks of other people, as their owners have them."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_prune.measurement.channel_table import TARGET_COLUMNS, measure
from lit_prune.scores import score
from lit_prune.task import Classification, Segmentation, Unlabelled, recognise
from lit_prune.train.evaluation import evaluate

SHARED = Path(__file__).resolve().parents[3] / "shared"
pytestmark = pytest.mark.skipif(not (SHARED / "tools" / "real_networks.py").exists(), reason="no ../shared beside it")


@pytest.fixture(scope="module")
def networks():
    spec = importlib.util.spec_from_file_location("real_networks", SHARED / "tools" / "real_networks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def street_scenes(networks, count=None, split="test"):
    """Batches of one image and its label map, at full size."""
    for file in sorted((SHARED / "data" / "camvid" / split / "images").glob("*.webp"))[:count]:
        labels = np.asarray(Image.open(file.parents[1] / "labels" / f"{file.stem}.png"))
        image = np.asarray(Image.open(file).convert("RGB"))
        yield networks.camvid_input(image)[None], torch.from_numpy(labels.astype("int64"))[None]


def photographs(count, side):
    """ImageNet photographs [3, side, side], centre crop, mean = std = 0.5."""
    images = []
    for file in sorted((SHARED / "data" / "imagenet-1k-photos").glob("*/*.jpg"))[:count]:
        image = Image.open(file).convert("RGB")
        left, top = ((size - side) // 2 for size in image.size)
        values = np.asarray(image.crop((left, top, left + side, top + side)), dtype="float32")
        images.append(torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1))
    return torch.stack(images)


@pytest.mark.slow
def test_espnet_has_its_published_figure_on_camvid(networks):
    found = evaluate(networks.espnet_camvid(), street_scenes(networks), task=Segmentation(void=11))
    assert found.metric == "miou" and found.images == 39
    assert found.figure == pytest.approx(0.5925, abs=5e-4)


def test_a_segmentation_network_is_measured_on_both_axes(networks):
    model = networks.espnet_camvid()
    batches = [(image[..., ::4, ::4], labels[:, ::4, ::4]) for image, labels in street_scenes(networks, 6)]
    batches = [(image[..., :88, :], labels[:, :88]) for image, labels in batches]
    assert isinstance(recognise(model, batches[0]), Segmentation)
    table = measure(model, batches, layers="encoder.level2*", task=Segmentation(void=11))
    assert len(table) and not table[~table["dead"]]["task_information"].isna().any()
    unlabelled = measure(model, [image for image, _ in batches], layers="encoder.level2*")
    assert unlabelled[list(TARGET_COLUMNS)].isna().all(axis=None)
    local = ["layer", "channel", "input_capture", "peer_overlap"]
    assert unlabelled[local].equals(table[local])


def test_an_image_classifier_needs_no_labels_for_its_local_axis(networks):
    model, images = networks.efficientnet_lite0(), photographs(4, 64)
    assert isinstance(recognise(model, images), Unlabelled)
    found = score(model, "cmr_logit", [images])
    again = score(model, "cmr_logit", [(images, torch.zeros(4).long())])
    assert found.keys() == again.keys() and all(torch.equal(found[name], again[name]) for name in found)
    logits = model(images)
    assert float(Classification().agreement(logits, logits).mean()) == 1.0
