"""The scripts of `examples/` run as they are, in small settings."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
pytestmark = pytest.mark.slow
on_samples = pytest.mark.skipif(not (SHARED / "data" / "camvid").is_dir(), reason="no ../shared/data beside it")


def run(name, folder, *arguments):
    """What `main` of an example returns."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    samples = [] if name == "timm_mixup" else ["--samples", str(SHARED)]
    return module.main(["--folder", str(folder), *samples, *arguments])


def test_every_example_is_short_and_tried_here():
    scripts = {file.stem: file.read_text() for file in (ROOT / "examples").glob("*.py")}
    assert set(scripts) == {"compress_without_labels", "detector_camvid", "espnet_camvid", "timm_mixup"}
    assert max(text.count("\n") for text in scripts.values()) <= 80


def test_a_timm_network_with_mixup_and_one_cycle_is_as_good_after_the_cut(tmp_path):
    found = run("timm_mixup", tmp_path, "--network", "test_resnet", "--epochs", "6", "--images", "600")
    assert found["after_repair"] > found["after_surgery"]
    assert (tmp_path / "compact").is_dir()


@on_samples
def test_a_segmentation_network_is_traced_cut_and_repaired(tmp_path):
    found = run("espnet_camvid", tmp_path, "--epochs", "1", "--images", "8", "--every", "4")
    assert set(found) >= {"dense", "after_surgery", "after_repair"}
    assert found["after_surgery"] > found["dense"] - 0.05, "two steps on small images say nothing of the repair"
    assert len(list((tmp_path / "trace").glob("epoch=*.parquet"))) == 2


@on_samples
def test_losses_of_a_detector_fall_before_and_after_the_cut(tmp_path):
    losses = run("detector_camvid", tmp_path, "--epochs", "6", "--images", "16")
    assert losses[2] < losses[0] and losses[5] < losses[3]


@on_samples
def test_a_network_is_compressed_from_images_alone(tmp_path):
    found = run("compress_without_labels", tmp_path, "--images", "320", "--side", "96", "--allocation", "global")
    assert found["macs"] <= 0.8 and found["calibration agreement"] > 0.3
