import pytest
import torch
from torch import nn
from torch.nn import functional

from lit_prune.errors import InputError
from lit_prune.lab.trajectory.gradients import cosines, direction_cosines, gradient_sums, information_directions
from lit_prune.measurement.local_axis import noise_floor

LAYERS = {
    "plain": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "uneven": lambda: nn.Conv2d(4, 6, (1, 5), stride=(2, 3), padding=(0, 2), dilation=(1, 2), bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "same": lambda: nn.Conv2d(4, 6, (4, 3), padding="same"),
    "reflected": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "linear": lambda: nn.Linear(10, 6),
    "tokens": lambda: nn.Linear(10, 6),
}


def batch(name: str, dtype=torch.float32, images: int = 12):
    """Layer, inputs with a mean far from zero, outputs, T."""
    torch.manual_seed(0)
    layer = LAYERS[name]().to(dtype)
    shapes = {"linear": (images, 10), "tokens": (images, 5, 10)}
    inputs = torch.randn(*shapes.get(name, (images, 4, 9, 10)), dtype=dtype) + 2
    outputs = layer(inputs).detach()
    channels = outputs.flatten(2).mean(2) if outputs.ndim == 4 else outputs.reshape(images, -1, 6).mean(1)
    target = channels[:, 0] - channels[:, 1] + 0.5 * torch.randn(images, dtype=dtype) + 7
    return layer, inputs, outputs, target


def patches(name: str, layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Unfolded inputs of each output channel's kernel, float64 [N, samples, d]."""
    inputs = inputs.double()
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1]).expand(6, -1, -1)
    padding = layer.padding
    if name == "same":
        inputs, padding = functional.pad(inputs, (1, 1, 1, 2)), 0
    elif name == "reflected":
        inputs, padding = functional.pad(inputs, (1, 1, 1, 1), mode="reflect"), 0
    unfolded = functional.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)
    columns = unfolded.transpose(1, 2).flatten(0, 1)  # [samples, inputs]
    groups = columns.view(len(columns), layer.groups, -1).transpose(0, 1)
    return groups.repeat_interleave(layer.out_channels // layer.groups, 0)


def unfolded_statistics(name, layer, inputs, target):
    """Σ_X and cov(X, T) of each channel's kernel, [N, d, d] and [N, d]."""
    samples = patches(name, layer, inputs)
    spread = target.double().repeat_interleave(samples.shape[1] // len(target))
    centred = samples - samples.mean(1, keepdim=True)
    covariance = centred.transpose(1, 2) @ centred / samples.shape[1]
    return covariance, (centred * (spread - spread.mean())[:, None]).mean(1)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_covariances_are_those_of_unfolded_patches(name, dtype, tolerance):
    layer, inputs, outputs, target = batch(name, dtype)
    found, with_target = gradient_sums(layer, inputs, outputs, target).covariances()
    sigma, expected_target = unfolded_statistics(name, layer, inputs, target)
    expected = (sigma @ layer.weight.detach().double().flatten(1)[:, :, None]).squeeze(2)
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance
    assert float((with_target - expected_target).abs().max() / expected_target.abs().max()) < tolerance


@pytest.mark.parametrize("name", ["plain", "grouped", "tokens"])
def test_sums_of_parts_are_the_sums_of_the_whole(name):
    layer, inputs, outputs, target = batch(name, torch.float64)
    whole = gradient_sums(layer, inputs, outputs, target).covariances()
    cuts = [slice(0, 1), slice(1, 5), slice(5, 12)]
    parts = [gradient_sums(layer, inputs[cut], outputs[cut], target[cut]) for cut in cuts]
    for left in (parts[0] + parts[1] + parts[2], parts[2] + (parts[1] + parts[0])):
        for found, expected in zip(left.covariances(), whole, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", ["plain", "grouped", "linear"])
def test_directions_are_the_gradients_of_the_two_informations(name):
    layer, inputs, outputs, target = batch(name, torch.float64)
    directions = information_directions(layer.weight, gradient_sums(layer, inputs, outputs, target))
    sigma, with_target = unfolded_statistics(name, layer, inputs, target)
    weight = layer.weight.detach().flatten(1).requires_grad_()
    power = torch.einsum("nd,nde,ne->n", weight, sigma, weight)
    torch.testing.assert_close(directions.signal_power, power.detach(), rtol=1e-10, atol=0)
    noise = noise_floor(power.detach())
    squared = (weight * with_target).sum(1).square() / ((noise + power) * target.var(correction=0))
    capture, task = 0.5 * torch.log1p(power / noise).sum(), -0.5 * torch.log1p(-squared).sum()
    correlation = ((weight * with_target).sum(1) / (noise + power).sqrt()).sum()
    for value, direction in [
        (capture, directions.capture),
        (task, directions.task),
        (correlation, directions.correlation),
    ]:
        gradient = torch.autograd.grad(value, weight, retain_graph=True)[0]
        torch.testing.assert_close(cosines(gradient, direction), torch.ones(len(weight)).double(), atol=1e-9, rtol=0)


def test_a_small_step_along_a_direction_raises_its_information():
    layer, inputs, outputs, target = batch("plain", torch.float64)
    directions = information_directions(layer.weight, gradient_sums(layer, inputs, outputs, target))
    noise = noise_floor(directions.signal_power)

    def informations(weight):
        values = functional.conv2d(inputs, weight, layer.bias, padding=1)
        power = values.var((0, 2, 3), correction=0)
        spread = (target - target.mean())[:, None, None, None]
        squared = (values * spread).mean((0, 2, 3)).square() / ((noise + power) * target.var(correction=0))
        return 0.5 * torch.log1p(power / noise), -0.5 * torch.log1p(-squared)

    for which, direction in enumerate([directions.capture, directions.task]):
        move = 1e-6 * functional.normalize(direction).view_as(layer.weight)
        ahead, behind = informations(layer.weight + move)[which], informations(layer.weight - move)[which]
        assert bool((ahead > behind).all())


def test_bias_and_scale_of_the_target_do_not_turn_a_direction():
    layer, inputs, outputs, target = batch("plain", torch.float64)
    one = information_directions(layer.weight, gradient_sums(layer, inputs, outputs, target))
    other = information_directions(layer.weight, gradient_sums(layer, inputs, outputs + 50, 3 - 2 * target))
    torch.testing.assert_close(cosines(one.task, other.task), torch.ones(6).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(one.capture, other.capture, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(cosines(one.correlation, other.correlation), -torch.ones(6).double(), atol=1e-9, rtol=0)


def test_cosines_are_averaged_over_channels_and_the_update_is_minus_the_gradient():
    layer, inputs, outputs, target = batch("plain", torch.float64)
    directions = information_directions(layer.weight, gradient_sums(layer, inputs, outputs, target))
    gradient = -directions.task.view_as(layer.weight)
    found = direction_cosines(directions, gradient)
    assert found["update_task"] == pytest.approx(1)
    assert found["update_capture"] == pytest.approx(found["capture_task"])
    expected = functional.cosine_similarity(directions.capture, directions.task).mean()
    assert found["capture_task"] == pytest.approx(float(expected))


def test_a_zero_row_has_no_cosine_and_is_left_out_of_the_mean():
    first = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert cosines(first, torch.ones(2, 2)).isnan().tolist() == [False, True]


def test_wrong_layers_and_targets_are_refused():
    with pytest.raises(InputError, match="layer"):
        gradient_sums(nn.ReLU(), torch.ones(2, 3), torch.ones(2, 3), torch.ones(2))
    with pytest.raises(InputError, match="target"):
        gradient_sums(nn.Linear(3, 3), torch.ones(2, 3), torch.ones(2, 3), torch.ones(3))
