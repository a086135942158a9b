"""Directions in weight space that raise a channel's information, without unfolding a patch.

u_i = Σ_X w_i = cov(X, Y_i) is what the layer's weight-gradient kernel returns for the output gradient Y_i - mean(Y_i),
and c = cov(X, T) what it returns for T - mean(T) spread over positions. Both, and the sum of X, come out of one call.

Source: the two-axis paper, proposition 1 and appendix B.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lit_prune.errors import InputError
from lit_prune.measurement.local_axis import noise_floor

SUMMED = ("inputs", "outputs", "target", "input_output", "input_target")


@dataclass(frozen=True)
class GradientSums:
    """Sums of one layer over samples = images × positions; they add across batches and ranks. All float64.

    G is the number of groups of the convolution (1 for a linear layer), d the inputs of a kernel. X is the patch that
    the kernel sees, padding included; y = Y - output_shift and t = T - target_shift.

    Attributes:
        samples: number of samples.
        output_shift: [N], near the mean of Y.
        target_shift: [], near the mean of T.
        inputs: Σ X, [G, d].
        outputs: Σ y, [N].
        target: Σ t, [].
        input_output: Σ y_i·X, [N, d].
        input_target: Σ t·X, [G, d].
    """

    samples: int
    output_shift: Tensor
    target_shift: Tensor
    inputs: Tensor
    outputs: Tensor
    target: Tensor
    input_output: Tensor
    input_target: Tensor

    def __add__(self, other: GradientSums) -> GradientSums:
        other = other.reshift(self.output_shift, self.target_shift)
        added = (getattr(self, name) + getattr(other, name) for name in SUMMED)
        return GradientSums(self.samples + other.samples, self.output_shift, self.target_shift, *added)

    def reshift(self, output_shift: Tensor, target_shift: Tensor) -> GradientSums:
        """The same sums around other shifts; exact algebra."""
        move, target_move = output_shift - self.output_shift, target_shift - self.target_shift
        return GradientSums(
            samples=self.samples,
            output_shift=output_shift,
            target_shift=target_shift,
            inputs=self.inputs,
            outputs=self.outputs - self.samples * move,
            target=self.target - self.samples * target_move,
            input_output=self.input_output - move[:, None] * _per_channel(self.inputs, move),
            input_target=self.input_target - target_move * self.inputs,
        )

    def covariances(self) -> tuple[Tensor, Tensor]:
        """u_i = cov(X, Y_i) and c = cov(X, T), the latter repeated for each channel of its group; both [N, d]."""
        mean = self.inputs / self.samples
        with_target = self.input_target / self.samples - mean * self.target / self.samples
        means = _per_channel(mean, self.outputs)
        with_output = self.input_output / self.samples - means * self.outputs[:, None] / self.samples
        return with_output, _per_channel(with_target, self.outputs)


def _per_channel(groups: Tensor, channels: Tensor) -> Tensor:
    """Rows [G, d] repeated for the output channels of each group, [N, d]."""
    return groups.repeat_interleave(len(channels) // len(groups), 0)


def gradient_sums(layer: nn.Conv2d | nn.Linear, inputs: Tensor, outputs: Tensor, target: Tensor) -> GradientSums:
    """The sums of one batch, by one weight-gradient pass.

    Args:
        layer: the convolution (any stride, padding, dilation, groups) or linear layer.
        inputs: its input, [B, C, H, W], or [B, ..., C] for a linear layer.
        outputs: its raw output.
        target: T, [B].

    Raises:
        InputError: another kind of layer, or a target that does not fit.
    """
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise InputError(f"layer: {type(layer).__name__} has no kernels to move; give a Conv2d or a Linear")
    if target.shape != outputs.shape[:1]:
        raise InputError(f"target: shape {tuple(target.shape)} for {len(outputs)} images; give [B]")
    values = _by_position(layer, outputs.detach())  # [B, N, P]
    output_shift, target_shift = values.mean((0, 2)).double(), target.double().mean()
    values = values - output_shift[:, None].to(values.dtype)
    deviation = (target.double() - target_shift).to(values.dtype)
    groups = getattr(layer, "groups", 1)
    driven = _drive(values, deviation, groups)
    products = _products(layer, inputs.detach(), driven, outputs.shape[2:]).double()  # [G, N/G + 2, d]
    samples = len(values) * values.shape[2]
    return GradientSums(
        samples=samples,
        output_shift=output_shift,
        target_shift=target_shift,
        inputs=products[:, -1],
        outputs=values.double().sum((0, 2)),
        target=deviation.double().sum() * values.shape[2],
        input_output=products[:, :-2].flatten(0, 1),
        input_target=products[:, -2],
    )


def _by_position(layer: nn.Module, outputs: Tensor) -> Tensor:
    """Outputs as [B, N, P], P positions an image."""
    if isinstance(layer, nn.Conv2d):
        return outputs.flatten(2)
    return outputs.reshape(len(outputs), -1, outputs.shape[-1]).transpose(1, 2)


def _drive(values: Tensor, deviation: Tensor, groups: int) -> Tensor:
    """What takes the place of the output gradient, [B, G, N/G + 2, P]: a group's outputs, then T, then ones."""
    images, _, positions = values.shape
    spread = deviation.view(images, 1, 1, 1).expand(images, groups, 1, positions)
    outputs = values.reshape(images, groups, -1, positions)
    return torch.cat([outputs, spread, torch.ones_like(spread)], 2)


def _products(layer: nn.Conv2d | nn.Linear, inputs: Tensor, driven: Tensor, size: torch.Size) -> Tensor:
    """Σ over samples of driven × patch, [G, N/G + 2, d]; `size` is the height and width of the output."""
    images, groups, rows, positions = driven.shape
    if isinstance(layer, nn.Linear):
        return torch.einsum("brp,bpc->rc", driven[:, 0], inputs.reshape(images, positions, -1))[None]
    inputs, padding = _padded(layer, inputs)
    shape = (groups * rows, *layer.weight.shape[1:])
    gradient = driven.reshape(images, groups * rows, *size)
    products = nn.grad.conv2d_weight(inputs, shape, gradient, layer.stride, padding, layer.dilation, groups)
    return products.reshape(groups, rows, -1)


def _padded(layer: nn.Conv2d, inputs: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Inputs and the zero padding still to apply; "same" and modes other than zeros are applied here."""
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return inputs, layer.padding
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return functional.pad(inputs, _margins(layer), mode=mode), (0, 0)


def _margins(layer: nn.Conv2d) -> list[int]:
    """Left, right, top and bottom margin of the layer's padding."""
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    elif layer.padding == "valid":
        total = [0, 0]
    else:
        total = [2 * pad for pad in layer.padding]
    return [margin for whole in reversed(total) for margin in (whole // 2, whole - whole // 2)]


@dataclass(frozen=True)
class Directions:
    """Directions of one layer in weight space, one row a channel.

    Attributes:
        capture: ∇I_X ∝ u_i, [N, d].
        task: ∇I_T ∝ b·(c - (b/D)·u_i), [N, d]: of the information, the same for T and -T.
        correlation: ∇ρ ∝ c - (b/D)·u_i, [N, d]: of the signed correlation with T.
        signal_power: s_i = w_iᵀ u_i, [N].
        covariance: b_i = w_iᵀ c, [N].
    """

    capture: Tensor
    task: Tensor
    correlation: Tensor
    signal_power: Tensor
    covariance: Tensor


def information_directions(weight: Tensor, sums: GradientSums) -> Directions:
    """Directions in which each kernel gains input capture and task information, T held fixed.

    ∂I_X/∂w = u/D and ∂I_T/∂w = b/(D·σ_T²·(1-ρ²))·(c - (b/D)·u), D = σ0² + s, ρ² = b²/(D·σ_T²), without the positive
    factors. The same without b is the gradient of the correlation ρ itself, ∂ρ/∂w ∝ c - (b/D)·u: it turns round where a
    channel falls as T rises, so that averages over channels differ in value and sign. T is spread over positions, so
    that Y_i here is the channel at a position, not its pooled value.
    """
    capture, with_target = sums.covariances()
    rows = weight.detach().to(capture).flatten(1)
    power, covariance = (rows * capture).sum(1), (rows * with_target).sum(1)
    total = noise_floor(power) + power
    correlation = with_target - (covariance / total)[:, None] * capture
    return Directions(capture, covariance[:, None] * correlation, correlation, power, covariance)


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of the rows of two matrices, [N]; NaN where a row is zero."""
    first, second = first.double().flatten(1), second.double().flatten(1)
    scale = first.norm(dim=1) * second.norm(dim=1)
    return torch.where(scale > 0, (first * second).sum(1) / scale, torch.nan)


def direction_cosines(directions: Directions, loss_gradient: Tensor | None = None) -> dict[str, float]:
    """Cosines averaged over the channels of a layer where they are defined.

    Args:
        directions: of the layer.
        loss_gradient: ∂L/∂W, of the weight's shape; the update is minus this.

    Returns:
        capture_task and capture_correlation: ∇I_X with ∇I_T and with ∇ρ; with a gradient also update_capture,
        update_task and update_correlation, -∇L with each.
    """
    towards = {"task": directions.task, "correlation": directions.correlation}
    means = {f"capture_{name}": cosines(directions.capture, direction) for name, direction in towards.items()}
    if loss_gradient is not None:
        update = -loss_gradient.detach().to(directions.capture).flatten(1)
        means["update_capture"] = cosines(update, directions.capture)
        means |= {f"update_{name}": cosines(update, direction) for name, direction in towards.items()}
    return {name: float(values.nanmean()) for name, values in means.items()}
