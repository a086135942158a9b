"""Files of tensors, read without running anything that is in them, and refused where they are not whole."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lit_prune.errors import InputError


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of all values in their order, for checksums."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class PickledError(InputError):
    """A file holds objects of classes."""

    def __init__(self, found: str) -> None:
        super().__init__(f"{found}; save a plain state_dict there")
        self.found = found


def read_torch(path: str | Path, argument: str = "file") -> Any:
    """The plain values and tensors of a file that `torch.save` wrote, on the CPU.

    Pickled objects are refused (`weights_only`), and so is an archive of which a record does not match its CRC-32.

    Raises:
        InputError: the file is missing, damaged, or holds more than plain values.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f"{argument}: {path}: no such file")
        _check_archive(path, argument)
        return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # each reader has its own exceptions for a broken file, some of them bare RuntimeErrors
        if "weights_only" in str(error) and _is_pickle(path):
            kind = re.search(r"GLOBAL (\S+)", str(error))
            what = f"a pickled {kind[1]}" if kind else "pickled objects"
            raise PickledError(f"{argument}: {path} is not readable: it holds {what}, not only tensors") from error
        raise InputError(
            f"{argument}: {path} is not readable: damaged, or no file of torch.save ({type(error).__name__}); give a "
            "whole one, such as an earlier checkpoint"
        ) from error


def _is_pickle(path: Path) -> bool:
    """Whether a file begins as an archive or a pickle does."""
    with path.open("rb") as opened:
        return opened.read(2) in (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


def read_safetensors(path: str | Path, argument: str = "file") -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. InputError: the file is missing or damaged."""
    if not Path(path).is_file():
        raise InputError(f"{argument}: {path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, MemoryError, RuntimeError) as error:
        raise InputError(
            f"{argument}: {path} is not readable ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as a safetensors file with the usual mode; `save_file` lets nobody but the owner read it."""
    Path(path).write_bytes(save(dict(tensors)))


def undefined_tensor(tensors: Mapping[str, Any]) -> str | None:
    """Name of the first tensor that holds NaN or +infinity; None where all are defined (masks may hold -infinity)."""
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            highest = value.detach().amax()
            if torch.isnan(highest) or highest == torch.inf:
                return str(name)
    return None


def check_defined(tensors: Mapping[str, Any], source: str) -> None:
    """Refuses weights that training has ruined. InputError: a tensor holds NaN or +infinity; it is named."""
    name = undefined_tensor(tensors)
    if name is not None:
        raise InputError(f"{source}: {name} holds NaN or infinity; take a checkpoint from before the loss diverged")


def _check_archive(path: Path, argument: str) -> None:
    """Every record of a zip archive is stored as it is and matches its CRC-32; older torch files are no archives."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        packed = next((entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED), None)
        damaged = packed.filename if packed else archive.testzip()
    if damaged is not None:
        raise InputError(f"{argument}: {path} is damaged ({damaged} is not as it was written); take another copy")
