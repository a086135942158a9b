"""Weights of a backbone: loaded from a file, strictly, whatever wrapped it; and those that others published."""

import logging
import os
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
AKAMASTER = (
    "https://raw.githubusercontent.com/akamaster/pytorch_resnet_cifar10/"
    "d5489e8995e81e91ce6b1d69dcc98ad579b0b153/pretrained_models/"
)
FOLDER = "LIT_PRUNE_WEIGHTS"
"""Variable of the environment that names the folder of fetched weights; default: `~/.cache/lit_prune/weights`."""


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


@dataclass(frozen=True)
class Published:
    """A file of weights.

    Attributes:
        url: where it is fetched from.
        sha256: of the file.
        classes: of its head.
        accuracy: on the test images of its data set, as published.
        mean: of each channel that its images were normalised with, on the scale 0..1.
        std: likewise.
        source: who published it, under what licence.
    """

    url: str
    sha256: str
    classes: int
    accuracy: float
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    source: str = "Y. Idelbayev, github.com/akamaster/pytorch_resnet_cifar10, BSD 2-Clause"


PUBLISHED = {
    "cifar_resnet20": Published(
        f"{AKAMASTER}resnet20-12fca82f.th",
        "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8",
        10,
        0.9173,
    ),
    "cifar_resnet32": Published(
        f"{AKAMASTER}resnet32-d509ac18.th",
        "d509ac1820d7f25398913559d7e81a13229b1e7adc5648e3bfa5e22dc137f850",
        10,
        0.9263,
    ),
    "cifar_resnet56": Published(
        f"{AKAMASTER}resnet56-4bfd9763.th",
        "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367",
        10,
        0.9339,
    ),
}
"""By backbone: CIFAR-10."""


def published_file(backbone: str) -> Path:
    """The file of a backbone's published weights, fetched where it is not there yet.

    Raises:
        InputError: nobody published any that we know of, the download failed, or the file is another one.
    """
    if backbone not in PUBLISHED:
        raise InputError(
            f"backbone {backbone!r} has no weights to download (there are some for {', '.join(PUBLISHED)}): use "
            "pretrained=False and a local file"
        )
    from lit_prune.data.download import fetch_file

    found = PUBLISHED[backbone]
    folder = Path(os.environ.get(FOLDER) or Path.home() / ".cache" / "lit_prune" / "weights")
    return fetch_file(found.url, found.sha256, folder / found.url.rpartition("/")[2])
