"""Scores that look at weights alone. Each is a dict: layer name to float64 [N], higher = keep."""

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.inputs import input_weight_power
from lit_prune.measurement.layers import by_output, out_channels, weight_rows
from lit_prune.scores.evidence import Evidence
from lit_prune.scores.method import register_score
from lit_prune.scores.units import to_layers
from lit_prune.structure import axes
from lit_prune.structure.groups import Member


@register_score("baseline", "weights")
def magnitude(evidence: Evidence) -> dict[str, Tensor]:
    """‖w_i‖₂.

    Of heads of `nn.MultiheadAttention` its mean over the rows of the projection that a head has.
    """
    found = {name: weight_rows(module).norm(dim=1) for name, module in evidence.layers.items()}
    return found | {name: rows.norm(dim=2).mean(1) for name, rows in _rows_of_bare_heads(evidence).items()}


def _rows_of_bare_heads(evidence: Evidence) -> dict[str, Tensor]:
    """The rows of each unit in the matrices that project onto heads and are no layers, float64 [size, rows, D]."""
    found = {}
    for name in sorted(evidence.bare_heads):
        parts = []
        for member in evidence.graph.by_name[name].members:
            matrix = axes.find(evidence.model, member.module)
            if isinstance(matrix, nn.Parameter) and matrix.ndim == 2 and member.axis == "dim:0":
                parts.append(matrix.detach().to("cpu", torch.float64)[torch.tensor(member.positions)])
        if parts:
            found[name] = torch.cat(parts, 1)
    return found


@register_score("baseline", "weights")
def random(evidence: Evidence) -> dict[str, Tensor]:
    """Uniform on [0, 1), seeded; layers are drawn in module order."""
    generator = torch.Generator().manual_seed(evidence.seed)
    widths = {name: out_channels(module) for name, module in evidence.layers.items()}
    widths |= {name: evidence.graph.by_name[name].size for name in sorted(evidence.bare_heads)}
    return {name: torch.rand(width, generator=generator, dtype=torch.float64) for name, width in widths.items()}


@register_score("baseline", "weights")
def fpgm(evidence: Evidence) -> dict[str, Tensor]:
    """Σ_j ‖w_i - w_j‖₂: small for a kernel near the layer's geometric median (He et al. 2019)."""
    rows = {name: weight_rows(module) for name, module in evidence.layers.items()}
    return {name: torch.cdist(w, w, compute_mode="donot_use_mm_for_euclid_dist").sum(1) for name, w in rows.items()}


@register_score("baseline", "weights")
def network_slimming(evidence: Evidence) -> dict[str, Tensor]:
    """|γ_i| of the following norm (Liu et al. 2017); layers that no norm follows are left out.

    Raises:
        InputError: no layer of the network is followed by a norm.
    """
    gammas = {name: evidence.norms[name] for name in evidence.layers if name in evidence.norms}
    if not gammas:
        raise InputError("score: network_slimming needs norms, and none follows a layer here; take 'magnitude'")
    return gammas


@register_score("baseline", "weights")
def proxy(evidence: Evidence) -> dict[str, Tensor]:
    """|γ_i| of the following norm plus ‖w_i‖₁, each divided by its mean over the layer; ‖w_i‖₁ alone without a norm.

    Source: M2M-DC section 3.2 (there summed over the blocks of a stage, which the group mean does here).
    """
    scores = {}
    for name, module in evidence.layers.items():
        norms = weight_rows(module).abs().sum(1)
        scores[name] = _over_mean(norms)
        if name in evidence.norms:
            scores[name] = scores[name] + _over_mean(evidence.norms[name])
    return scores


@register_score("baseline", "weights")
def group_norm(evidence: Evidence) -> dict[str, Tensor]:
    """Mean over a coupled group's tensors of ‖·‖² of a unit's weights in each, over its mean within the group.

    The tensors are the weights of the layers that write the unit, of those that read it, of the norms and of the
    depthwise convolutions on the way; biases do not count. Where there is no depthwise convolution this is DepGraph's
    group norm as Torch-Pruning computes it (`GroupMagnitudeImportance`, p = 2, reduction and normaliser "mean").

    Source: Fang et al. 2023, equation 9.
    """
    means = {}
    for group in evidence.graph.groups:
        powers = [_member_power(evidence.model, member) for member in group.members]
        rows = [power for power in powers if power is not None]
        if rows:
            means[group.name] = _over_mean(torch.stack(rows).mean(0))
    return to_layers(evidence, means)


def _member_power(model: nn.Module, member: Member) -> Tensor | None:
    """Squared norm of each unit's weights in one member, float64 [size]; None where it has no weights."""
    module = axes.find(model, member.module)
    if isinstance(module, nn.Parameter) or getattr(module, "weight", None) is None:
        return None
    positions = torch.tensor(member.positions)
    if member.axis == "in":
        return input_weight_power(module)[positions].sum(1)
    weight = by_output(module).to("cpu", torch.float64)
    return weight.reshape(len(weight), -1).square().sum(1)[positions].sum(1)


def _over_mean(values: Tensor) -> Tensor:
    mean = values.mean()
    return values / mean if mean > 0 else values
