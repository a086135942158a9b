"""A compact network as files that other programs run: ONNX and torch.export, verified before they appear."""

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.files import read_json, whole_file
from lit_prune.preparation import Normalised, Preparation
from lit_prune.structure import load_compact, read_preparation
from lit_prune.structure.axes import EVEN

TOLERANCE = 1e-4
"""Largest difference allowed between a file's outputs and the network's, relative to the largest output."""

VERIFIED_BATCHES = (1, 4)
OUTSIDE, INSIDE = "outside", "inside"


class ExportError(RuntimeError):
    """A network that an exporter cannot write, or a written file that does not compute what the network computes."""


@dataclass(frozen=True)
class Format:
    """A file format: its file name, how it is written, how it is read back as a function of images."""

    file: str
    write: Callable[[nn.Module, Tensor, Path, int | None], None]
    load: Callable[[Path], Callable[[Tensor], Tensor]]


def export_compact(
    folder: str | Path,
    to: str | Path,
    formats: Sequence[str] = ("onnx", "torch_export"),
    opset: int | None = None,
    trust: Sequence[str] = (),
    normalisation: str = OUTSIDE,
) -> dict[str, dict[str, Any]]:
    """Writes the compact network of `folder` to files of other formats; see `export_module`.

    The ONNX file says in its metadata how images are prepared for it and what its classes are called (`preparation`,
    `classes`: JSON; `input_scale`: "normalised", or "0..1" with the normalisation inside).

    Args:
        folder: compact folder as `save_compact` writes it (`model.safetensors`, `structure.json`).
        to: folder of the new files.
        formats: names of `FORMATS`.
        opset: ONNX operator set; None takes the exporter's own.
        trust: import paths that the folder may name, see `load_compact`.
        normalisation: "outside", or "inside": the files take images on the scale 0..1 and normalise them.

    Raises:
        InputError: the folder is absent or damaged, or an argument is wrong.
        ExportError: a file could not be written, or differs from the network.
    """
    _check_formats(formats)
    network, shape, preparation = load_compact(folder, trust=trust), read_input_shape(folder), read_preparation(folder)
    if normalisation not in (OUTSIDE, INSIDE):
        raise InputError(f"normalisation={normalisation!r} is unknown; use {OUTSIDE} or {INSIDE}")
    if normalisation == INSIDE:
        if preparation is None:
            raise InputError(f"normalisation={INSIDE}: {folder} does not say with what; save it with preparation=")
        network = Normalised(network, preparation)
    report = export_module(network, shape, to, formats, opset)
    if "onnx" in report and preparation is not None:
        add_metadata(Path(report["onnx"]["file"]), preparation, normalisation)
    return report


def add_metadata(file: Path, preparation: Preparation, normalisation: str = OUTSIDE) -> None:
    """Writes into an ONNX file how images are prepared for it."""
    import onnx

    model = onnx.load(file)
    values = preparation.to_dict()
    said = {"classes": json.dumps(values.pop("classes")), "preparation": json.dumps(values)}
    said["input_scale"] = "0..1" if normalisation == INSIDE else "normalised"
    onnx.helper.set_model_props(model, said)
    with whole_file(file) as partial:
        partial.write_bytes(model.SerializeToString())


def export_module(
    model: nn.Module,
    input_shape: Sequence[int],
    to: str | Path,
    formats: Sequence[str] = ("onnx", "torch_export"),
    opset: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Writes `model` in every format, with a free batch size, each file verified before it appears.

    Each file is read back and run on random images, in batches of 1 and 4; where the largest difference from the
    network exceeds `TOLERANCE` times the largest output, the file is removed and an error raised.

    Args:
        model: maps images to one tensor; left as it is (a float32 copy on the CPU in eval mode is exported).
        input_shape: (C, H, W) of one image.
        to: folder of the files `model.onnx` and `model.pt2`.
        formats: names of `FORMATS`.
        opset: ONNX operator set; None takes the exporter's own.

    Returns:
        format -> `file` (path), `max_abs_difference` (in units of the outputs), `bytes`; for ONNX, where OpenVINO is
        installed, `openvino_max_abs_difference`: the same file read by OpenVINO in float32; and `uneven_convolutions`
        (see the function).

    Raises:
        InputError: an unknown format, an operator set the exporter does not write, or packages that are not installed.
        ExportError: a file could not be written, or differs from the network.
    """
    _check_formats(formats)
    network = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    images = [
        torch.randn(batch, *input_shape, generator=torch.Generator().manual_seed(batch))
        for batch in (2, *VERIFIED_BATCHES)
    ]
    report = {}
    for name in formats:
        path = Path(to) / FORMATS[name].file
        with whole_file(path) as partial:
            with _quiet():
                _attempt(name, "writing", FORMATS[name].write, network, images[0], partial, opset)
                run = _attempt(name, "reading back", FORMATS[name].load, partial)
            difference = _largest_difference(name, network, run, images[1:])
        report[name] = {"file": str(path), "max_abs_difference": difference, "bytes": path.stat().st_size}
        if name == "onnx":
            report[name]["uneven_convolutions"] = uneven_convolutions(network)
        if name == "onnx" and find_spec("openvino"):
            run = _attempt("onnx", "reading by OpenVINO", load_openvino, path)
            difference = _largest_difference("onnx, read by OpenVINO", network, run, images[1:])
            report[name]["openvino_max_abs_difference"] = difference
    return report


def uneven_convolutions(model: nn.Module) -> int:
    """How many convolutions have a width that is no multiple of `EVEN`, for which kernels may take longer.

    The images' own channels do not count.

    >>> uneven_convolutions(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 9, 3), nn.Conv2d(9, 16, 3)))
    2
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return sum(bool(c.out_channels % EVEN or (c.in_channels > 4 and c.in_channels % EVEN)) for c in convolutions)


def read_input_shape(folder: str | Path) -> tuple[int, int, int]:
    """Returns (C, H, W) of one image, from the compact folder's `structure.json`.

    Raises:
        InputError: the file is absent, is not JSON, or has no such shape.
    """
    file = Path(folder) / "structure.json"
    if not file.is_file():
        raise InputError(
            f"folder={str(folder)!r} has no structure.json; give a compact folder such as runs/NAME/compact"
        )
    try:
        shape = read_json(file)["input_shape"]
        channels, height, width = (int(size) for size in shape)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged ({error!r}): write the compact folder again") from error
    return channels, height, width


def _check_formats(formats: Sequence[str]) -> None:
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise InputError(f"formats={list(formats)}: choose from {', '.join(FORMATS)}")
    absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if "onnx" in formats and absent:
        raise InputError(f"formats={list(formats)}: {', '.join(absent)} missing; pip install 'lit-prune[export]'")


def _attempt(name: str, step: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except (InputError, OSError):  # the system refuses a file: it says why
        raise
    except Exception as error:  # the exporters and the runtime raise many families of their own
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        raise ExportError(f"format {name}: {step} failed for this network: {reason[0]}") from error


@torch.no_grad()
def _largest_difference(
    name: str, network: nn.Module, run: Callable[[Tensor], Tensor], batches: Sequence[Tensor]
) -> float:
    """Returns the largest difference over all batches, or raises where one exceeds the tolerance."""
    largest = 0.0
    for images in batches:
        written, expected = _attempt(name, f"a batch of {len(images)}", run, images), network(images)
        alike = written.shape == expected.shape
        difference = (written - expected).abs().max().item() if alike else float("inf")
        scale = expected.abs().max().item()
        if not difference <= TOLERANCE * scale:  # so that NaN fails too
            raise ExportError(
                f"format {name}: outputs differ by {difference:.3g} from the network's (largest output {scale:.3g}) "
                f"in a batch of {len(images)}; do not use the file"
            )
        largest = max(largest, difference)
    return largest


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporters' progress prints, warnings and log lines; exceptions still tell what went wrong."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _dynamic_batch() -> tuple[dict[int, torch.export.Dim]]:
    return ({0: torch.export.Dim("batch")},)


def _write_onnx(network: nn.Module, images: Tensor, path: Path, opset: int | None) -> None:
    import onnx

    torch.onnx.export(
        network,
        (images,),
        path,
        input_names=["images"],
        output_names=["logits"],
        opset_version=opset,
        dynamo=True,
        dynamic_shapes=_dynamic_batch(),
        external_data=False,
        verbose=False,
    )
    written = next(entry.version for entry in onnx.load(path).opset_import if entry.domain in ("", "ai.onnx"))
    if opset not in (None, written):  # the exporter only warns
        raise InputError(f"opset={opset}: the exporter could write this network in operator set {written} only")


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def load_openvino(path: Path, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """An ONNX file as a function of images, run by OpenVINO on the CPU in float32.

    Args:
        path: of the file.
        threads: None leaves what OpenVINO takes.
    """
    import openvino

    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    settings |= {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])


def _write_program(network: nn.Module, images: Tensor, path: Path, opset: int | None) -> None:
    program = torch.export.export(network, (images,), dynamic_shapes=_dynamic_batch())
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())


def _load_program(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


FORMATS = {
    "onnx": Format("model.onnx", _write_onnx, _load_onnx),
    "torch_export": Format("model.pt2", _write_program, _load_program),
}
"""Formats by name."""
