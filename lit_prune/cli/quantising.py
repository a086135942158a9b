"""`export --int8`: which images the ranges come from."""

from pathlib import Path
from typing import Any

from torch import Tensor

from lit_prune import data
from lit_prune.cli.yaml_text import read_yaml
from lit_prune.errors import InputError
from lit_prune.export import INSIDE
from lit_prune.preparation import Preparation
from lit_prune.quantise import batches_of, batches_of_folder, describe, quantise_onnx
from lit_prune.structure import read_preparation
from lit_prune.task.classification import Classification


def quantise(run_dir: Path, compact: Path, file: Path, normalisation: str, folder: str | None) -> str:
    """Quantises an exported file; what came of it, in a sentence.

    Args:
        run_dir: the run folder, whose configuration names its data.
        compact: its compact folder.
        file: the ONNX file.
        normalisation: of the file.
        folder: of images; None takes the run's own data.

    Raises:
        InputError: the file was not exported, or it cannot be told which images to take.
    """
    if not file.is_file():
        raise InputError("int8: it is made from the ONNX file; leave onnx among --formats")
    preparation = read_preparation(compact)
    if folder is not None:
        if preparation is None:
            raise InputError(f"calibration: {compact} does not say how images are prepared; save it with preparation=")
        images, evaluation = batches_of_folder(Path(folder), preparation)
    else:
        images, evaluation = batches_of(own_data(run_dir))
    if normalisation == INSIDE and preparation is not None:
        images = (_raw(batch, preparation) for batch in images)
        task = Classification()
        evaluation = [(_raw(task.inputs(batch).args[0], preparation), task.target(batch)) for batch in evaluation]
    return describe(quantise_onnx(file, images, evaluation))


def _raw(images: Tensor, preparation: Preparation) -> Tensor:
    """Images on the scale 0..1 again."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (preparation.mean, preparation.std))
    return images * std + mean


def own_data(run_dir: Path) -> data.ImageData:
    """The data of a run, from its configuration; only this package's data sets are built.

    Raises:
        InputError: the run folder names none of them.
    """
    file = run_dir / "config.yaml"
    said: Any = (read_yaml(file) or {}).get("data") if file.is_file() else None
    path = said.get("class_path") if isinstance(said, dict) else None
    kind = getattr(data, str(path).removeprefix("lit_prune.data."), None)
    if not (isinstance(path, str) and path.startswith("lit_prune.data.") and isinstance(kind, type)):
        raise InputError("int8: the run folder names no data set of lit_prune; give --calibration FOLDER of images")
    return kind(**said.get("init_args") or {})
