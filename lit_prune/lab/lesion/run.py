"""The verb `lesion`: single-channel lesions and peer replacements, layer by layer, what they say, the run folder."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
from rich.console import Console
from torch import Tensor, nn

from lit_prune.data import ImageData
from lit_prune.errors import InputError
from lit_prune.files import read_parquet, write_parquet
from lit_prune.lab.analyze.evidence import cut_batches
from lit_prune.lab.ledger import Ledger, signature
from lit_prune.lab.lesion.lesions import MEASURED, LayerLesions, lesion_layer
from lit_prune.lab.lesion.report_tables import damage_table, matched_table, replacement_table
from lit_prune.lab.lesion.request import LesionRequest
from lit_prune.lab.lesion.statistics import lesion_tables
from lit_prune.measurement.channel_table import channel_table, collect_sums
from lit_prune.measurement.layers import CHANNEL_LAYERS, Batches, removing, select_layers
from lit_prune.progress import Watch, progress_bars, terminal, unwatched
from lit_prune.report.tables import terminal_table
from lit_prune.running import undisturbed
from lit_prune.structure.networks import find_network, fingerprint
from lit_prune.task import Classification, Unlabelled, peek
from lit_prune.train.classifier import LitClassifier
from lit_prune.train.evaluation import Evaluation, evaluate
from lit_prune.train.run_record import add_record, subject

Frames = dict[str, pd.DataFrame]
THIRDS = ("shallow", "mid", "deep")
SETTINGS = ("channels", "limit", "images", "peers", "ridge", "target", "seed", "protocol")
KEY_COLUMNS = ["layer", "depth", "third", "channel"]
SPLIT = "val"


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


def lesion_run(
    trainer: pl.Trainer,
    model: LitClassifier,
    datamodule: ImageData,
    request: LesionRequest = LesionRequest(),  # noqa: B008  (frozen)
    compare: list[str] | None = None,
    ckpt_path: str | None = None,
) -> None:
    """Sets single channels to zero, or to what their peers say of them, and measures the rise of the loss.

    Nothing is trained. Writes `lesions.parquet`, `lesions/` (what the lesions say of peers, scores and the axes)
    and the key `lesion` of `run.json` in the run folder. A layer is written when it is done, and one that is there
    already for the same network, images and settings is not computed again. One process, on the first device.

    Args:
        trainer: says where, and on which device.
        model: the network; its weights come from `ckpt_path`, else from `--model.weights` or `--model.pretrained`,
            else from `checkpoints/last.ckpt` of the run folder.
        datamodule: the images it was trained on: metrics and the peers' fit use the calibration images, losses the
            validation split (the test split where there is none).
        request: layers, channels and settings.
        compare: run folders with lesions; the tables of these and this run together go to `lesions/pooled/`.
        ckpt_path: checkpoint of a `fit`, pruned or not.
    """
    run_dir, console = Path(trainer.default_root_dir), terminal()
    others = [read_lesions(folder) for folder in compare or ()]
    network = find_network(model, run_dir, ckpt_path, "lesion")
    datamodule.prepare_data()
    datamodule.setup()
    record = subject(network, datamodule, request.limit)
    network.to(trainer.strategy.root_device)
    calibration = FirstImages(datamodule.calibration_dataloader(), request.limit)
    images = ImagePair(calibration, datamodule.subset_dataloader(SPLIT, request.images))
    with progress_bars() as watch:
        table, whole = lesion(network, images, request, run_dir=run_dir, record=record, watch=watch)
    tables = write_tables(run_dir / "lesions", table, request.seed)
    unharmed = {"split": SPLIT, "images": whole.images, "loss": whole.loss, "accuracy": whole.figure}
    add_record(run_dir, "lesion", {**record, "request": asdict(request), **unharmed})
    for line in clipped_lines(table, request):
        console.print(line)
    show(console, tables, f"{len(table)} channels of {table['layer'].nunique()} layers, {whole.images} images")
    if others:
        pooled = pd.concat([name_cells(table, run_dir), *others], ignore_index=True)
        tables = write_tables(run_dir / "lesions" / "pooled", pooled, request.seed)
        show(console, tables, f"{len(pooled)} channels of {1 + len(others)} runs")
    console.print(f"tables: {run_dir}/lesions.parquet, lesions/")


@dataclass(frozen=True)
class FirstImages:
    """The first `limit` images of batches that can be read again; None takes all."""

    batches: Batches
    limit: int | None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches."""
        return cut_batches(self.batches, Classification(), self.limit)


def read_lesions(folder: str | Path) -> pd.DataFrame:
    """Lesions of another run, its cells named after the run.

    Raises:
        InputError: the run has none, or none with the standard error of the damage.
    """
    file = Path(folder) / "lesions.parquet"
    table = read_parquet(file) if file.is_file() else pd.DataFrame()
    if "damage_error" not in table:
        raise InputError(f"compare: {folder} has no lesions.parquet with damage_error; lesion that run first")
    return name_cells(table, folder)


def name_cells(table: pd.DataFrame, folder: str | Path) -> pd.DataFrame:
    """The table with layers named `run/layer`, so that layers of several networks stay apart."""
    return table.assign(layer=[f"{Path(folder)}/{layer}" for layer in table["layer"]])


def clipped_lines(table: pd.DataFrame, request: LesionRequest) -> list[str]:
    """What to say of layers with fewer live channels than asked for."""
    counts = table.groupby("layer", sort=False).size()
    short = counts[counts < (request.channels or 0)]
    if not len(short):
        return []
    named = ", ".join(f"{layer} {count}" for layer, count in short.head(6).items())
    more = f", and {len(short) - 6} more" if len(short) > 6 else ""
    return [f"channels: fewer than {request.channels} live ones, all taken: {named}{more}"]


def show(console: Console, tables: Frames, title: str) -> None:
    """Prints the tables that say most."""
    console.print(terminal_table(replacement_table(tables["thresholds"], title), "Peer replacement"))
    console.print(terminal_table(matched_table(tables["matched_task"], title), "Recovery at matched I_T"))
    console.print(terminal_table(damage_table(tables["ranking"], title), "Agreement of scores with low damage"))
