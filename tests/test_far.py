"""The device that is not there (`far.py`) behaves like one, and what the core did wrong on a device stays mended."""

import copy

import far
import pytest
import torch
from placement import OnDevice
from torch import nn

import lit_prune
from lit_prune.measurement.labels import _greedy
from lit_prune.measurement.protocol import Protocol
from lit_prune.measurement.target_axis import find_partners
from lit_prune.models import build_backbone

pytestmark = pytest.mark.cpu  # puts things on the device itself


@pytest.fixture
def there():
    with far.far_device():
        yield far.PLACE


def test_values_train_and_copy_there_and_meet_those_of_the_cpu_only_by_a_move(there):
    torch.manual_seed(0)
    near = nn.Linear(3, 2)
    model, images = copy.deepcopy(near).to(there), torch.randn(4, 3)
    for net, place in ((near, "cpu"), (copy.deepcopy(model), there)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net(images.to(place)).square().sum().backward()
        optimizer.step()
        model = net
    torch.testing.assert_close(model.weight.detach().cpu(), near.weight.detach())
    with pytest.raises(RuntimeError, match="same device"):
        model(images)
    places = torch.tensor([2, 0])
    assert images.to(there)[:, places].device == there
    with pytest.raises(RuntimeError, match="same device"):
        images[:, places.to(there)]
    with pytest.raises(RuntimeError, match="same device"):
        images.to(there)[:, places] = images[:, places]
    with pytest.raises(TypeError, match="cpu()"):
        exec("tensor.numpy()", {"__name__": "lit_prune.example", "tensor": model.weight.detach()})


def test_what_a_test_builds_is_built_there_with_the_cpus_random_numbers(there):
    torch.manual_seed(0)
    wanted = nn.Linear(3, 2), torch.rand(2)
    torch.manual_seed(0)
    with OnDevice(there):
        found = nn.Linear(3, 2), torch.rand(2)
    assert found[0].weight.device == found[1].device == there
    torch.testing.assert_close(found[0].weight.detach().cpu(), wanted[0].weight.detach())
    torch.testing.assert_close(found[1].cpu(), wanted[1])


def test_reconstruction_ranks_there_as_on_the_cpu(there):
    torch.manual_seed(0)
    near = build_backbone("cifar_convnet", num_classes=4, widths=[4, 6]).eval()
    batches = [(torch.rand(16, 3, 8, 8), torch.arange(16) % 4) for _ in range(2)]
    wanted = lit_prune.score(near, "reconstruction", batches)
    found = lit_prune.score(copy.deepcopy(near).to(there), "reconstruction", batches)
    for layer, values in wanted.items():
        torch.testing.assert_close(found[layer].cpu(), values, rtol=1e-4, atol=1e-8)


def test_partners_and_conditional_order_are_found_where_the_sums_are(there):
    generator = torch.Generator().manual_seed(0)
    task = torch.rand(9, generator=generator, dtype=torch.float64)
    mixed = torch.rand(9, 9, generator=generator, dtype=torch.float64)
    total = mixed @ mixed.T + torch.eye(9)
    for rule in ("task", "random"):
        protocol = Protocol(partner_rule=rule, partners=2)
        far = find_partners(task.to(there), total.to(there), protocol)
        assert far.tolist() == find_partners(task, total, protocol).tolist()
    noise = torch.eye(9, dtype=torch.float64)
    found, wanted = _greedy(total.to(there), noise.to(there)), _greedy(total, noise)
    assert found[0].tolist() == wanted[0].tolist()


def test_channels_are_followed_through_an_index_that_is_there(there):
    class Indexed(nn.Module):
        """As windows of attention take their position bias."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
            self.register_buffer("places", torch.tensor([0, 2, 1, 0]))

        def forward(self, images):
            return self.second(torch.relu(self.first(images))[:, :, self.places])

    graph = lit_prune.structure.trace_groups(Indexed().to(there), torch.rand(1, 3, 8, 8).to(there))
    assert [group.name for group in graph.prunable] == ["first"]
