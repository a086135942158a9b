"""Controls on the parameterisation: BN-folded quantities, function-preserving rescaling, exact signal power."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from lit_prune.errors import InputError
from lit_prune.lab.analyze.controls import by_layer, kendall
from lit_prune.lab.analyze.evidence import Analysis
from lit_prune.lab.analyze.extras import Frames, register_extra
from lit_prune.measurement import local_axis
from lit_prune.measurement.channel_table import NO_TARGET, channel_table, collect_sums
from lit_prune.measurement.layers import following_norms, position_view, removing, select_layers, weight_rows
from lit_prune.measurement.summaries import rank_correlation
from lit_prune.running import undisturbed
from lit_prune.structure.hooks import without_hooks
from lit_prune.task import Task

EXACT_LAYERS, EXACT_INPUTS, EXACT_SHARE = 6, 4608, 8
LARGEST_EXPONENT = 3
RANKED = (
    "weight_norm",
    "norm_scale",
    "folded_norm",
    "signal_power",
    "folded_power",
    "input_capture",
    "peer_overlap",
    "task_information",
)


def batch_norms(model: nn.Module, example: Tensor) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The BatchNorm with running statistics that reads each layer's output, by the layer's name."""
    norms = {layer: model.get_submodule(name) for layer, name in following_norms(model, example).items()}
    kind = nn.modules.batchnorm._BatchNorm
    return {n: norm for n, norm in norms.items() if isinstance(norm, kind) and norm.running_var is not None}


def norm_gain(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """|γ| and |γ|/√(running variance + ε), the factor by which it scales a channel in evaluation mode, [N] each."""
    variance = norm.running_var.detach().double().cpu()
    scale = torch.ones_like(variance) if norm.weight is None else norm.weight.detach().double().cpu().abs()
    return scale, scale * (variance + norm.eps).rsqrt()


def folded_columns(model: nn.Module, channels: pd.DataFrame, norms: dict[str, nn.Module]) -> pd.DataFrame:
    """Channel columns of the layers as they are with their BatchNorm folded in; NaN for layers without one.

    norm_scale |γ|, folded_norm (‖w‖ times the norm's factor), folded_power (post-BN variance), folded_capture (I_X of
    it). The norm is affine per channel, so the post-BN variance is s_i·γ²/(running variance + ε), and correlations,
    hence R̄_X and I_T, are the same before and after it: no further pass is needed.
    """
    parts = []
    for layer, rows in channels.groupby("layer", sort=False):
        columns = pd.DataFrame(np.nan, rows.index, ["norm_scale", "folded_norm", "folded_power", "folded_capture"])
        if layer in norms:
            scale, gain = norm_gain(norms[layer])
            power = gain.square() * torch.from_numpy(rows["signal_power"].to_numpy(copy=True))
            columns["norm_scale"], columns["folded_norm"] = scale.numpy(), rows["weight_norm"] * gain.numpy()
            columns["folded_power"] = power.numpy()
            columns["folded_capture"] = local_axis.input_capture(power).numpy()
        parts.append(rows[["layer", "channel"]].join(columns))
    return pd.concat(parts, ignore_index=True)


@register_extra("channels", "layers")
def variants(analysis: Analysis) -> Frames:
    """Channel columns of `folded_columns`; layer columns folded_coupling ρ(folded I_X, I_T) and tau_folded_capture.

    tau_folded_capture is Kendall's τ of I_X before and after the norm. Needs the hook point `pre_bn`.
    """
    _check_hook_point(analysis, "variants")
    norms = batch_norms(analysis.model, analysis.example)
    columns = folded_columns(analysis.model, analysis.channels, norms)
    joined = analysis.channels.merge(columns, on=["layer", "channel"], sort=False)
    layers = []
    for layer in analysis.layers:
        rows = joined[(joined["layer"] == layer) & ~joined["dead"]]
        tau = kendall(rows["input_capture"], rows["folded_capture"])
        folded = rank_correlation(rows["folded_capture"], rows["task_information"])
        layers.append({"layer": layer, "folded_coupling": folded, "tau_folded_capture": tau})
    return {"channels": columns, "layers": pd.DataFrame(layers)}


def _check_hook_point(analysis: Analysis, extra: str) -> None:
    if analysis.request.protocol.hook_point != "pre_bn":
        raise InputError(f"extras: {extra!r} reads raw outputs; leave it out, or set protocol.hook_point to pre_bn")


def rescaled(model: nn.Module, norms: dict[str, nn.Module], seed: int = 0) -> nn.Module:
    """A copy with other parameters and, in evaluation mode, the same function.

    Kernel, bias and running mean of channel i times a_i, γ_i times c_i, running variance + ε times (a_i·c_i)². The
    a_i and c_i are seeded powers of two from 1/8 to 8, so that scaling a kernel rounds nothing. A norm without γ keeps
    c_i = 1. (In training mode only c_i = 1 keeps the function: there the batch's own variance counts.)

    Args:
        model: the network.
        norms: layer name to the BatchNorm that reads its output, modules of `model`.
        seed: of the factors.
    """
    with without_hooks(model):
        twin = copy.deepcopy(model)
    names = {module: name for name, module in model.named_modules()}
    generator = torch.Generator().manual_seed(seed)
    for layer, norm in norms.items():
        _rescale(twin.get_submodule(layer), twin.get_submodule(names[norm]), generator)
    return twin


def _rescale(layer: nn.Module, norm: nn.modules.batchnorm._BatchNorm, generator: torch.Generator) -> None:
    size, limit = norm.num_features, LARGEST_EXPONENT
    exponents = torch.randint(-limit, limit + 1, (2, size), generator=generator).to(layer.weight)
    kernel, scale = torch.exp2(exponents)
    if norm.weight is None:
        scale = torch.ones_like(kernel)
    with torch.no_grad():
        layer.weight *= kernel.view(-1, *[1] * (layer.weight.ndim - 1))
        if layer.bias is not None:
            layer.bias *= kernel
        if norm.weight is not None:
            norm.weight *= scale
        norm.running_mean *= kernel
        variance = (norm.running_var.double() + norm.eps) * (kernel * scale).double().square() - norm.eps
        norm.running_var.copy_(variance)


@register_extra("table", settings=("seed",))
def reparameterisation(analysis: Analysis) -> Frames:
    """Table `reparameterisation`: which rankings move when the parameters change and the function does not.

    Columns: quantity, value. `tau_<column>`: Kendall's τ of the channels' ranking before and after, mean over layers
    followed by a BatchNorm. `largest_difference`, `relative_difference` (RMS over the logits' RMS) and `same_class`
    (share of images) say how far rounding moved the outputs. One more pass over the images, by a rescaled copy.

    Source: the two-axis paper, table 7.
    """
    _check_hook_point(analysis, "reparameterisation")
    norms = {name: n for name, n in batch_norms(analysis.model, analysis.example).items() if name in analysis.layers}
    if not norms:
        raise InputError("extras: 'reparameterisation' needs a layer followed by BatchNorm; this network has none")
    twin = rescaled(analysis.model, norms, analysis.request.seed)
    logits = []
    batches = list_logits(twin, analysis.batches("rescaled copy"), logits, analysis.task)
    sums = collect_sums(twin, batches, analysis.request.target, list(norms), analysis.request.protocol, analysis.task)
    before = _with_folded(analysis.model, analysis.channels[analysis.channels["layer"].isin(norms)], norms)
    after = channel_table(twin, sums, analysis.request.protocol)
    after = _with_folded(twin, after, batch_norms(twin, analysis.example))
    joined = before.merge(after, on=["layer", "channel"], suffixes=("", "_after"), sort=False)
    taus = {f"tau_{name}": by_layer(joined, lambda r, n=name: kendall(r[n], r[f"{n}_after"])) for name in RANKED}
    first = analysis.evidence.logits.double()
    second = torch.cat(logits)[: len(first)].double()
    rows = taus | {
        "largest_difference": float((first - second).abs().max()),
        "relative_difference": float((first - second).square().mean().sqrt() / first.square().mean().sqrt()),
        "same_class": float(analysis.task.agreement(first, second).mean()),
    }
    return {"table": pd.DataFrame({"quantity": list(rows), "value": list(rows.values())})}


def _with_folded(model: nn.Module, channels: pd.DataFrame, norms: dict[str, nn.Module]) -> pd.DataFrame:
    return channels.merge(folded_columns(model, channels, norms), on=["layer", "channel"], sort=False)


def list_logits(model: nn.Module, batches, logits: list[Tensor], task: Task):
    """The same batches; the predictions of `model` on them are appended to `logits` as they run."""
    handle = model.register_forward_hook(lambda _, inputs, output: logits.append(task.prediction(output).cpu()))
    with removing([handle]):
        yield from batches


@register_extra("table", settings=("samples",))
def exact(analysis: Analysis) -> Frames:
    """Table `exact`: signal power from the unfolded patches, w_iᵀ Σ_X w_i, against the variance of the outputs.

    Columns: layer, images, tau_input_capture (Kendall), largest_difference (relative, over live channels). At most 6
    layers spaced over depth, those whose kernels read at most 4608 inputs, on an eighth of `samples`.

    Source: the two-axis paper, appendix E, control C4.
    """
    request = analysis.request
    limit = max(4, request.samples // EXACT_SHARE)
    every = {name: m for name, m in select_layers(analysis.model, analysis.layers).items() if _unfolds(m)}
    places = np.unique(np.linspace(0, len(every) - 1, min(EXACT_LAYERS, len(every))).round().astype(int))
    names = [list(every)[place] for place in places]
    protocol = replace(request.protocol, hook_point="pre_bn", positions="all")
    streamed = collect_sums(
        analysis.model, analysis.batches("exact", limit=limit), NO_TARGET, names, protocol, analysis.task
    )
    patches = _patch_covariances(analysis, {name: every[name] for name in names}, limit)
    rows = []
    for name in names:
        sums = streamed.layers[name].to("cpu")
        first, second = local_axis.signal_power(sums.outputs), exact_power(every[name], patches[name])
        live = ~local_axis.dead_channels(first)
        rows.append(
            {
                "layer": name,
                "images": sums.pooled.count,
                "tau_input_capture": kendall(local_axis.input_capture(first), local_axis.input_capture(second)),
                "largest_difference": float(((first - second).abs() / first)[live].max())
                if live.any()
                else float("nan"),
            }
        )
    return {"table": pd.DataFrame(rows)}


def _unfolds(layer: nn.Module) -> bool:
    """Whether the layer's patches can be unfolded here, within the memory that is meant for it."""
    if not isinstance(layer, nn.Conv2d | nn.Linear) or layer.weight[0].numel() > EXACT_INPUTS:
        return False
    return isinstance(layer, nn.Linear) or (layer.padding_mode == "zeros" and not isinstance(layer.padding, str))


def exact_power(layer: nn.Module, covariances: Tensor) -> Tensor:
    """s_i = w_iᵀ Σ_X w_i [N] from the patch covariance of each group, [G, d, d]."""
    rows = weight_rows(layer)
    groups = rows.view(len(covariances), -1, rows.shape[1])  # [G, N/G, d]
    return torch.einsum("gnd,gde,gne->gn", groups, covariances, groups).flatten()


def _patch_covariances(analysis: Analysis, layers: dict[str, nn.Module], limit: int) -> dict[str, Tensor]:
    """Covariances of the input patches, float64 [G, d, d] on the CPU."""
    sums: dict[str, list] = {}

    def add(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        patches = _patches(layer, inputs[0].detach(), analysis.request.protocol.token).double().cpu()  # [G, S, d]
        known = sums.setdefault(name, [0, 0, 0])
        known[0] += patches.shape[1]
        known[1] = known[1] + patches.sum(1)
        known[2] = known[2] + patches.transpose(1, 2) @ patches

    handles = [layer.register_forward_hook(partial(add, name)) for name, layer in layers.items()]
    with removing(handles), undisturbed(analysis.model):
        for batch in analysis.batches("unfolded patches", limit=limit):
            analysis.task.run(analysis.model, analysis.task.to(batch, analysis.model))
    means = {name: (first / count, second / count) for name, (count, first, second) in sums.items()}
    return {name: second - first[:, :, None] * first[:, None] for name, (first, second) in means.items()}


def _patches(layer: nn.Module, inputs: Tensor, token: int | None) -> Tensor:
    """What each kernel sees, [G, samples, d]; of tokens the one that is measured."""
    if isinstance(layer, nn.Linear):
        return position_view(layer, inputs, token).flatten(0, 1)[None]
    shape = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}
    patches = functional.unfold(inputs, layer.kernel_size, **shape)  # [B, C·k², P]
    patches = patches.view(len(inputs), layer.groups, -1, patches.shape[2])
    return patches.permute(1, 0, 3, 2).flatten(1, 2)
