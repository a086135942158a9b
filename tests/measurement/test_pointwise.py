"""Layers read at their inputs: the table is that of their outputs, and they are only where that is exact."""

import pytest
import torch
from oracles import assert_moments, largest_error
from torch import nn

from lit_prune.measurement import local_axis
from lit_prune.measurement.activations import record
from lit_prune.measurement.pointwise import FEWEST_SAMPLES, SHARE, affine_map, loses_digits, pointwise_input
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


def assert_same(found, expected, tolerance=1e-6):
    expected = expected.reshift(found.shift)
    for key in ("second", "pooled_second"):
        assert largest_error(found.state()[key], expected.state()[key]) < tolerance, key
    for key in ("first", "pooled_first"):
        scale = expected.second.diagonal().sqrt() * expected.samples.sqrt()
        assert float(((found.state()[key] - expected.state()[key]) / scale).abs().max()) < tolerance, key
    torch.testing.assert_close(found.cross, expected.cross, rtol=1e-4, atol=float(1e-5 * expected.cross.abs().max()))
    assert (found.samples, found.images) == (expected.samples, expected.images)


@pytest.mark.parametrize("arguments", [{}, {"stride": 2}, {"stride": (1, 3), "bias": False}, {"padding": "valid"}])
@pytest.mark.parametrize("protocol", [None, Protocol(positions=7), Protocol(positions=7, target_pooling="match")])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_wide_pointwise_convolution_has_the_sums_of_its_outputs(arguments, protocol, memory_format):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 20, 1, **arguments).to(memory_format=memory_format)
    data = images().to(memory_format=memory_format)
    assert pointwise_input(conv, (data,), conv(data)) is not None
    assert not loses_digits(conv, data.flatten(2).mT, conv(data).flatten(2).mT)
    assert_same(recorded(conv, data.split(17), protocol), at_outputs(conv, data.split(17), protocol))


@pytest.mark.parametrize("shape", [(6,), (5, 6), (3, 4, 6)])
def test_a_wide_linear_layer_has_the_sums_of_its_outputs(shape):
    torch.manual_seed(0)
    linear = nn.Linear(6, 20)
    data = torch.randn(60, *shape) + 3
    found = recorded(linear, data.split(25))
    assert_same(found, at_outputs(linear, data.split(25)))
    flat = linear(data).detach().double().flatten(0, -2)
    torch.testing.assert_close(local_axis.signal_power(found), flat.var(0, correction=0), rtol=1e-5, atol=0)


def test_float64_keeps_its_precision():
    torch.manual_seed(0)
    conv, data = nn.Conv2d(6, 20, 1).double(), images().double()
    assert_same(recorded(conv, data.split(17)), at_outputs(conv, data.split(17)), 1e-12)


def test_dead_channels_are_dead_however_they_came_to_be_constant():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 20, 1)
    data = images()
    with torch.no_grad():
        conv.weight[3] = 0.0
        zero = recorded(conv, data.split(17))
        assert not zero.second[3].any() and not zero.pooled_second[:, 3].any()
        assert local_axis.dead_channels(local_axis.signal_power(zero)).nonzero().flatten().tolist() == [3]
        data[:, 1] = data[:, 0]
        conv.weight[7] = 0.0
        conv.weight[7, :2] = torch.tensor([1.0, -1.0])[:, None, None]  # the difference of two equal channels
        assert loses_digits(conv, data.flatten(2).mT, conv(data).flatten(2).mT)
        power = local_axis.signal_power(recorded(conv, data.split(17)))
    assert local_axis.dead_channels(power).nonzero().flatten().tolist() == [3, 7]


@pytest.mark.parametrize("first", [1, 2, 64])
def test_a_layer_whose_means_alone_cancel_is_exact(first):
    """Opposite inputs share their mean over positions, and what they do not share is left out by the weights."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 20, 1, bias=False)
    conv.weight.data[0] = torch.tensor([1.0, -1.0])[:, None, None]
    level, ripple = torch.randn(64, 1, 1, 1), torch.randn(64, 2, 6, 6)
    data = 30 * level + 10 * (ripple - ripple.mean((2, 3), keepdim=True)) + 0.01 * torch.randn(64, 2, 1, 1)
    some = data[:first]
    assert loses_digits(conv, some.flatten(2).mT, conv(some).flatten(2).mT)
    values = nn.functional.conv2d(data.double(), conv.weight.detach().double())
    assert_moments(recorded(conv, data.split(first)), values.movedim(1, -1).flatten(0, 2), values.mean((2, 3)))


@pytest.mark.parametrize("share", [1.4 * SHARE, 0.5 * SHARE, 1e-3])
@pytest.mark.parametrize("size", [1, 4, 6])
def test_what_is_read_at_the_inputs_is_exact_although_most_of_them_cancels(size, share):
    """The first output is a difference of inputs that share most of their variance, positions and means alike."""
    conv = nn.Conv2d(64, 256, 1, bias=False)
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(conv.weight, generator=generator)
    conv.weight.data[0] -= conv.weight.data[0].mean()
    level, shared = torch.randn(500, 1, 1, 1, generator=generator), torch.randn(500, 1, size, size, generator=generator)
    own = torch.randn(500, 64, 1, 1, generator=generator) + torch.randn(500, 64, size, size, generator=generator)
    data = 3 + (1 - share) ** 0.5 * (level + shared) + share**0.5 * own
    assert loses_digits(conv, data[:128].flatten(2).mT, conv(data[:128]).flatten(2).mT) == (share < SHARE)
    values = nn.functional.conv2d(data.double(), conv.weight.detach().double())
    assert_moments(recorded(conv, data.split(128)), values.movedim(1, -1).flatten(0, 2), values.mean((2, 3)))


def test_weights_that_change_while_recording_are_followed():
    torch.manual_seed(0)
    conv, changed = nn.Conv2d(6, 20, 1), nn.Conv2d(6, 20, 1)
    first, second = images(seed=1), images(seed=2)
    with torch.no_grad(), record(conv) as recording:
        conv(first)
        conv.weight.copy_(changed.weight)
        conv(second)
        outputs = changed(second) + (conv.bias - changed.bias)[:, None, None]
    torch.manual_seed(0)
    outputs = torch.cat([nn.Conv2d(6, 20, 1)(first), outputs]).detach().double().movedim(1, -1).flatten(0, 2)
    found = local_axis.signal_power(recording.sums.layers[""])
    torch.testing.assert_close(found, outputs.var(0, correction=0), rtol=1e-5, atol=0)


def test_a_change_from_single_positions_to_maps_is_followed():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 20, 1)
    batches = [images(size=1), images(size=3), images(size=1, seed=1)]
    assert_same(recorded(conv, batches), at_outputs(conv, batches))


def test_only_plain_layers_in_full_precision_that_widen_are_read_at_their_inputs():
    data, tokens = images(), torch.randn(30, 6)

    class Scaled(nn.Conv2d):
        def forward(self, values):
            return 2 * super().forward(values)

    wrong = [nn.Conv2d(6, 20, 3, padding=1), nn.Conv2d(6, 20, 1, padding=1), nn.Conv2d(6, 24, 1, groups=2)]
    wrong += [nn.Conv2d(6, 8, 1), Scaled(6, 20, 1)]
    for layer in wrong:
        assert pointwise_input(layer, (data,), layer(data)) is None
    linear = nn.Linear(6, 20)
    with torch.autocast("cpu", torch.bfloat16):
        assert pointwise_input(linear, (tokens,), linear(tokens)) is None
    assert pointwise_input(linear, (tokens,), linear(tokens)) is tokens
    few = tokens[: FEWEST_SAMPLES - 1, None]
    assert loses_digits(linear, few, linear(few))
    mapped = affine_map(linear, torch.float32)
    linear.weight.data.zero_()
    assert mapped.weight.any()  # a copy
