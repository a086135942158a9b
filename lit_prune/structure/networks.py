"""Trained networks: with all that rebuilds them, and where a verb finds them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lit_prune.errors import InputError, first_line
from lit_prune.models import build_network, load_weights
from lit_prune.models.weights import load_state
from lit_prune.structure import Plan, save_compact
from lit_prune.structure.description import Description
from lit_prune.structure.record import record_of
from lit_prune.tensor_files import check_defined, read_torch, tensor_bytes

if TYPE_CHECKING:
    from lit_prune.train.classifier import LitClassifier

STRUCTURE_KEY, PREFIX = "lit_prune_structure", "backbone."


@dataclass(frozen=True)
class Network:
    """A pruned network with all that rebuilds it: weights, backbone name, arguments, image shape, plans."""

    model: nn.Module
    backbone: str
    arguments: dict[str, Any]
    image_shape: tuple[int, ...]
    plans: tuple[Plan, ...]

    @classmethod
    def of(cls, module: "LitClassifier") -> "Network":
        """Network of a LightningModule as it stands."""
        plans = record_of(module.backbone).plans
        return cls(module.backbone, module.backbone_name, module.arguments, module.image_shape, plans)

    @classmethod
    def from_checkpoint(cls, path: Path, image_shape: tuple[int, ...], trust: Iterable[str] = ()) -> "Network":
        """Network of a Lightning checkpoint written during `fit`.

        Args:
            path: the checkpoint.
            image_shape: (C, H, W) of one image.
            trust: import paths that the checkpoint may name.

        Raises:
            InputError: as `read_torch`; it says nothing of a network, names one that is not to be imported, or its
                weights do not fit or are not finite.
        """
        return cls.of_checkpoint(read_torch(path, "checkpoint"), image_shape, trust, f"checkpoint: {path}")

    @classmethod
    def of_checkpoint(
        cls, checkpoint: Any, image_shape: tuple[int, ...], trust: Iterable[str], source: str
    ) -> "Network":
        """As `from_checkpoint`, of the values that were read."""
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
        return cls(model.eval(), saved["backbone"], saved["arguments"], described.input_shape, described.plans)

    def save(self, folder: Path, report: dict[str, Any] | None = None) -> None:
        """Writes the folder that `load_compact` reads."""
        save_compact(
            folder,
            self.model,
            backbone=self.backbone,
            arguments=self.arguments,
            input_shape=self.image_shape,
            plans=self.plans,
            report=report,
            preparation=record_of(self.model).preparation,
        )


def find_network(module: "LitClassifier", run_dir: Path, ckpt_path: str | None, verb: str) -> Network:
    """The trained network of a verb: of `ckpt_path`, else the module's own, else of the run folder's last checkpoint.

    Raises:
        InputError: there is none, or as `read_network`.
    """
    if ckpt_path is not None:
        return read_network(Path(ckpt_path), module, "ckpt_path")
    if module.is_trained:
        check_defined(module.backbone.state_dict(), "the network")
        return Network.of(module)
    last = run_dir / "checkpoints" / "last.ckpt"
    if not last.is_file():
        raise InputError(
            f"{verb} needs a trained network: {last} does not exist; give a checkpoint, or --model.weights FILE"
        )
    return read_network(last, module, "run_dir")


def read_network(path: Path, module: "LitClassifier", argument: str) -> Network:
    """Network of a file.

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
            return Network.of_checkpoint(checkpoint, module.image_shape, trust, f"{argument}: {path}")
    elif not path.is_file():
        raise InputError(f"{argument}: {path}: no such file; give a checkpoint of a fit or a file of weights")
    model = build_network(module.backbone_name, module.arguments, trust=trust)
    load_weights(model, path, strict_head=True)
    return Network(model.eval(), module.backbone_name, module.arguments, module.image_shape, ())


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
