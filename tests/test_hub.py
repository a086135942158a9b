"""Hugging Face's conventions, offline: what is saved is a compact folder, what is loaded is the same network."""

import pytest
import torch

from lit_prune import HubNetwork, InputError, Preparation, apply_plan, make_plan, score
from lit_prune.models import build_network
from lit_prune.structure import read_preparation
from lit_prune.structure.record import Record, note_record

pytest.importorskip("huggingface_hub")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small():
    torch.manual_seed(0)
    arguments = {"num_classes": 10, "in_channels": 3}
    network = note_record(build_network("cifar_resnet20", arguments).eval(), Record("cifar_resnet20", arguments))
    return apply_plan(network, make_plan(network, score(network, "magnitude"), IMAGES[:1], keep=0.6), IMAGES[:1])


def test_a_saved_network_comes_back_from_a_folder_and_from_a_snapshot(small, tmp_path, monkeypatch):
    preparation = Preparation((0.5,) * 3, (0.2,) * 3, (32, 32), 32)
    HubNetwork(small, {"compact": {"macs": 1}}, preparation).save_pretrained(tmp_path / "mine")
    assert read_preparation(tmp_path / "mine") == preparation
    assert "library_name: lit_prune" in (tmp_path / "mine" / "README.md").read_text()
    local = HubNetwork.from_pretrained(str(tmp_path / "mine"))
    assert torch.equal(local(IMAGES), small(IMAGES)) and local.preparation == preparation
    asked = {}

    def snapshot(name, **settings):
        asked.update(settings, name=name)
        return str(tmp_path / "mine")

    monkeypatch.setattr("lit_prune.hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda **_: pytest.fail("config is not there"))
    loaded = HubNetwork._from_pretrained(
        model_id="me/small", revision="v1", cache_dir=None, force_download=False, local_files_only=True, token=None
    )
    assert torch.equal(loaded(IMAGES), small(IMAGES))
    assert (asked["name"], asked["revision"]) == ("me/small", "v1") and "model.safetensors" in asked["allow_patterns"]


def test_a_folder_that_is_no_compact_network_is_refused(tmp_path):
    with pytest.raises(InputError, match="no compact folder"):
        HubNetwork.from_pretrained(str(tmp_path))
