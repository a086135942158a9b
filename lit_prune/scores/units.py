"""From values of layers to values of coupled units and back, so that a rule inside a layer holds for whole groups."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_prune.measurement.layers import out_channels
from lit_prune.scores.evidence import Evidence


def unit_means(evidence: Evidence, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean of each unit's values over its coupled layers, those without a value (NaN) left out.

    Args:
        evidence: says what is coupled.
        values: layer -> [N]; groups without any of these layers are absent from the result.

    Returns:
        Group name -> [size].
    """
    found = {}
    for group, parts in evidence.couplings.items():
        rows = [values[layer][positions].nanmean(1) for layer, positions in parts if layer in values]
        if rows:
            found[group] = torch.stack(rows).nanmean(0)
    return found


def to_layers(evidence: Evidence, units: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The units' values [size] at every coupled layer's channels [N]; NaN at channels of groups that are not given.

    Heads of an attention whose projections are no layers, such as `nn.MultiheadAttention`, have theirs under the name
    of their group.
    """
    found: dict[str, Tensor] = {}
    for group, values in units.items():
        for layer, positions in evidence.couplings.get(group, ()):
            channels = out_channels(evidence.layers[layer])
            vector = found.setdefault(layer, torch.full((channels,), torch.nan, dtype=torch.float64))
            vector[positions] = values[:, None]
    layers = {layer: found[layer] for layer in evidence.layers if layer in found}
    return layers | {group: values for group, values in units.items() if group in evidence.bare_heads}


def unit_matrices(evidence: Evidence, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean over coupled layers of relations between channels, [size, size]; 0 where no layer has a value.

    Args:
        evidence: says what is coupled.
        matrices: layer -> [N, N].
    """
    found = {}
    for group, parts in evidence.couplings.items():
        blocks = []
        for layer, positions in parts:
            if layer in matrices:
                size, width = positions.shape
                flat = positions.flatten()
                blocks.append(matrices[layer][flat][:, flat].view(size, width, size, width).nanmean((1, 3)))
        if blocks:
            found[group] = torch.stack(blocks).nanmean(0).nan_to_num(0.0)
    return found
