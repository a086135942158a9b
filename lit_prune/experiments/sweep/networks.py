"""The dense networks of a sweep: from checkpoints, from the module, from the run folder."""

import pickle
from collections.abc import Sequence
from pathlib import Path

from lit_prune.backbones import load_weights
from lit_prune.errors import InputError
from lit_prune.modules import LitClassifier
from lit_prune.run_record import Network
from lit_prune.structure import build_network


def load_networks(module: LitClassifier, run_dir: Path, checkpoints: Sequence[str]) -> dict[str, Network]:
    """Networks by the name of what they come from.

    Args:
        module: the configured network; all checkpoints hold this backbone, pruned or not.
        run_dir: its `checkpoints/last.ckpt` is taken where neither checkpoints nor trained weights are given.
        checkpoints: checkpoints of a fit, or files of plain weights.

    Raises:
        InputError: no trained network, a file that is not there, or one that holds another network.
    """
    if not checkpoints and module.is_trained:
        return {"weights": Network.of(module)}
    last = run_dir / "checkpoints" / "last.ckpt"
    if not checkpoints and not last.is_file():
        raise InputError(
            f"sweep needs a trained network: {last} does not exist; give --checkpoints [FILE, ...] or --model.weights"
        )
    return {path: load_network(module, Path(path)) for path in checkpoints or [str(last)]}


def load_network(module: LitClassifier, path: Path) -> Network:
    """Network of one checkpoint; see `load_networks`."""
    if not path.is_file():
        raise InputError(f"checkpoints: {path} is no file; give checkpoints of a fit or files of weights")
    try:
        network = Network.from_checkpoint(path, module.image_shape) if path.suffix == ".ckpt" else None
    except KeyError:
        network = None  # a Lightning checkpoint of another project: plain weights
    except (RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"checkpoints: {path} cannot be rebuilt: {error}; give checkpoints of a fit") from error
    if network is None:
        model = build_network(module.backbone_name, module.arguments)
        load_weights(model, path, strict_head=True)
        return Network(model.eval(), module.backbone_name, module.arguments, module.image_shape, ())
    if (network.backbone, network.arguments) != (module.backbone_name, module.arguments):
        raise InputError(
            f"checkpoints: {path} holds {network.backbone} {network.arguments}, this sweep is configured for"
            f" {module.backbone_name} {module.arguments}; change --model.backbone or leave it out"
        )
    return network
