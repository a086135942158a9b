import copy
import math
import time

import pytest
import torch
from torch import nn

from lit_prune.errors import InputError
from lit_prune.replace.distil import SHARES, WARM_UP, Distilling, _height, distil
from lit_prune.task import recognise

BEFORE = 2 + 2 * 25  # samples to recognise the task, and to find stages


def make_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)
    )
    net.train()
    with torch.no_grad():
        net(torch.randn(64, 3, 8, 8) * 2 + 1)  # statistics of the norm
    return net.eval()


@pytest.fixture
def original():
    return make_net()


@pytest.fixture
def reduced(original):
    """The original with weights that are a little off."""
    net = copy.deepcopy(original)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    return net


@pytest.fixture
def batches():
    torch.manual_seed(2)
    return [(torch.randn(25, 3, 8, 8) * 2 + 1, torch.randint(4, (25,))) for _ in range(8)]


def repair(original, reduced, batches, augment=None, **settings):
    task = recognise(original, batches[0])
    return distil(original, reduced, batches, task, Distilling(**settings), augment)


def change(net, other, batch):
    with torch.no_grad():
        return float((net(batch[0]) - other(batch[0])).square().sum())


def test_what_the_report_says_of_held_out_samples_is_true_and_better_than_before(original, reduced, batches):
    before = change(original, reduced, batches[-1])
    said = repair(original, reduced, batches, epochs=10, step=0.01)
    after = change(original, reduced, batches[-1])
    assert said["share"] in SHARES and said["steps"] == 10 * 7
    assert said["distortion_after"] < 0.5 * said["distortion_before"]
    assert after / before == pytest.approx(said["distortion_after"] / said["distortion_before"], rel=1e-4)


def test_norms_keep_their_statistics_and_the_original_everything(original, reduced, batches):
    dense, statistics = copy.deepcopy(original.state_dict()), copy.deepcopy(dict(reduced.named_buffers()))
    repair(original, reduced, batches, epochs=2, step=0.01)
    assert all(torch.equal(value, dense[name]) for name, value in original.state_dict().items())
    assert all(torch.equal(value, statistics[name]) for name, value in reduced.named_buffers())
    assert not any(parameter.grad is not None for parameter in reduced.parameters()) and not reduced.training


def test_a_network_that_answers_as_the_original_stays_as_it_is(original, batches):
    twin = copy.deepcopy(original)
    said = repair(original, twin, batches, epochs=2)
    assert said["distortion_after"] == 0 == said["share"]
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in original.state_dict().items())


def test_a_way_that_does_not_serve_held_out_samples_is_not_gone(original, reduced, batches):
    before = copy.deepcopy(reduced.state_dict())
    said = repair(original, reduced, batches, epochs=2, step=100.0)
    assert said["share"] == 0 and said["distortion_after"] == said["distortion_before"]
    assert all(torch.equal(value, before[name]) for name, value in reduced.state_dict().items())


def test_labels_are_not_read(original, reduced, batches):
    other = copy.deepcopy(reduced)
    repair(original, reduced, batches, epochs=1)
    repair(original, other, [(images, (labels + 1) % 4) for images, labels in batches], epochs=1)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in reduced.state_dict().items())


def test_the_same_seed_gives_the_same_network_and_another_one_another(original, reduced, batches):
    def noisy(batch, generator):
        return (batch[0] + 0.1 * torch.randn(batch[0].shape, generator=generator), batch[1])

    found = [copy.deepcopy(reduced) for _ in range(3)]
    for net, seed in zip(found, (0, 0, 1), strict=True):
        repair(original, net, batches, noisy, epochs=1, seed=seed)
    assert torch.equal(found[0][0].weight, found[1][0].weight)
    assert not torch.equal(found[0][0].weight, found[2][0].weight)


def test_rescaling_units_and_undoing_it_changes_nothing(original, reduced, batches):
    original, reduced = original.double(), reduced.double()
    batches = [(images.double(), labels) for images, labels in batches]
    scaled = copy.deepcopy(reduced)
    factors = torch.logspace(-2, 2, 8, dtype=torch.float64)[torch.randperm(8)]
    with torch.no_grad():
        scaled[1].weight *= factors
        scaled[1].bias *= factors
        scaled[3].weight /= factors.view(1, -1, 1, 1)
    for net in (reduced, scaled):
        said = repair(original, net, batches, epochs=3)
        assert said["distortion_after"] < said["distortion_before"]
    with torch.no_grad():
        assert torch.allclose(reduced(batches[0][0]), scaled(batches[0][0]), rtol=1e-5, atol=1e-7)


def test_what_does_not_require_a_gradient_stays(original, reduced, batches):
    reduced[3].requires_grad_(False)
    frozen, free = reduced[3].weight.clone(), reduced[0].weight.clone()
    assert repair(original, reduced, batches, epochs=2)["share"] > 0
    assert torch.equal(reduced[3].weight, frozen) and not torch.equal(reduced[0].weight, free)


def test_the_original_answers_each_sample_once_unless_samples_are_moved(original, reduced, batches):
    seen = []
    original.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    repair(original, copy.deepcopy(reduced), batches, epochs=3, batch=25)
    assert sum(seen) == BEFORE + sum(len(images) for images, _ in batches)
    seen.clear()
    repair(original, reduced, batches, lambda batch, generator: batch, epochs=3, batch=25)
    assert sum(seen) == BEFORE + 25 + 3 * 7 * 25


def test_a_repair_ends_in_time_and_its_steps_fall_to_nothing(original, reduced, batches):
    def slow(batch, generator):
        time.sleep(0.01)
        return batch

    start = time.perf_counter()
    said = repair(original, reduced, batches, slow, seconds=1.0)
    assert said["steps"] > 10 and time.perf_counter() - start < 1.2
    assert said["distortion_after"] < said["distortion_before"]


def test_time_that_judging_alone_takes_leaves_the_network_as_it_is(original, reduced, batches):
    before = copy.deepcopy(reduced.state_dict())
    said = repair(original, reduced, batches, seconds=1e-6)
    assert said["steps"] == said["share"] == 0 and said["distortion_after"] == said["distortion_before"]
    assert all(torch.equal(value, before[name]) for name, value in reduced.state_dict().items())


def test_the_step_grows_over_the_first_part_and_falls_to_nothing():
    places = [place / 100 for place in range(101)]
    heights = [_height(place) for place in places]
    assert heights[0] == 0 and max(heights) == heights[places.index(WARM_UP)] == 1
    assert math.isclose(heights[-1], 0, abs_tol=1e-12)
    assert all(later > earlier for earlier, later in zip(heights[:20], heights[1:21], strict=True))
    assert all(later < earlier for earlier, later in zip(heights[20:-1], heights[21:], strict=True))


def test_a_single_batch_is_refused(original, reduced, batches):
    with pytest.raises(InputError, match="smaller batches"):
        repair(original, reduced, batches[:1], epochs=1)
