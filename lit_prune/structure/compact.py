"""The compact folder: weights, and the recipe that rebuilds the network around them. No data, no pickle."""

import hashlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.files import write_json
from lit_prune.models import build_backbone
from lit_prune.structure.latency import own_tensors
from lit_prune.structure.plan import Plan
from lit_prune.structure.record import Record, note_record
from lit_prune.structure.surgery import apply_plan

FORMAT = "lit_prune.compact"
VERSION = 1
WEIGHTS, STRUCTURE, REPORT = "model.safetensors", "structure.json", "report.json"


def build_network(backbone: str, arguments: dict[str, Any] | None = None, pretrained: bool = False) -> nn.Module:
    """A network by name, or by import path.

    Args:
        backbone: a name for `build_backbone`, or "package.module:callable", which is imported and called.
        arguments: keyword arguments of either.
        pretrained: start from published weights (a download; names only).

    Raises:
        InputError: unknown name, or an import path that leads nowhere.
    """
    arguments = dict(arguments or {})
    record = Record(backbone, arguments)
    if ":" not in backbone:
        return note_record(build_backbone(backbone, **(arguments | {"pretrained": pretrained})), record)
    if pretrained:
        raise InputError(f"backbone {backbone!r} is an import path; pretrained=True works with names only")
    package, _, attribute = backbone.partition(":")
    try:
        builder = getattr(importlib.import_module(package), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"backbone {backbone!r} cannot be imported: {error}; give package.module:callable") from error
    return note_record(builder(**arguments), record)


def save_compact(
    folder: str | Path,
    model: nn.Module,
    *,
    backbone: str,
    arguments: dict[str, Any],
    input_shape: Sequence[int],
    plans: Sequence[Plan],
    report: dict[str, Any] | None = None,
) -> None:
    """Writes `model.safetensors`, `structure.json` and `report.json`; the folder appears whole or not at all.

    Args:
        folder: where to; an earlier compact folder is replaced, anything else refused.
        model: the network after all `plans`.
        backbone: name or import path for `build_network`.
        arguments: its keyword arguments, plain JSON values.
        input_shape: shape of one image, (C, H, W).
        plans: every plan applied since `build_network`, in order.
        report: figures of the networks, see the run folder.

    Raises:
        InputError: `folder` holds something else.
    """
    with _whole_folder(Path(folder)) as partial:
        save_file(own_tensors(model), partial / WEIGHTS)
        write_json(
            partial / STRUCTURE,
            {
                "format": FORMAT,
                "version": VERSION,
                "backbone": backbone,
                "arguments": arguments,
                "input_shape": [int(size) for size in input_shape],
                "plans": [plan.to_dict() for plan in plans],
                "sha256": _sha256(partial / WEIGHTS),
            },
        )
        write_json(partial / REPORT, report or {})


def load_compact(folder: str | Path) -> nn.Module:
    """The network of a compact folder, in evaluation mode on the CPU, every parameter trainable.

    Rebuilds the dense network without a download, replays the plans and loads the weights strictly; outputs are
    bit-equal to those of the saved network. A folder whose backbone is an import path imports that module.

    Args:
        folder: written by `save_compact`.

    Raises:
        InputError: missing, damaged or foreign folder.
    """
    folder = Path(folder)
    structure = _read_structure(folder)
    try:
        plans = [Plan.from_dict(plan, str(folder / STRUCTURE)) for plan in structure["plans"]]
        example = torch.zeros(1, *structure["input_shape"])
        arguments = {
            key: value for key, value in structure["arguments"].items() if key not in ("pretrained", "weights")
        }
        backbone = structure["backbone"]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / STRUCTURE} is damaged: {type(error).__name__} {error}; save it again") from error
    with torch.random.fork_rng(devices=[]):
        model = build_network(backbone, arguments)
    for plan in plans:
        model = apply_plan(model, plan, example)
    _load_weights(model, _read_weights(folder, structure), folder)
    return model.eval()


def _read_structure(folder: Path) -> dict[str, Any]:
    try:
        structure = json.loads((folder / STRUCTURE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no compact folder: {STRUCTURE} cannot be read ({error})") from error
    found = (structure.get("format"), structure.get("version")) if isinstance(structure, dict) else None
    if found != (FORMAT, VERSION):
        raise InputError(f"{folder / STRUCTURE} is not of format {FORMAT} {VERSION} (found {found}); use save_compact")
    return structure


def _read_weights(folder: Path, structure: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{path} is missing; copy the whole folder")
    if _sha256(path) != structure.get("sha256"):
        raise InputError(f"{path} does not match the sha256 in {STRUCTURE}; copy the whole folder again")
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _load_weights(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Loads strictly, in the saved precision; names left out at saving share the memory of one that is there."""
    state = model.state_dict(keep_vars=True)
    expected = own_tensors(model)
    wrong = sorted(expected.keys() ^ weights.keys())
    wrong += [name for name in weights if name in expected and weights[name].shape != expected[name].shape]
    if wrong:
        raise InputError(f"{folder / WEIGHTS} does not fit the network of {STRUCTURE}: see {wrong[0]!r}")
    for name, value in weights.items():
        state[name].data = state[name].data.to(value.dtype)
    with torch.no_grad():
        for name, value in weights.items():
            state[name].copy_(value)


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder beside `folder`; on success it takes its place, on an exception it is removed.

    Raises:
        InputError: `folder` is a file, or a folder with other contents than a compact network.
    """
    if folder.exists() and not folder.is_dir() or folder.is_dir() and any(folder.iterdir()):
        try:
            _read_structure(folder)
        except InputError as error:
            raise InputError(f"{folder} holds something else than a compact network; choose another folder") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    replaced = partial.with_suffix(".replaced")
    try:
        yield partial
        partial.chmod(0o755)
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(partial, folder)
    finally:
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
