"""Convolutions of every kind slide a kernel: rows times kernel are the outputs, and readers are solved so."""

import pytest
import torch
from torch import nn

from lit_prune import replace_mechanisms
from lit_prune.replace.kernels import kernel_of, set_kernel
from lit_prune.replace.patches import PositionSample, input_rows, output_rows
from lit_prune.structure import Plan

SIZES = {1: (9,), 2: (7, 6), 3: (4, 5, 3)}
LAYERS = {
    "Conv1d": nn.Conv1d(4, 5, 3, stride=2, padding=2, dilation=2),
    "Conv2d, reflected": nn.Conv2d(4, 5, (3, 2), stride=(1, 2), padding=1, padding_mode="reflect"),
    "Conv3d": nn.Conv3d(4, 5, (1, 3, 2), padding=(0, 1, 1)),
    "ConvTranspose1d": nn.ConvTranspose1d(4, 5, 4, stride=2, padding=1),
    "ConvTranspose2d": nn.ConvTranspose2d(4, 5, 2, stride=2),
    "ConvTranspose2d, cropped": nn.ConvTranspose2d(4, 5, 3, (2, 3), 2, output_padding=(1, 2), dilation=(1, 2)),
    "ConvTranspose2d, more cropped than reached": nn.ConvTranspose2d(4, 5, 1, 2, padding=1, output_padding=1),
    "ConvTranspose3d": nn.ConvTranspose3d(4, 5, (2, 3, 1), stride=(2, 1, 1)),
}


def inputs_of(layer, channels=4, count=3):
    torch.manual_seed(0)
    return torch.randn(count, channels, *SIZES[len(layer.kernel_size)])


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_kernel_are_the_outputs_at_all_positions_and_at_some(name):
    layer = LAYERS[name]
    inputs = inputs_of(layer)
    outputs = layer(inputs)
    for per_image in (5, 10_000):
        chosen = PositionSample(per_image, 0).draw(len(outputs), outputs[0, 0].numel())
        found = input_rows(layer, inputs, chosen) @ kernel_of(layer).flatten(1).T + layer.bias
        torch.testing.assert_close(found, output_rows(layer, outputs, chosen), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_kernel_that_is_written_is_the_one_that_is_read(name):
    layer = LAYERS[name]
    before, kernel = layer.weight.detach().clone(), kernel_of(layer).clone()
    set_kernel(layer, 2 * kernel.flatten(1))
    assert torch.equal(layer.weight, 2 * before)
    set_kernel(layer, kernel)
    assert torch.equal(layer.weight, before)


def doubled(kind, reader, transposed=False):
    """A producer whose last three channels are sums and multiples of its first five, and its reader."""
    producer = kind(4, 8, 3, padding=1)
    with torch.no_grad():
        producer.weight[5:] = producer.weight[:3] + 0.5 * producer.weight[1:4]
        producer.bias[5:] = producer.bias[:3] + 0.5 * producer.bias[1:4]
    return nn.Sequential(producer, reader)


READERS = {
    "Conv1d": lambda: doubled(nn.Conv1d, nn.Conv1d(8, 3, 3)),
    "Conv3d": lambda: doubled(nn.Conv3d, nn.Conv3d(8, 3, 2)),
    "ConvTranspose1d": lambda: doubled(nn.Conv1d, nn.ConvTranspose1d(8, 3, 4, 2, 1)),
    "ConvTranspose2d": lambda: doubled(nn.Conv2d, nn.ConvTranspose2d(8, 3, 3, 2, output_padding=1)),
    "ConvTranspose2d without bias": lambda: doubled(nn.Conv2d, nn.ConvTranspose2d(8, 3, 2, 2, bias=False)),
    "ConvTranspose3d": lambda: doubled(nn.Conv3d, nn.ConvTranspose3d(8, 3, 2)),
}
PLAN = Plan(keep_channels={"0": (0, 1, 2, 3, 4)}, sizes={"0": 8})


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["affine", "refit"])
def test_what_kept_channels_say_too_is_made_up_for_exactly(name, kind):
    torch.manual_seed(1)
    net = READERS[name]().eval()
    images = inputs_of(net[0], count=40)
    found = replace_mechanisms(net, PLAN, [images], kind=kind)
    torch.testing.assert_close(found.model(images), net(images), rtol=0, atol=2e-3)
    assert found.report["layers"]["1"]["error"] < 1e-5 and not found.report["refused"]


def test_a_constant_of_a_transposed_reader_leaves_its_mean_where_it_was_and_says_what_is_left():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ConvTranspose2d(8, 3, 3, 2)).eval()
    with torch.no_grad():
        net[0].weight[5:] = 0  # constant channels
    images = inputs_of(net[0])
    found = replace_mechanisms(net, PLAN, [images], kind="constant")
    wanted, answer = net(images), found.model(images)
    torch.testing.assert_close(answer.mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=0, atol=1e-5)
    entry = found.report["layers"]["1"]
    assert entry["border_error"] == pytest.approx(entry["error"], rel=1e-3) and entry["error"] > 0


class Twice(nn.Module):
    """A reader that runs on both images, behind a producer that does too."""

    def __init__(self):
        super().__init__()
        self.trunk = doubled(nn.Conv2d, nn.Conv2d(8, 6, 3))
        self.head = nn.Linear(6, 4)

    def embed(self, x):
        return self.head(torch.relu(self.trunk(x)).mean((2, 3)))

    def forward(self, one, other):
        return torch.cat([self.embed(one), self.embed(other[..., 1:, :])], 1)


@pytest.mark.parametrize("kind", ["affine", "refit"])
def test_readers_that_run_twice_are_fitted_to_both_calls(kind):
    torch.manual_seed(1)
    net = Twice().eval()
    pair = inputs_of(net.trunk[0], count=40), 3 * inputs_of(net.trunk[0], count=40).flip(0)
    plan = Plan(keep_channels={"trunk.0": (0, 1, 2, 3, 4)}, sizes={"trunk.0": 8})
    found = replace_mechanisms(net, plan, [(pair,)], kind=kind, task="unlabelled")
    torch.testing.assert_close(found.model(*pair), net(*pair), rtol=0, atol=2e-3)
    assert found.report["layers"]["trunk.1"]["error"] < 1e-5
    if kind == "refit":
        rows = {name: entry["rows"] for name, entry in found.report["layers"].items()}
        assert rows["head"] == 2 * 40, "both calls of 40 images"
