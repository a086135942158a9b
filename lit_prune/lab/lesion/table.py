"""The verb `lesion`: single-channel lesions and peer replacements, layer by layer, and what they say."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from lit_prune.errors import InputError
from lit_prune.files import write_parquet
from lit_prune.lab.ledger import Ledger, signature
from lit_prune.lab.lesion.lesions import MEASURED, LayerLesions, lesion_layer
from lit_prune.lab.lesion.request import LesionRequest
from lit_prune.lab.lesion.statistics import lesion_tables
from lit_prune.measurement.channel_table import channel_table, collect_sums
from lit_prune.measurement.layers import CHANNEL_LAYERS, Batches, removing, select_layers
from lit_prune.progress import Watch, unwatched
from lit_prune.running import undisturbed
from lit_prune.structure.networks import fingerprint
from lit_prune.task import Unlabelled, peek
from lit_prune.train.evaluation import Evaluation, evaluate

Frames = dict[str, pd.DataFrame]
THIRDS = ("shallow", "mid", "deep")
SETTINGS = ("channels", "limit", "images", "peers", "ridge", "target", "seed", "protocol")
KEY_COLUMNS = ["layer", "depth", "third", "channel"]


@dataclass(frozen=True)
class ImagePair:
    """Images of the two sides: `calibration` for metrics and fits, `evaluation` for losses; read more than once."""

    calibration: Batches
    evaluation: Batches


def lesion(
    model: nn.Module,
    images: ImagePair,
    request: LesionRequest = LesionRequest(),  # noqa: B008  (frozen)
    *,
    run_dir: str | Path | None = None,
    record: dict[str, Any] | None = None,
    watch: Watch = unwatched,
) -> tuple[pd.DataFrame, Evaluation]:
    """Lesions of the channels asked for, and the unharmed network's accuracy and loss on the same images.

    With a run folder each layer is written as soon as it is done, to `lesions/parts/`, and one that is there already
    for the same network, images and settings is not computed again; at the end `lesions.parquet` holds the table.

    Args:
        model: a classifier; left as found.
        images: calibration and evaluation batches.
        request: layers, channels and settings.
        run_dir: where to write; None writes nothing.
        record: plain values that say which data and which network these are.
        watch: wraps what takes long, given a description, for a progress bar.

    Returns:
        one row a lesioned channel: layer, depth (index in forward order among all Conv2d and Linear layers), third
        (of the depth), channel, and the columns of `lesion_layer`.

    Raises:
        InputError: no such layer, too few calibration images, and what `measure` raises.
    """
    places = choose_layers(model, images.calibration, request)
    kept = Ledger(None if run_dir is None else Path(run_dir) / "lesions" / "parts")
    settings = asdict(request)
    signed = signature(fingerprint(model, record or {}), {name: settings[name] for name in SETTINGS}, MEASURED)
    missing = [layer for layer in places.index if kept.table(layer, signed) is None]
    whole = evaluate(model, watch(images.evaluation, "whole network"))
    if missing:
        batches = watch(images.calibration, "calibration")
        sums = collect_sums(model, batches, request.target, missing, request.protocol)
        metrics = channel_table(model, sums, request.protocol)
        for layer in watch(missing, "layers"):
            rows = metrics[metrics["layer"] == layer].reset_index(drop=True)
            part = LayerLesions(model, rows, sums.layers[layer].to("cpu"), images.evaluation)
            found = lesion_layer(part, request, watch)
            found = found.drop(columns="depth")  # it counts measured layers, which differ by call
            kept.keep_table(layer, signed, found)
    parts = [kept.table(layer, signed).assign(**places.loc[layer]) for layer in places.index]
    table = pd.concat(parts, ignore_index=True)
    table = table[[*KEY_COLUMNS, *(column for column in table if column not in KEY_COLUMNS)]]
    if run_dir is not None:
        write_parquet(Path(run_dir) / "lesions.parquet", table)
    return table, whole


def choose_layers(model: nn.Module, batches: Batches, request: LesionRequest) -> pd.DataFrame:
    """Layers to lesion in forward order, with their `depth` and `third`, indexed by name.

    Without `request.layers`: `per_third` convolutions of each third of the depth, evenly spaced (linear layers but the
    last where a network has no convolution).
    """
    order = forward_order(model, batches)
    depths = pd.Series(range(len(order)), index=order)
    thirds = pd.Series([THIRDS[3 * place // len(order)] for place in range(len(order))], index=order)
    table = pd.DataFrame({"depth": depths, "third": thirds})
    if request.layers is not None:
        return table[table.index.isin(select_layers(model, request.layers))]
    candidates = [name for name in order if isinstance(model.get_submodule(name), nn.Conv2d)] or order[:-1]
    count = min(3 * request.per_third, len(candidates))
    if not count:
        raise InputError("layers: the network has none but its head; name it with layers=")
    return table.loc[[candidates[(2 * place + 1) * len(candidates) // (2 * count)] for place in range(count)]]


def forward_order(model: nn.Module, batches: Batches) -> list[str]:
    """Names of the Conv2d and Linear layers that run, in the order in which they first do."""
    order: dict[str, None] = {}

    def note(name: str):
        return lambda *_: order.setdefault(name)

    layers = {name: module for name, module in model.named_modules() if isinstance(module, CHANNEL_LAYERS)}
    reader = Unlabelled()
    image = reader.to(reader.take(peek(batches)[0], 1), model)
    hooks = [module.register_forward_hook(note(name)) for name, module in layers.items()]
    with undisturbed(model), removing(hooks):
        reader.run(model, image)
    return list(order)


def write_tables(folder: Path, lesions: pd.DataFrame, seed: int) -> Frames:
    """Writes the tables of `lesion_tables` to `folder` and returns them."""
    tables = lesion_tables(lesions, seed)
    for name, table in tables.items():
        write_parquet(folder / f"{name}.parquet", table)
    return tables
