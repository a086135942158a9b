"""The compact folder: weights, and the recipe that rebuilds the network around them. No data, no pickle."""

import hashlib
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.files import check_seal, read_json, sealed, writable, write_json, write_text
from lit_prune.preparation import Preparation
from lit_prune.structure.card import model_card
from lit_prune.structure.description import Description
from lit_prune.structure.hooks import others_hooks
from lit_prune.structure.latency import own_tensors
from lit_prune.structure.plan import Plan
from lit_prune.structure.record import note_record, record_of
from lit_prune.tensor_files import read_safetensors, write_safetensors

FORMAT = "lit_prune.compact"
VERSION = 1
WEIGHTS, STRUCTURE, REPORT, CARD = "model.safetensors", "structure.json", "report.json", "README.md"


@checked
def save_compact(
    folder: str | Path,
    model: nn.Module,
    *,
    report: dict[str, Any] | None = None,
    preparation: Preparation | None = None,
    backbone: str | None = None,
    arguments: dict[str, Any] | None = None,
    input_shape: Sequence[int] | None = None,
    plans: Sequence[Plan] | None = None,
    inputs: dict[str, Any] | None = None,
) -> None:
    """Writes `model.safetensors`, `structure.json`, `report.json` and a model card, the folder whole or not at all.

    A network as `compress`, `apply_plan`, `replace_mechanisms`, `load_compact` or `StagedPruning` leave it knows its
    plans, what it is called with, and how it was built where a configuration says so; of any other say all that is not
    the default. What is written is rebuilt first, so that a folder which is there can be loaded.

    Args:
        folder: where to; an earlier compact folder is replaced, anything else refused.
        model: the network after all its plans.
        report: figures of the networks, see the run folder.
        preparation: how images are prepared for it, and the names of its classes; None takes what the network knows.
        backbone: name or import path for `build_network`; None: whoever loads it gives the dense network.
        arguments: its keyword arguments, plain JSON values.
        input_shape: shape of one image, (C, H, W); None where the network reads something else, see `inputs`.
        plans: every plan applied since it was built, in order; None takes those that the network knows.
        inputs: what the network reads (`lit_prune.structure.record.describe_inputs`) where it is not one image.

    Raises:
        InputError: `folder` holds something else, the network is compiled or wrapped, or backbone, arguments and plans
            do not give this network.
    """
    record = record_of(model)
    preparation = record.preparation if preparation is None else preparation
    if all(value is None for value in (backbone, arguments, input_shape, plans, inputs)):
        backbone, arguments = record.backbone, record.arguments
    if input_shape is None and inputs is None:
        input_shape, inputs = record.image_shape, None if record.image_shape else record.inputs
    plans = record.plans if plans is None else plans
    if (input_shape is None) == (inputs is None):
        raise InputError("save_compact: give input_shape, the shape of one image such as (3, 32, 32), or inputs")
    wrapped = next((type(module).__name__ for module in model.modules() if _wraps(module)), None)
    if wrapped:
        raise InputError(f"save_compact: there is a {wrapped} in it; give the bare network (not compiled or wrapped)")
    replayed = [plan.to_dict() for plan in plans]
    values = {"backbone": backbone, "arguments": arguments or {}, "plans": replayed, "inputs": inputs}
    shape = None if input_shape is None else tuple(input_shape)
    described = Description.read(values, shape, f"save_compact to {folder}")
    tensors = own_tensors(model)
    if backbone is not None:
        _check_same(described.rebuild(trust=(backbone,)), tensors, described.source)
        if hooks := others_hooks(model, changing=True):
            warnings.warn(
                f"save_compact: a folder has no hooks; put those of {', '.join(hooks)}, which change what the network "
                "computes, on it again when it is loaded",
                stacklevel=2,
            )
    with _whole_folder(Path(folder)) as partial:
        write_safetensors(partial / WEIGHTS, tensors)
        structure = {"format": FORMAT, "version": VERSION, **values, "input_shape": list(described.input_shape) or None}
        structure["preparation"] = None if preparation is None else preparation.to_dict()
        write_json(partial / STRUCTURE, sealed({**structure, "sha256": _sha256(partial / WEIGHTS)}))
        write_json(partial / REPORT, report or {})
        write_text(partial / CARD, model_card(structure, report or {}, preparation))


@checked
def load_compact(folder: str | Path, model: nn.Module | None = None, trust: Iterable[str] = ()) -> nn.Module:
    """The network of a compact folder, in evaluation mode on the CPU, every parameter trainable (as in `model`).

    Rebuilds the dense network without a download, replays the plans and loads the weights strictly; outputs are
    bit-equal to those of the saved network. Names of the project's networks, torchvision's and timm's are built; what
    a folder names beyond these is imported only where the caller names it too.

    >>> import tempfile
    >>> from lit_prune.structure import apply_plan
    >>> net, folder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), tempfile.mkdtemp() + "/net"
    >>> plan = Plan(keep_channels={"0": (0, 3, 5)}, sizes={"0": 8})
    >>> save_compact(folder, apply_plan(net, plan, torch.zeros(1, 4)), plans=[plan], input_shape=(4,))
    >>> load_compact(folder, net)[0]
    Linear(in_features=4, out_features=3, bias=True)

    Args:
        folder: written by `save_compact`.
        model: the dense network, whatever the folder calls it, or a smaller one that was made of it on the way; a copy
            is cut, nothing is imported.
        trust: import paths "package.module:callable" that the folder may name.

    Raises:
        InputError: missing, damaged or foreign folder, or an import path that is not among `trust`.
    """
    folder = Path(folder)
    structure = _read_structure(folder)
    described = Description.read(structure, structure.get("input_shape"), str(folder / STRUCTURE))
    weights = _read_weights(folder, structure)
    small = described.rebuild(model, trust)
    note_record(small, replace(described.record, preparation=_preparation(structure, folder)))
    _load_weights(small, weights, f"{folder / WEIGHTS}")
    return small.eval()


def read_preparation(folder: str | Path) -> Preparation | None:
    """How images are prepared for the network of a compact folder; None where the folder does not say.

    Raises:
        InputError: as `load_compact`.
    """
    return _preparation(_read_structure(Path(folder)), Path(folder))


def _preparation(structure: Mapping[str, Any], folder: Path) -> Preparation | None:
    said = structure.get("preparation")
    return None if said is None else Preparation.from_dict(said, f"{folder / STRUCTURE}")


def _read_structure(folder: Path) -> dict[str, Any]:
    _restore(folder)
    try:
        structure = read_json(folder / STRUCTURE, remedy="copy the whole folder")
    except InputError as error:
        raise InputError(f"{folder} is no compact folder: {error}") from error
    found = (structure.get("format"), structure.get("version")) if isinstance(structure, dict) else None
    if found != (FORMAT, VERSION):
        raise InputError(f"{folder / STRUCTURE} is not of format {FORMAT} {VERSION} (found {found}); use save_compact")
    check_seal(structure, folder / STRUCTURE)
    return structure


def _read_weights(folder: Path, structure: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{path} is missing; copy the whole folder")
    if _sha256(path) != structure.get("sha256"):
        raise InputError(f"{path} does not match the sha256 in {STRUCTURE}; copy the whole folder again")
    return read_safetensors(path)


def _wraps(module: nn.Module) -> bool:
    """Whether a module only runs another, whose tensors it gives a prefix."""
    return isinstance(module, nn.DataParallel | DistributedDataParallel) or "_orig_mod" in dict(module.named_children())


def _check_same(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuses tensors that are not those of `model`, by name and shape. InputError: the first that differs is named."""
    expected = own_tensors(model)
    wrong = sorted(expected.keys() ^ tensors.keys())
    wrong += [name for name in tensors if name in expected and tensors[name].shape != expected[name].shape]
    if wrong:
        raise InputError(
            f"{source}: the network that backbone, arguments and plans describe does not fit the weights: see "
            f"{wrong[0]!r}; give the bare network (not compiled or wrapped) and all of its plans"
        )


def _load_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Loads strictly, in the saved precision; names left out at saving share the memory of one that is there."""
    _check_same(model, weights, source)
    state = model.state_dict(keep_vars=True)
    for name, value in weights.items():
        state[name].data = state[name].data.to("cpu", value.dtype)
    with torch.no_grad():
        for name, value in weights.items():
            state[name].copy_(value)


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder beside `folder`; on success it takes its place, on an exception it is removed.

    Raises:
        InputError: `folder` is a file, a folder with other contents than a compact network, or cannot be written.
    """
    if (folder.exists() and not folder.is_dir()) or (folder.is_dir() and any(folder.iterdir())):
        try:
            _read_structure(folder)
        except InputError as error:
            raise InputError(f"{folder} holds something else than a compact network; choose another folder") from error
    writable(folder.parent)
    _restore(folder)
    shutil.rmtree(_replaced(folder), ignore_errors=True)
    for abandoned in folder.parent.glob(f".{escape(folder.name)}.*.partial"):  # of a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            os.replace(folder, _replaced(folder))
        os.replace(partial, folder)
        shutil.rmtree(_replaced(folder), ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replaced(folder: Path) -> Path:
    """Where the earlier folder waits until the new one is in its place."""
    folder = folder.absolute()
    if not folder.name:
        raise InputError(f"{folder} is no name of a folder; give one")
    return folder.with_name(f".{folder.name}.replaced")


def _restore(folder: Path) -> None:
    """Puts the earlier folder back where a process was killed between the two renames of `_whole_folder`."""
    replaced = _replaced(folder)
    if replaced.is_dir() and not folder.exists():
        os.replace(replaced, folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
