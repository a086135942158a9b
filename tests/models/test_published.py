"""Published weights: fetched by name from a server, compared with their checksum, kept; nothing half-fetched stays."""

import functools
import hashlib
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from lit_prune import InputError
from lit_prune.models import build_network, weights
from lit_prune.models.weights import PUBLISHED, Published


@pytest.fixture
def server(tmp_path):
    """Address of a server, and the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    served = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}", folder
    served.shutdown()
    thread.join()
    served.server_close()


@pytest.fixture
def offered(server, tmp_path, monkeypatch):
    """Weights on the server under the name of a backbone, and the folder where they are kept."""
    address, folder = server
    network = build_network("cifar_resnet20", {"num_classes": 10})
    torch.save({"state_dict": {f"module.{key}": value for key, value in network.state_dict().items()}}, folder / "a.th")
    checksum = hashlib.sha256((folder / "a.th").read_bytes()).hexdigest()
    monkeypatch.setitem(PUBLISHED, "cifar_resnet20", Published(f"{address}/a.th", checksum, 10, 0.9))
    monkeypatch.setenv(weights.FOLDER, str(tmp_path / "kept"))
    return network, folder / "a.th", tmp_path / "kept"


def test_a_backbone_starts_from_its_published_weights_and_fetches_them_once(offered):
    network, source, kept = offered
    built = build_network("cifar_resnet20", {"num_classes": 10}, pretrained=True)
    assert all(torch.equal(value, built.state_dict()[name]) for name, value in network.state_dict().items())
    source.unlink()
    again = build_network("cifar_resnet20", {"num_classes": 10}, pretrained=True)
    assert torch.equal(again.conv1.weight, network.conv1.weight)
    assert [file.name for file in kept.iterdir()] == ["a.th"]


def test_another_file_than_the_published_one_is_refused_and_not_kept(offered):
    _, source, kept = offered
    source.write_bytes(source.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"sha256 of http.*put the file by hand"):
        build_network("cifar_resnet20", {"num_classes": 10}, pretrained=True)
    assert not kept.exists()
    kept.mkdir()
    (kept / "a.th").write_bytes(b"damaged")
    with pytest.raises(InputError, match="not the file that was published"):
        build_network("cifar_resnet20", {"num_classes": 10}, pretrained=True)


def test_a_server_without_the_file_and_a_backbone_without_weights_are_refused_in_a_line(offered):
    _, source, kept = offered
    source.unlink()
    with pytest.raises(InputError, match=r"download of http.*404"):
        build_network("cifar_resnet20", {"num_classes": 10}, pretrained=True)
    assert not kept.exists()
    with pytest.raises(InputError, match="cifar_resnet56"):
        build_network("cifar_resnet110", {"num_classes": 10}, pretrained=True)


def test_the_checksums_are_those_that_the_files_names_begin():
    for found in PUBLISHED.values():
        assert found.sha256.startswith(found.url.rpartition("-")[2].removesuffix(".th")) and len(found.sha256) == 64
