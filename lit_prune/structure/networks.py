"""Trained networks: with all that rebuilds them, and where a verb finds them."""

import hashlib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_prune.errors import InputError
from lit_prune.models import load_weights
from lit_prune.structure import Plan, apply_plan, build_network, save_compact
from lit_prune.structure.record import record_of

if TYPE_CHECKING:
    from lit_prune.train.classifier import LitClassifier


@dataclass(frozen=True)
class Network:
    """A pruned network with all that rebuilds it: weights, backbone name, arguments, image shape, plans."""

    model: nn.Module
    backbone: str
    arguments: dict[str, Any]
    image_shape: tuple[int, int, int]
    plans: tuple[Plan, ...]

    @classmethod
    def of(cls, module: "LitClassifier") -> "Network":
        """Network of a LightningModule as it stands."""
        plans = record_of(module.backbone).plans
        return cls(module.backbone, module.backbone_name, module.arguments, module.image_shape, plans)

    @classmethod
    def from_checkpoint(cls, path: Path, image_shape: tuple[int, int, int]) -> "Network":
        """Network of a Lightning checkpoint written during `fit`."""
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved = checkpoint["lit_prune_structure"]
        plans = tuple(Plan.from_dict(plan) for plan in saved["plans"])
        model = build_network(saved["backbone"], saved["arguments"])
        for plan in plans:
            model = apply_plan(model, plan, torch.zeros(1, *image_shape))
        weights = {
            k.removeprefix("backbone."): v for k, v in checkpoint["state_dict"].items() if k.startswith("backbone.")
        }
        model.load_state_dict(weights)
        return cls(model.eval(), saved["backbone"], saved["arguments"], image_shape, plans)

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
        )


def find_network(module: "LitClassifier", run_dir: Path, ckpt_path: str | None, verb: str) -> Network:
    """The trained network of a verb: of `ckpt_path`, else the module's own, else of the run folder's last checkpoint.

    Raises:
        InputError: there is none, or as `read_network`.
    """
    if ckpt_path is not None:
        return read_network(Path(ckpt_path), module, "ckpt_path")
    if module.is_trained:
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
    if not path.is_file():
        raise InputError(f"{argument}: {path} is no file; give a checkpoint of a fit or a file of weights")
    try:
        if path.suffix == ".ckpt":
            return Network.from_checkpoint(path, module.image_shape)
    except KeyError:
        pass  # a Lightning checkpoint of another project: plain weights
    except (RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"{argument}: {path} cannot be rebuilt: {error}; give a checkpoint of a fit") from error
    model = build_network(module.backbone_name, module.arguments)
    load_weights(model, path, strict_head=True)
    return Network(model.eval(), module.backbone_name, module.arguments, module.image_shape, ())


def fingerprint(model: nn.Module, record: dict[str, Any]) -> str:
    """Hash of a network's parameters and buffers, and of the record that goes with it."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
