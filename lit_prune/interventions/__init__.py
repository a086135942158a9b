"""Interventions on single channels: lesions, and replacement by peers."""

from lit_prune.interventions.lesions import LayerLesions, lesion_layer
from lit_prune.interventions.peers import PeerFit, fit_peers
from lit_prune.interventions.request import LesionRequest
from lit_prune.interventions.variants import Variants, losses_one_by_one, variant_losses

__all__ = [
    "LayerLesions",
    "LesionRequest",
    "PeerFit",
    "Variants",
    "fit_peers",
    "lesion_layer",
    "losses_one_by_one",
    "variant_losses",
]
