import pytest
import torch
from torch import nn

from lit_prune import recalibrate_batchnorm
from lit_prune.errors import InputError


def make_batches(count: int = 5) -> list:
    generator = torch.Generator().manual_seed(3)
    return [
        (2 + 3 * torch.randn(8, 3, 6, 6, generator=generator), torch.zeros(8, dtype=torch.long)) for _ in range(count)
    ]


def test_statistics_are_the_cumulative_average_of_the_batches_and_nothing_of_the_old_ones():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net[0].running_mean.fill_(1e6)
    batches = make_batches()
    assert recalibrate_batchnorm(net, batches, limit=3) == 3
    means = torch.stack([images.mean((0, 2, 3)) for images, _ in batches[:3]])
    variances = torch.stack([images.transpose(0, 1).flatten(1).var(1) for images, _ in batches[:3]])
    torch.testing.assert_close(net[0].running_mean, means.mean(0))
    torch.testing.assert_close(net[0].running_var, variances.mean(0))


def test_modes_momenta_weights_and_random_state_stay_as_they_were(tiny_net):
    net = nn.Sequential(tiny_net, nn.Dropout(0.5))
    tiny_net.bn1.train()
    tiny_net.bn2.momentum = 0.3
    weights = {name: p.clone() for name, p in net.named_parameters()}
    modes = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    recalibrate_batchnorm(net, make_batches())
    assert [module.training for module in net.modules()] == modes
    assert tiny_net.bn2.momentum == 0.3 and tiny_net.bn1.momentum == 0.1
    assert torch.equal(torch.get_rng_state(), state), "dropout was on"
    assert all(torch.equal(weights[name], p) and p.grad is None for name, p in net.named_parameters())


def test_recalibration_on_the_training_batches_makes_eval_mode_equal_train_mode():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    batch = make_batches(1)
    recalibrate_batchnorm(net, batch)
    images = batch[0][0]
    wanted = net.train()(images)
    net.eval()
    pixels = 8 * 4 * 4
    net[1].running_var.mul_((pixels - 1) / pixels)  # running variances are the unbiased ones
    torch.testing.assert_close(net(images), wanted, atol=1e-5, rtol=1e-4)


def test_a_network_without_norms_needs_no_batches():
    assert recalibrate_batchnorm(nn.Linear(2, 2), []) == 0


def test_no_batches_is_an_error(tiny_net):
    with pytest.raises(InputError, match="got no batches"):
        recalibrate_batchnorm(tiny_net, [])
    with pytest.raises(InputError, match="limit=0"):
        recalibrate_batchnorm(tiny_net, make_batches(), limit=0)


class Pooled(nn.Module):
    """A norm behind pooling: one image has no variance there."""

    def __init__(self):
        super().__init__()
        self.norm, self.hidden, self.last = nn.BatchNorm2d(3), nn.Linear(3, 5), nn.BatchNorm1d(5)

    def forward(self, images):
        return self.last(self.hidden(self.norm(images).mean((2, 3))))


def statistics(net):
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def test_a_straggler_of_one_image_is_left_out():
    one, other, batches = Pooled(), Pooled(), make_batches(3)
    other.load_state_dict(one.state_dict())
    assert recalibrate_batchnorm(one, [*batches, (batches[0][0][:1], batches[0][1][:1])]) == 3
    assert recalibrate_batchnorm(other, batches) == 3
    assert all(torch.equal(value, statistics(other)[name]) for name, value in statistics(one).items())


def test_batches_of_one_image_alone_are_used_where_maps_have_a_variance():
    net = nn.Sequential(nn.BatchNorm2d(3))
    assert recalibrate_batchnorm(net, [(images[:1], labels[:1]) for images, labels in make_batches(4)]) == 4


@pytest.mark.parametrize("fault", ["nan", "none", "one image", "raises"])
def test_whatever_goes_wrong_the_statistics_are_those_of_before(fault):
    net, batches = Pooled(), make_batches(3)
    recalibrate_batchnorm(net, batches)
    net.last.momentum, before, modes = 0.3, statistics(net), [module.training for module in net.modules()]

    def broken():
        yield batches[0]
        raise OSError("the disk is gone")

    poisoned = batches[1][0].clone()
    poisoned[2, 1, 3, 3] = torch.nan
    given = {"nan": [batches[0], (poisoned, batches[1][1])], "none": [], "one image": [(batches[0][0][:1], None)]}
    expected = OSError if fault == "raises" else InputError
    with pytest.raises(expected, match="batch 1.*'norm'" if fault == "nan" else None):
        recalibrate_batchnorm(net, given.get(fault) if fault in given else broken())
    assert all(torch.equal(value, before[name]) for name, value in statistics(net).items())
    assert [module.training for module in net.modules()] == modes and net.last.momentum == 0.3


@pytest.mark.parametrize(("norm", "shape"), [(nn.BatchNorm1d, (3, 7)), (nn.BatchNorm3d, (3, 4, 2, 3))])
def test_norms_of_every_dimension_are_recalibrated(norm, shape):
    net, images = norm(3), 5 + 2 * torch.randn(16, *shape)
    recalibrate_batchnorm(net, [images])
    torch.testing.assert_close(net.running_mean, images.transpose(0, 1).flatten(1).mean(1))
