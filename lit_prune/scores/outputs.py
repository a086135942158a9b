"""Scores from what layers put out, from gradients there, and from what the layers after them read."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_prune.measurement import local_axis
from lit_prune.measurement.inputs import input_weight_power, reads
from lit_prune.measurement.moments import Moments
from lit_prune.replace.reconstruction import ReaderMoments, costs_by_group, reader_moments, readers_of
from lit_prune.replace.stand_ins import affine_risks
from lit_prune.scores.evidence import Evidence
from lit_prune.scores.hulls import full_explanation, greedy_hulls
from lit_prune.scores.method import register_score
from lit_prune.scores.units import correlations, to_layers
from lit_prune.structure.cost_model import CostModel
from lit_prune.structure.groups import Group


@register_score("baseline", needs=("sums",))
def activation_rms(evidence: Evidence) -> dict[str, Tensor]:
    """√(mean of Y_i² over images and positions), Y the raw output."""
    scores = {}
    for name, sums in evidence.sums.layers.items():
        square = sums.outputs.variances() + sums.outputs.mean().square()
        scores[name] = square.clamp_min(0).sqrt().cpu()
    return scores


@register_score("baseline", needs=("independence",))
def chip(evidence: Evidence) -> dict[str, Tensor]:
    """Channel independence: mean over images of the nuclear norm that the raw output [N, positions] loses without i.

    Source: Sui et al. 2021, equation 4; see `independence.nuclear_drops`.
    """
    return evidence.collected("independence")


@register_score("local", needs=("sums",))
def compact_support(evidence: Evidence) -> dict[str, Tensor]:
    """z(I_X) - z(C) over a layer's live channels, C_i = E_full/max(1, |H_i|) the compact peer support.

    A channel that few peers explain well is worth less than its input capture says (the keep-side of the lesion score).

    Source: the two-axis paper, appendix K.2.
    """
    captures, scores = evidence.column("input_capture"), {}
    for layer, sums in evidence.sums.layers.items():
        support = greedy_hulls(correlations(sums)).compact_support
        live = support.isfinite()
        scores[layer] = torch.full_like(support, torch.nan)
        scores[layer][live] = _standardised(captures[layer][live]) - _standardised(support[live])
    return scores


def _standardised(values: Tensor) -> Tensor:
    """Values with mean 0 and population standard deviation 1; zeros where they do not vary."""
    deviation = values.std(correction=0)
    return (values - values.mean()) / deviation if deviation > 0 else torch.zeros_like(values)


@register_score("local", needs=("input_variances",))
def variance(evidence: Evidence) -> dict[str, Tensor]:
    """Var(a_j) of the post-activation value, as the next layers read it: mean over consumers (VBP).

    One value per unit of a coupled group, given under the name of each of its layers; layers that nothing reads (the
    classifier) are left out.
    """
    return _group_scores(evidence, lambda module, values: values, torch.Tensor.mean)


@register_score("local", needs=("input_variances",))
def cmr_logit(evidence: Evidence) -> dict[str, Tensor]:
    """Var(a_j)·‖W[:,j]‖², a_j the value that a consumer reads and W[:,j] its weights for it, summed over consumers.

    It is invariant to rescaling a unit by any factor that its consumers undo. Per group, as `variance`.

    Source: the causal mechanism reduction paper; definitions in `mechanisms`.
    """
    return _group_scores(evidence, lambda module, values: values * input_weight_power(module), torch.Tensor.sum)


@register_score("baseline", needs=("unit_moments", "sums"))
def mipp(evidence: Evidence) -> dict[str, Tensor]:
    """Information of the next layer that a unit alone carries, in nats, summed over the layers that read it.

    With Y' = Σ_i W[:,i]·a_i + noise of variance σ0² on each output and Gaussian a, what is lost without unit i is
    I(Y'; a_i | others) = ½·log(1 + v_i·‖W[:,i]‖²/σ0²), v_i = 1/(Σ⁻¹)_ii the variance of a_i that the other units leave.
    Σ is the covariance of what the reader is given, over images and positions (a kernel's taps count as one reading);
    σ0² the noise floor of the reader's own outputs.

    Source: mutual-information preserving pruning (Westphal et al. 2024) is the idea; the closed form is ours.
    """
    totals: dict[str, Tensor] = {}
    found = evidence.collected("unit_moments")
    for group in evidence.read_groups:
        readers = {m.module: torch.tensor(m.positions) for m in group.members if reads(group, m)}
        parts = [
            _carried(found[group.name, reader].moments, _weight_power(evidence, reader, positions))
            for reader, positions in readers.items()
            if (group.name, reader) in found
        ]
        if parts:
            totals[group.name] = torch.stack(parts).sum(0)
    return to_layers(evidence, totals)


def _weight_power(evidence: Evidence, reader: str, positions: Tensor) -> Tensor:
    """‖W[:,i]‖²/σ0² of each unit, [size]."""
    noise = local_axis.noise_floor(local_axis.signal_power(evidence.sums.layers[reader].outputs).cpu())
    return input_weight_power(evidence.model.get_submodule(reader))[positions].sum(1) / noise


def _carried(units: Moments, power: Tensor) -> Tensor:
    """½·log(1 + v·power) of each unit, [size]; 0 for one that does not vary."""
    joint = units.covariance()
    spread = joint.diagonal().clamp_min(0)
    live = ~local_axis.dead_channels(spread)
    found = torch.zeros_like(spread)
    explained = full_explanation(local_axis.correlation_matrix(joint)[live][:, live])
    found[live] = 0.5 * torch.log1p(spread[live] * (1 - explained) * power[live])
    return found.nan_to_num(0.0)


@register_score("mixed", "gradients", defaults=(1.0,))
def reconstruction(evidence: Evidence, per_mac: float) -> dict[str, Tensor]:
    """Squared distortion of the prediction that a unit adds when its readers are solved again without it.

    It is divided by the multiply-adds. Units go in greedy order, the cheapest of those left first; meant for the
    replacement kind `refit` and global allocation. `per_mac` is the power of the multiply-adds, 0 for no division. Per
    group, as `variance`; see `lit_prune.replace.reconstruction_costs`.
    """
    cost_model = CostModel.build(evidence.model, evidence.graph, evidence.example)
    costs = costs_by_group(evidence.model, evidence.graph, evidence.once(moments_of_readers), cost_model, per_mac)
    return to_layers(evidence, costs)


def moments_of_readers(evidence: Evidence) -> dict[str, ReaderMoments]:
    """See `reader_moments`, of all layers that read a prunable group."""
    readers = readers_of(evidence.model, evidence.graph)
    return reader_moments(evidence.model, readers, evidence.batches, evidence.task, evidence.seed)


@register_score("target", "gradients", needs=("curvatures",))
def cmr_const(evidence: Evidence) -> dict[str, Tensor]:
    """Rise of the loss when a unit takes its best constant: gradient and Gauss-Newton curvature of the task's loss.

    At a linear softmax head the curvature is exact. Summed over a unit's positions and consumers; per group, as
    `variance`.

    Source: the causal mechanism reduction paper, equation 9.
    """
    values = {name: found.scores() for name, found in evidence.collected("curvatures").items()}
    return summed_over_readers(evidence, values)


@register_score("target", "gradients", needs=("curvatures",))
def cmr_curvature(evidence: Evidence) -> dict[str, Tensor]:
    """Curvature-weighted variance `½ min_c E h (a - c)²`: `cmr_const` with every sample's gradient taken as zero, nats.

    Source: the causal mechanism reduction paper, equation 9 under condition (i) of lemma 1; read as cwvar.
    """
    values = {name: found.without_gradient().scores() for name, found in evidence.collected("curvatures").items()}
    return summed_over_readers(evidence, values)


def summed_over_readers(evidence: Evidence, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values of the readers' input channels, [C] each, summed over a unit's positions and readers, by layer."""
    units = {group.name: _unit_values(group, values, torch.Tensor.sum) for group in evidence.read_groups}
    return to_layers(evidence, units)


def _group_scores(
    evidence: Evidence, channel_value: Callable[[nn.Module, Tensor], Tensor], reduce: Callable
) -> dict[str, Tensor]:
    """Values of the consumers' input channels, reduced over a unit's positions and consumers, by producer."""
    found = evidence.collected("input_variances")
    values = {
        name: channel_value(evidence.model.get_submodule(name), inputs.moments.variances())
        for name, inputs in found.items()
    }
    return to_layers(evidence, {group.name: _unit_values(group, values, reduce) for group in evidence.read_groups})


def _unit_values(group: Group, values: dict[str, Tensor], reduce: Callable) -> Tensor:
    """One value a unit of the group, [size]: `reduce` over positions, then over consumers."""
    read = [m for m in group.members if m.axis == "in" and m.module in group.consumers and m.module in values]
    by_consumer = [reduce(values[m.module][torch.tensor(m.positions)], 1) for m in read]  # each [size]
    return reduce(torch.stack(by_consumer), 0) if by_consumer else torch.full((group.size,), torch.nan).double()


@register_score("baseline", "gradients", needs=("saliency",))
def taylor(evidence: Evidence) -> dict[str, Tensor]:
    """Mean over images of |Σ_p a_i·∂L/∂a_i|, a the raw output, L the image's loss (Molchanov et al. 2017).

    The sum runs over all positions (all tokens of a token layer). Evaluation mode, so that images are independent;
    parameters get no gradient. Layers that the loss does not depend on get 0.

    Raises:
        InputError: a loss that is not finite.
    """
    return evidence.collected("saliency")


@register_score("target", "gradients", defaults=(16.0, 0.0001, "pearson"), needs=("risk_rows",))
def cmr_affine(evidence: Evidence, parents: float, ridge: float, rule: str) -> dict[str, Tensor]:
    """Rise of the loss, to second order, when a unit becomes its best affine function of r others, in nats.

    `affine_risks` with the Gauss-Newton curvature of the loss in the value that a reader is given, summed over
    the readers. Positions count as independent and are sampled (at most 8 an image, 4096 a layer). Per group, as
    `variance`.

    Args:
        evidence: network and labelled data.
        parents: r, at most all others.
        ridge: relative to each parent's own weighted variance.
        rule: who the parents are: the best by `pearson` correlation, by `weighted_pearson` (correlation times the
            cosine of the outgoing weights, both absolute; of an ungrouped reader), or `random` ones.

    Raises:
        InputError: as `affine_risks`.

    Source: causal mechanism reduction, affine case of theorem 1.
    """
    values = {}
    for reader, rows in evidence.collected("risk_rows").items():
        module = evidence.model.get_submodule(reader)
        grouped = rule == "weighted_pearson" and getattr(module, "groups", 1) > 1
        fitting = "pearson" if grouped else rule
        values[reader] = affine_risks(rows, module.weight, parents, ridge, fitting, evidence.seed)
    return summed_over_readers(evidence, values)
