"""Scores that look at weights alone. Each is a dict: layer name to float64 [N], higher = keep."""

import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.layers import weight_rows
from lit_prune.scores.evidence import Evidence


def magnitude(evidence: Evidence) -> dict[str, Tensor]:
    """‖w_i‖₂."""
    return {name: weight_rows(module).norm(dim=1) for name, module in evidence.layers.items()}


def random(evidence: Evidence) -> dict[str, Tensor]:
    """Uniform on [0, 1), seeded; layers are drawn in module order."""
    generator = torch.Generator().manual_seed(evidence.seed)
    return {
        name: torch.rand(len(module.weight), generator=generator, dtype=torch.float64)
        for name, module in evidence.layers.items()
    }


def fpgm(evidence: Evidence) -> dict[str, Tensor]:
    """Σ_j ‖w_i - w_j‖₂: small for a kernel near the layer's geometric median (He et al. 2019)."""
    rows = {name: weight_rows(module) for name, module in evidence.layers.items()}
    return {name: torch.cdist(w, w, compute_mode="donot_use_mm_for_euclid_dist").sum(1) for name, w in rows.items()}


def network_slimming(evidence: Evidence) -> dict[str, Tensor]:
    """|γ_i| of the following norm (Liu et al. 2017); layers that no norm follows are left out.

    Raises:
        InputError: no layer of the network is followed by a norm.
    """
    gammas = {name: evidence.norms[name] for name in evidence.layers if name in evidence.norms}
    if not gammas:
        raise InputError("score: network_slimming needs norms, and none follows a layer here; take 'magnitude'")
    return gammas


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


def _over_mean(values: Tensor) -> Tensor:
    mean = values.mean()
    return values / mean if mean > 0 else values
