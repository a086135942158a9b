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
    with pytest.raises(InputError, match="no batch in it"):
        recalibrate_batchnorm(tiny_net, [])
    with pytest.raises(InputError, match="limit=0"):
        recalibrate_batchnorm(tiny_net, make_batches(), limit=0)


class Pooled(nn.Module):
    """A norm behind pooling, which one image is too few for."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.behind = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.behind(self.norm(self.conv(x)).mean((2, 3)))


def test_a_last_batch_of_one_image_is_left_out():
    batches = [*make_batches(2), (torch.randn(1, 3, 6, 6), torch.zeros(1))]
    net, wanted = Pooled(), Pooled()
    wanted.load_state_dict(net.state_dict())
    assert recalibrate_batchnorm(net, batches) == recalibrate_batchnorm(wanted, batches[:2]) == 2
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch in it"),
        ([(torch.randn(1, 3, 6, 6), 0)] * 3, "batch 0 has one sample, too few for the norm behind pooling"),
        ([*make_batches(2), (torch.full((8, 3, 6, 6), torch.nan), 0)], "batch 2 makes the statistics of norm NaN"),
        ([*make_batches(1), (torch.full((8, 3, 6, 6), torch.inf), 0)], "batch 1 makes the statistics of norm NaN"),
    ],
)
def test_statistics_are_never_lost(batches, message):
    net = Pooled()
    recalibrate_batchnorm(net, make_batches(2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(InputError, match=message):
        recalibrate_batchnorm(net, batches)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.norm.momentum == 0.1 and net.training
