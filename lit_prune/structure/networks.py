"""Trained networks: with all that rebuilds them, and where a verb finds them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lit_prune.errors import InputError, first_line
from lit_prune.models import build_network, load_weights
from lit_prune.models.weights import load_state
from lit_prune.structure.description import Description
from lit_prune.structure.record import Record, image_inputs, note_record, record_of
from lit_prune.tensor_files import check_defined, read_torch, tensor_bytes

if TYPE_CHECKING:
    from lit_prune.train.classifier import LitClassifier

STRUCTURE_KEY, PREFIX = "lit_prune_structure", "backbone."


def load_network(path: Path, image_shape: tuple[int, ...], trust: Iterable[str] = ()) -> nn.Module:
    """Network of a Lightning checkpoint written during `fit`, with its record, in evaluation mode.

    Args:
        path: the checkpoint.
        image_shape: (C, H, W) of one image.
        trust: import paths that the checkpoint may name.

    Raises:
        InputError: as `read_torch`; it says nothing of a network, names one that is not to be imported, or its weights
            do not fit or are not finite.
    """
    return _rebuilt(read_torch(path, "checkpoint"), image_shape, trust, f"checkpoint: {path}")


def _rebuilt(checkpoint: Any, image_shape: tuple[int, ...], trust: Iterable[str], source: str) -> nn.Module:
    """As `load_network`, of the values that were read."""
    saved = structure_of(checkpoint)
    if saved is None:
        raise InputError(f"{source} says nothing of its network's structure; give a checkpoint of a fit")
    described = Description.read(saved, image_shape, source)
    weights = backbone_weights(checkpoint, source)
    model = described.rebuild(trust=trust)
    try:
        load_state(model, weights)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{source}: its weights do not fit its plans ({first_line(error)})") from error
    return note_record(model.eval(), replace(described.record, arguments=saved["arguments"]))


def find_network(module: "LitClassifier", run_dir: Path, ckpt_path: str | None, verb: str) -> nn.Module:
    """The trained network of a verb: of `ckpt_path`, else the module's own, else of the run folder's last checkpoint.

    Its record (`record_of`) has all that rebuilds it: backbone, arguments, image shape, plans.

    Raises:
        InputError: there is none, or as `read_network`.
    """
    if ckpt_path is not None:
        return read_network(Path(ckpt_path), module, "ckpt_path")
    if module.is_trained:
        check_defined(module.backbone.state_dict(), "the network")
        record = record_of(module.backbone)
        return note_record(module.backbone, replace(record, inputs=image_inputs(module.image_shape)))
    last = run_dir / "checkpoints" / "last.ckpt"
    if not last.is_file():
        raise InputError(
            f"{verb} needs a trained network: {last} does not exist; give a checkpoint, or --model.weights FILE"
        )
    return read_network(last, module, "run_dir")


def read_network(path: Path, module: "LitClassifier", argument: str) -> nn.Module:
    """Network of a file, with its record.

    Args:
        path: a checkpoint of a fit, pruned or not, or plain weights of the module's backbone.
        module: the configured network.
        argument: what named the file, for the message.

    Raises:
        InputError: no such file, or it does not hold such a network.
    """
    trust = (module.backbone_name,)
    if path.suffix == ".ckpt":
        checkpoint = read_torch(path, argument)
        if structure_of(checkpoint) is not None:
            return _rebuilt(checkpoint, module.image_shape, trust, f"{argument}: {path}")
    elif not path.is_file():
        raise InputError(f"{argument}: {path}: no such file; give a checkpoint of a fit or a file of weights")
    model = build_network(module.backbone_name, module.arguments, trust=trust)
    load_weights(model, path, strict_head=True)
    record = Record(module.backbone_name, module.arguments, (), image_inputs(module.image_shape))
    return note_record(model.eval(), record)


def structure_of(checkpoint: Any) -> Any:
    """What a checkpoint says of its network's structure; None where it says nothing, such as another project's."""
    return checkpoint.get(STRUCTURE_KEY) if isinstance(checkpoint, Mapping) else None


def refuse_import_path(path: str | Path, key: str) -> None:
    """Refuses a checkpoint whose arguments, under `key`, name an import path as the backbone.

    Raises:
        InputError: they do; or as `read_torch`.
    """
    checkpoint = read_torch(path, "checkpoint")
    arguments = checkpoint.get(key) if isinstance(checkpoint, Mapping) else None
    named = arguments.get("backbone") if isinstance(arguments, Mapping) else None
    if ":" in str(named):
        raise InputError(f"checkpoint {path} names the import path {named!r}; if it is yours, give backbone={named!r}")


def epochs_done(path: Path) -> int:
    """Epochs that a run has finished by its last checkpoint; 0 where there is none.

    Raises:
        InputError: as `read_torch`, or it does not say.
    """
    if not path.is_file():
        return 0
    checkpoint = read_torch(path, "checkpoint")
    epoch = checkpoint.get("epoch") if isinstance(checkpoint, Mapping) else None
    if type(epoch) is not int:
        raise InputError(f"checkpoint: {path} does not say its epoch; delete it and run again")
    return epoch + 1


def backbone_weights(checkpoint: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The backbone's part of a checkpoint's weights, under the backbone's own names.

    Raises:
        InputError: there is none, or it is not finite.
    """
    found = checkpoint.get("state_dict")
    state = found if isinstance(found, Mapping) else {}
    weights = {name.removeprefix(PREFIX): value for name, value in state.items() if str(name).startswith(PREFIX)}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{source} holds no weights of a backbone; give a checkpoint of a fit")
    check_defined(weights, source)
    return weights


def fingerprint(model: nn.Module, record: dict[str, Any]) -> str:
    """Hash of a network's parameters and buffers, and of the record that goes with it."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()
