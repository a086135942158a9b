"""The dense networks of a sweep: from checkpoints, from the module, from the run folder."""

from collections.abc import Sequence
from pathlib import Path

from lit_prune.errors import InputError
from lit_prune.structure.networks import Network, find_network, read_network
from lit_prune.train.classifier import LitClassifier


def load_networks(module: LitClassifier, run_dir: Path, checkpoints: Sequence[str]) -> dict[str, Network]:
    """Networks by the name of what they come from.

    Args:
        module: the configured network; all checkpoints hold this backbone, pruned or not.
        run_dir: its `checkpoints/last.ckpt` is taken where neither checkpoints nor trained weights are given.
        checkpoints: checkpoints of a fit, or files of plain weights.

    Raises:
        InputError: as `find_network`; a file that holds another backbone.
    """
    if not checkpoints:
        source = "weights" if module.is_trained else str(run_dir / "checkpoints" / "last.ckpt")
        networks = {source: find_network(module, run_dir, None, "sweep")}
    else:
        networks = {path: read_network(Path(path), module, "checkpoints") for path in checkpoints}
    for path, network in networks.items():
        if (network.backbone, network.arguments) != (module.backbone_name, module.arguments):
            raise InputError(
                f"checkpoints: {path} holds {network.backbone} {network.arguments}, this sweep is configured for"
                f" {module.backbone_name} {module.arguments}; change --model.backbone or leave it out"
            )
    return networks
