import pytest
import torch

from lit_prune.data import resident
from lit_prune.data.resident import choose_place
from lit_prune.errors import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """A device with 400 MiB free and a host with 4,000."""
    free = {"cuda": 400 * 2**20, "cpu": 4000 * 2**20}
    monkeypatch.setattr(resident, "free_bytes", lambda device: free[device.type])


@pytest.mark.parametrize(
    ("mebibytes", "place"),
    [(0, CUDA), (100, CUDA), (101, CPU), (1000, CPU), (1001, None)],
)
def test_auto_takes_a_quarter_of_the_device_then_of_the_host(mebibytes, place):
    assert choose_place(mebibytes * 2**20, CUDA, "auto") == place


def test_true_means_the_training_device(memory):
    assert choose_place(399 * 2**20, CUDA, True) == CUDA
    with pytest.raises(InputError, match="needs 450 MiB on cuda:0, 50 MiB more.*resident to auto"):
        choose_place(450 * 2**20, CUDA, True)


def test_false_means_nowhere():
    assert choose_place(1, CUDA, False) is None


def test_images_already_in_host_memory_need_no_more(random_data, monkeypatch):
    monkeypatch.setattr(resident, "free_bytes", lambda device: 0)
    assert isinstance(random_data(batch_size=32).train_dataloader(), resident.ResidentLoader)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_the_device_equal_those_of_the_host(random_data):
    from lit_prune.data.augmentation import Normalisation
    from lit_prune.data.resident import ResidentLoader

    data = random_data(batch_size=32)
    host = data.train_dataloader()
    normalisation = Normalisation(data.mean, data.std)
    device = ResidentLoader(host.images.to(CUDA), host.sampler, normalisation, host.augmentation)
    for (images, labels), (expected, classes) in zip(device, host, strict=True):
        assert images.device.type == "cuda" and torch.equal(labels.cpu(), classes)
        assert torch.allclose(images.cpu(), expected, atol=1e-6)
