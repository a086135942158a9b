"""INT8 for ONNX Runtime: an exported network quantised on calibration images, accuracy and time beside the float."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lit_prune.errors import InputError
from lit_prune.files import whole_file, write_json
from lit_prune.image_files import list_images
from lit_prune.task.classification import Classification
from lit_prune.timing import Timing, time_runs

if TYPE_CHECKING:
    from lit_prune.data import ImageData

Labelled = tuple[Tensor, Tensor | None]
FILE, REPORT = "model.int8.onnx", "int8.json"
CALIBRATION, EVALUATION = 256, 2000  # images


def quantise_onnx(
    file: str | Path, calibration: Iterable[Tensor], evaluation: Iterable[Labelled] = ()
) -> dict[str, Any]:
    """Writes `model.int8.onnx` beside an ONNX file: weights and activations in 8 bits, ranges from calibration images.

    Static quantisation of ONNX Runtime, weights by output channel, ranges by minimum and maximum. `int8.json` has the
    figures that are returned.

    Args:
        file: exported by `export_compact`, with its normalisation outside or inside.
        calibration: batches of what the file reads, float32 [B, C, H, W].
        evaluation: batches (images, labels), or (images, None) where there are no labels.

    Returns:
        `file`, `calibration_images`, `images` (evaluated), `agreement` (share of images of the same class as in
        float), and for `float` and `int8`: `accuracy` (None without labels), `latency_ms` of one image (`Timing`),
        `bytes`.

    Raises:
        InputError: no calibration images, or onnxruntime is not installed.
    """
    if find_spec("onnxruntime") is None:
        raise InputError("int8: onnxruntime is missing; pip install 'lit-prune[export]'")
    file = Path(file)
    images = _first(calibration, CALIBRATION)
    if not images:
        raise InputError("int8: there are no calibration images; give some")
    target = file.with_name(FILE)
    with whole_file(target) as partial:
        _quantise(file, partial, images)
    report = {"file": str(target), "calibration_images": len(images)} | compare([file, target], images[0], evaluation)
    write_json(file.with_name(REPORT), report)
    return report


def _first(batches: Iterable[Tensor], limit: int) -> list[np.ndarray]:
    """The first images of batches, each [1, C, H, W]."""
    found: list[np.ndarray] = []
    for images in batches:
        found += [image[None].numpy() for image in images[: limit - len(found)].float().cpu()]
        if len(found) >= limit:
            break
    return found


def _quantise(file: Path, to: Path, images: Sequence[np.ndarray]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        """Gives the images one by one."""

        def __init__(self) -> None:
            self.left: Iterator[np.ndarray] = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {"images": image}

    prepared = to.with_name(f"{to.name}.prepared")
    try:
        quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
        quantize_static(str(prepared), str(to), Reader(), quant_format=QuantFormat.QDQ, **kinds)
    finally:
        prepared.unlink(missing_ok=True)


def compare(files: Sequence[Path], image: np.ndarray, evaluation: Iterable[Labelled]) -> dict[str, Any]:
    """Figures of a float and an int8 file, side by side; see `quantise_onnx`."""
    import onnxruntime

    sessions = [onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]) for file in files]
    task, count, agreed = Classification(), 0, 0.0
    sums = [torch.zeros(2, dtype=torch.float64) for _ in sessions]
    for batch in evaluation:
        images = task.inputs(batch).args[0].float().cpu().numpy()
        outputs = [torch.from_numpy(session.run(None, {"images": images})[0]) for session in sessions]
        count, agreed = count + task.size(batch), agreed + float(task.agreement(*outputs).sum())
        if task.target(batch) is not None:
            sums = [known + task.metric(output, batch) for known, output in zip(sums, outputs, strict=True)]
    timings = time_runs([partial(session.run, None, {"images": image}) for session in sessions])
    figures = {
        name: {
            "accuracy": task.figure(known) if known[-1] else None,
            "latency_ms": asdict(timing),
            "bytes": file.stat().st_size,
        }
        for name, file, known, timing in zip(("float", "int8"), files, sums, timings, strict=True)
    }
    return {"images": count, "agreement": agreed / count if count else None, **figures}


def batches_of(data: "ImageData") -> tuple[Iterator[Tensor], list[Labelled]]:
    """Calibration images of a DataModule, and its test images with labels, at most 2,000, class-balanced."""
    data.prepare_data()
    data.setup()
    task = Classification()
    calibration = (task.inputs(batch).args[0] for batch in data.calibration_dataloader())
    return calibration, list(data.subset_dataloader("test", EVALUATION))


def batches_of_folder(folder: Path, preparation: Any) -> tuple[Iterator[Tensor], list[Labelled]]:
    """Images of a folder, prepared: every second one to calibrate on, the others, without labels, to compare on.

    Raises:
        InputError: there are fewer than two images in it.
    """
    from lit_prune.predict import read_prepared

    files = list_images(folder)[: 2 * CALIBRATION]
    if len(files) < 2:
        raise InputError(f"calibration: {folder} holds {len(files)} images; give a folder of what it will see")
    images = [read_prepared(file, preparation)[None] for file in files]
    return iter(images[::2]), [(batch, None) for batch in torch.cat(images[1::2]).split(64)]


def describe(report: dict[str, Any]) -> str:
    """The figures in a sentence for the terminal."""
    parts = [f"int8: {report['file']}"]
    for name in ("float", "int8"):
        figures, timing = report[name], Timing(**report[name]["latency_ms"])
        accuracy = "" if figures["accuracy"] is None else f"accuracy {figures['accuracy']:.2%}, "
        parts.append(f"{name} {accuracy}{timing}, {figures['bytes'] / 1e6:.2f} MB")
    if report["agreement"] is not None:
        parts.append(f"the same class on {report['agreement']:.2%} of {report['images']:,} images")
    return "; ".join(parts)
