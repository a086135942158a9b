"""Times of a compact network as it is deployed: eager PyTorch beside ONNX Runtime, at chosen batch sizes."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn

from lit_prune.arguments import check_at_once
from lit_prune.errors import InputError
from lit_prune.files import read_json, write_json
from lit_prune.quantise import FILE as INT8
from lit_prune.structure import load_compact
from lit_prune.structure.description import Description
from lit_prune.structure.runtimes import Eager, onnx_session
from lit_prune.timing import Timing, busy, circumstances, time_runs

FILE = "latency.json"


@dataclass(frozen=True)
class Setting:
    """How times are taken.

    Attributes:
        batch_sizes: images in a pass, one row each.
        device: of the eager networks; ONNX Runtime runs on the CPU.
        threads: of both; None leaves what the process has.
        rounds: timed passes at the least.
    """

    batch_sizes: tuple[int, ...] = (1, 64)
    device: str = "cpu"
    threads: int | None = None
    rounds: int = 20

    def __post_init__(self) -> None:
        """Raises InputError where a value is out of range."""
        counts = (*self.batch_sizes, self.rounds, *([] if self.threads is None else [self.threads]))
        if not self.batch_sizes or min(counts) < 1:
            raise InputError("latency: batch_sizes, rounds and threads must be at least 1")
        check_at_once(f"latency: threads={self.threads}", self.threads or 1)
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"latency: device={self.device!r} is not there; give cpu")


def measure_deployment(folder: str | Path, setting: Setting, trust: Sequence[str] = ()) -> dict[str, Any]:
    """Times of the dense and the compact network of a folder, all in turns.

    The dense network has fresh weights, which take the same time. Where `export --int8` has left its file in `export/`,
    that is timed too. Written to `latency.json` beside `compact/`.

    Args:
        folder: run folder with `compact/`, or a compact folder.
        setting: see `Setting`.
        trust: import paths that the folder may name.

    Returns:
        `circumstances`, and `rows`: network, runtime, batch, milliseconds (`Timing`), images_per_second.

    Raises:
        InputError: no compact folder of a network that takes images, or a setting is wrong.
    """
    folder = Path(folder)
    compact = folder / "compact" if (folder / "compact").is_dir() else folder
    networks = _networks(compact, trust)
    int8 = compact.parent / "export" / INT8
    threads = torch.get_num_threads()
    torch.set_num_threads(setting.threads or threads)
    try:
        with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
            sizes = setting.batch_sizes
            rows = [row for size in sizes for row in _rows(networks, int8, size, setting, Path(scratch))]
        said = circumstances(setting.device)
    finally:
        torch.set_num_threads(threads)
    found = {"circumstances": said, "rows": rows}
    write_json(compact.parent / FILE, found)
    return found


def _networks(compact: Path, trust: Sequence[str]) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Dense and compact network, each with the shape of one image."""
    small = load_compact(compact, trust=trust)
    structure = read_json(compact / "structure.json")
    if structure.get("input_shape") is None:
        raise InputError(f"latency: the network of {compact} takes more than one image tensor; time it where it runs")
    shape = tuple(structure["input_shape"])
    described = Description.read({**structure, "plans": []}, shape, str(compact))
    return {"dense": (described.rebuild(trust=trust).eval(), shape), "compact": (small, shape)}


def _rows(networks: dict[str, Any], int8: Path, size: int, setting: Setting, scratch: Path) -> list[dict[str, Any]]:
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, (network, shape) in networks.items():
        images = torch.zeros(size, *shape, device=setting.device)
        runs[name, "eager"] = Eager().network(network.to(setting.device), images)
        if find_spec("onnxruntime") and find_spec("onnxscript"):
            file = _exported(network, images.shape[1:], scratch / f"{name}.onnx")
            runs[name, "ONNX Runtime"] = onnx_session(file.read_bytes(), images)
            if find_spec("openvino"):
                from lit_prune.export import load_openvino

                threads = setting.threads or torch.get_num_threads()
                runs[name, "OpenVINO"] = partial(load_openvino(file, threads), images.cpu())
    if int8.is_file() and find_spec("onnxruntime"):
        runs["compact", "ONNX Runtime, INT8"] = onnx_session(int8.read_bytes(), images)
    timings = time_runs(list(runs.values()), setting.rounds)
    return [
        {"network": name, "runtime": kind, "batch": size, "milliseconds": asdict(timing)}
        | {"images_per_second": 1000 * size / timing.median}
        for (name, kind), timing in zip(runs, timings, strict=True)
    ]


def _exported(network: nn.Module, shape: torch.Size, file: Path) -> Path:
    """The network's ONNX file, written at the first call."""
    from lit_prune.export import export_module

    if not file.exists():
        with torch.inference_mode(False):
            written = export_module(network, shape, file.parent / file.stem, ("onnx",))
        Path(written["onnx"]["file"]).rename(file)
    return file


def latency_table(found: dict[str, Any]) -> Table:
    """The times for the terminal, with what they hold for and a warning where they are worth little."""
    said = found["circumstances"]
    warning = "\nThe machine was busy: measure again" if busy(said) else ""
    caption = f"{said['device']}, {said['threads']} threads, load {said['load']}, {said['date']}{warning}"
    table = Table(title="latency", caption=caption, box=SIMPLE_HEAD, pad_edge=False)
    for column in ("network", "runtime", "batch", "one pass", "images/s"):
        table.add_column(column, justify="left" if column in ("network", "runtime") else "right")
    for row in found["rows"]:
        timing = Timing(**row["milliseconds"])
        shown = f"{_digits(timing.median, 3)} ± {_digits(timing.spread / 2, 1)} ms{' (noisy)' if timing.noisy else ''}"
        table.add_row(row["network"], row["runtime"], str(row["batch"]), shown, f"{row['images_per_second']:,.0f}")
    return table


def _digits(value: float, count: int) -> str:
    """A number to so many digits, never as a power of ten.

    >>> _digits(1380.4, 3), _digits(12.3, 1), _digits(9.7, 1), _digits(0.0523, 1)
    ('1,380', '12', '10', '0.05')
    """
    if value >= max(10, 10 ** (count - 1)):
        return f"{value:,.0f}"
    return np.format_float_positional(value, count, unique=False, fractional=False, trim="-")
