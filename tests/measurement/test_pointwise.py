"""Layers read at their inputs: the sums are those of their outputs, and exactly so."""

import pytest
import torch
from oracles import assert_moments
from torch import nn

from lit_prune.measurement import local_axis
from lit_prune.measurement.activations import record
from lit_prune.measurement.pointwise import pointwise_input
from lit_prune.measurement.protocol import Protocol


def images(count=40, channels=6, size=9, seed=0):
    """Correlated channels with means far from zero."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator)
    noise = torch.randn(count, channels, size, size, generator=generator)
    return torch.einsum("ij,bjhw->bihw", mixing, noise) + 5 * torch.randn(channels, 1, 1, generator=generator)


def recorded(module, batches, protocol=None):
    with torch.no_grad(), record(module, protocol=protocol or Protocol(token=None)) as recording:
        for batch in batches:
            module(batch)
            recording.add_target(batch.flatten(1)[:, :2])
    return recording.sums.layers[""]


def at_outputs(module, batches, protocol=None):
    """The same with a second hook, which may change the output for all the recording knows."""
    handle = module.register_forward_hook(lambda module, inputs, output: None)
    sums = recorded(module, batches, protocol)
    handle.remove()
    return sums


def assert_same(found, expected):
    for one, other in [(found.outputs, expected.outputs), (found.pooled, expected.pooled)]:
        assert one.count == other.count
        scale = other.variances().sqrt()
        assert float(((one.mean() - other.mean()) / scale).abs().max()) < 2e-6  # both are of float32 outputs
        assert (
            float(((one.covariance() - other.covariance()) / torch.outer(scale, scale)).abs().max()) < 2e-6
        )  # both are of float32 outputs
    cross = expected.reshift(found.pooled.shift).cross
    torch.testing.assert_close(found.cross, cross, rtol=1e-4, atol=float(1e-5 * cross.abs().max()))


@pytest.mark.parametrize("arguments", [{}, {"stride": 2}, {"stride": (1, 3), "bias": False}, {"padding": "valid"}])
@pytest.mark.parametrize("protocol", [None, Protocol(positions=7), Protocol(positions=7, target_pooling="match")])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_wide_pointwise_convolution_has_the_sums_of_its_outputs(arguments, protocol, memory_format):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 20, 1, **arguments).to(memory_format=memory_format)
    data = images().to(memory_format=memory_format)
    assert pointwise_input(conv, (data,), conv(data)) is not None
    assert_same(recorded(conv, data.split(17), protocol), at_outputs(conv, data.split(17), protocol))


@pytest.mark.parametrize("shape", [(6,), (5, 6), (3, 4, 6)])
def test_a_wide_linear_layer_has_the_sums_of_its_outputs(shape):
    torch.manual_seed(0)
    linear, data = nn.Linear(6, 20), torch.randn(60, *shape) + 3
    assert_same(recorded(linear, data.split(25)), at_outputs(linear, data.split(25)))


def test_dead_channels_are_dead_however_they_came_to_be_constant():
    torch.manual_seed(0)
    conv, data = nn.Conv2d(6, 20, 1), images()
    data[:, 1] = data[:, 0]
    with torch.no_grad():
        conv.weight[3] = conv.weight[7] = 0.0
        conv.weight[7, :2] = torch.tensor([1.0, -1.0])[:, None, None]  # the difference of two equal channels
    power = local_axis.signal_power(recorded(conv, data.split(17)).outputs)
    assert local_axis.dead_channels(power).nonzero().flatten().tolist() == [3, 7]


@pytest.mark.parametrize("share", [0.3, 1e-3])
@pytest.mark.parametrize("size", [4, 6])
def test_what_is_read_at_the_inputs_is_exact_although_most_of_them_cancels(size, share):
    """The first output is a difference of inputs that share most of their variance, positions and means alike."""
    conv = nn.Conv2d(64, 256, 1, bias=False)
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(conv.weight, generator=generator)
    conv.weight.data[0] -= conv.weight.data[0].mean()
    level, shared = torch.randn(500, 1, 1, 1, generator=generator), torch.randn(500, 1, size, size, generator=generator)
    own = torch.randn(500, 64, 1, 1, generator=generator) + torch.randn(500, 64, size, size, generator=generator)
    data = 3 + (1 - share) ** 0.5 * (level + shared) + share**0.5 * own
    values = nn.functional.conv2d(data.double(), conv.weight.detach().double())
    assert_moments(recorded(conv, data.split(128)), values.movedim(1, -1).flatten(0, 2), values.mean((2, 3)))


def test_weights_that_change_while_recording_are_followed():
    torch.manual_seed(0)
    conv, changed = nn.Conv2d(6, 20, 1), nn.Conv2d(6, 20, 1)
    first, second = images(seed=1), images(seed=2)
    with torch.no_grad(), record(conv) as recording:
        one = conv(first).double()
        conv.weight.copy_(changed.weight)
        values = torch.cat([one, conv(second).double()])
    assert_moments(recording.sums.layers[""], values.movedim(1, -1).flatten(0, 2), values.mean((2, 3)))


def test_a_change_from_single_positions_to_maps_is_followed():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 20, 1)
    batches = [images(size=1), images(size=3), images(size=1, seed=1)]
    assert_same(recorded(conv, batches), at_outputs(conv, batches))


@pytest.mark.cpu  # autocast of the CPU
def test_only_plain_layers_in_full_precision_that_widen_are_read_at_their_inputs():
    data, tokens = images(), torch.randn(30, 6)

    class Scaled(nn.Conv2d):
        def forward(self, values):
            return 2 * super().forward(values)

    wrong = [nn.Conv2d(6, 20, 3, padding=1), nn.Conv2d(6, 20, 1, padding=1), nn.Conv2d(6, 24, 1, groups=2)]
    wrong += [nn.Conv2d(6, 8, 1), Scaled(6, 20, 1), nn.ConvTranspose2d(6, 20, 1)]
    for layer in wrong:
        assert pointwise_input(layer, (data,), layer(data)) is None
    linear = nn.Linear(6, 20)
    with torch.autocast("cpu", torch.bfloat16):
        assert pointwise_input(linear, (tokens,), linear(tokens)) is None
    assert pointwise_input(linear, (tokens,), linear(tokens)) is tokens
