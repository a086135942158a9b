"""Loads a weight file into a backbone, strictly, whatever wrapped it."""

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.models.anatomy import find_head
from lit_prune.tensor_files import check_defined, read_safetensors, read_torch

_log = logging.getLogger(__name__)
_SUFFIXES = (".pth", ".pt", ".th", ".tar", ".ckpt", ".bin", ".safetensors")
_ENTRIES = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.")


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did.

    Attributes:
        loaded: Number of tensors taken from the file.
        filled: Names of BatchNorm counters that the file lacks and that stay at the model's value.
        skipped_head: Names of the head's tensors left as initialised, because the file has other classes.
    """

    loaded: int
    filled: tuple[str, ...] = ()
    skipped_head: tuple[str, ...] = ()


@checked
def load_weights(model: nn.Module, path: str | Path, *, strict_head: bool = False) -> LoadReport:
    """Copies the weights of a file into `model`, which must be the same network except for its number of classes.

    Reads torch files (never running code from them) and safetensors; takes the state_dict out of `state_dict`,
    `model_state_dict` or `model` entries and strips the prefixes of DataParallel, compile and LightningModules.
    A head for another number of classes stays as initialised, with one line in the log.

    Args:
        model: Backbone to fill, in place.
        path: .pth, .pt, .th, .tar, .ckpt, .bin or .safetensors.
        strict_head: Refuse a head of another number of classes as well.

    Raises:
        InputError: The file is missing, unreadable, holds no state_dict, or is of another network; the model is
            left untouched.
    """
    path = Path(path)
    expected = model.state_dict()
    state = _without_prefixes(_state_dict(_read(path), path), expected)
    skipped = () if strict_head else _foreign_head(model, state, expected)
    state = {name: value for name, value in state.items() if name not in skipped}
    missing = [name for name in expected if name not in state and name not in skipped]
    filled = tuple(name for name in missing if name.endswith("num_batches_tracked"))
    _check_same_network(state, expected, sorted(set(missing) - set(filled), key=missing.index), path)
    check_defined(state, f"weights {path}")
    load_state(model, state, strict=False)
    if skipped:
        _log.warning("%s has another number of classes: %s left as initialised", path, " and ".join(skipped))
    return LoadReport(len(state), filled, skipped)


def load_state(model: nn.Module, weights: Mapping[str, Tensor], strict: bool = True) -> None:
    """`model.load_state_dict` of plain tensors, which are taken for those of the versions that its layers have.

    A torch file says these versions beside the tensors; layers such as torchvision's MNASNet refuse tensors without.
    """
    state = OrderedDict(weights)
    vars(state)["_metadata"] = vars(model.state_dict())["_metadata"]
    model.load_state_dict(state, strict)


def _read(path: Path) -> Any:
    if path.suffix not in _SUFFIXES:
        raise InputError(f"weights {path}: suffix {path.suffix!r} is unknown, use one of {', '.join(_SUFFIXES)}")
    return (read_safetensors if path.suffix == ".safetensors" else read_torch)(path, "weights")


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        entry = next((name for name in _ENTRIES if isinstance(content.get(name), Mapping)), None)
        if entry is None:
            break
        content = content[entry]
    named = isinstance(content, Mapping) and all(isinstance(name, str) for name in content)
    if not named or not content or not all(_is_dense(value) for value in content.values()):
        raise InputError(f"weights {path}: holds no state_dict (names to dense tensors); save model.state_dict() there")
    return dict(content)


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def _without_prefixes(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Strips wrapper prefixes until a name is known; what lies outside the wrapper (a teacher, a loss) is dropped."""
    while not expected.keys() & state.keys():
        prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return state


def _foreign_head(model: nn.Module, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the head's tensors where the file's differ in the number of classes and in nothing else."""
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        return ()
    names = tuple(name for name in (f"{find_head(model)}.weight", f"{find_head(model)}.bias") if name in expected)
    if not all(name in state and state[name].shape[1:] == expected[name].shape[1:] for name in names):
        return ()
    return names if any(state[name].shape != expected[name].shape for name in names) else ()


def _check_same_network(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], missing: list[str], path: Path
) -> None:
    unexpected = [name for name in state if name not in expected]
    unequal = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    findings = []
    if missing:
        findings.append(f"{len(missing)} missing, first {missing[0]}")
    if unexpected:
        findings.append(f"{len(unexpected)} unknown, first {unexpected[0]}")
    if unequal:
        shapes = f"{_text(state[unequal[0]])} instead of {_text(expected[unequal[0]])}"
        findings.append(f"{len(unequal)} of another shape, first {unequal[0]} ({shapes})")
    if findings:
        raise InputError(f"weights {path}: checkpoint of another network? {'; '.join(findings)}")


def _text(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
