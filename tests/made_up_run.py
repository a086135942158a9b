"""A made-up run folder with plausible contents: 9 layers, 10 epochs, two structural stages, one interruption."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from torch.utils.tensorboard import SummaryWriter

from lit_prune.lab.analyze.propagation import METRICS as ROUTED
from lit_prune.lab.lesion.run import write_tables
from lit_prune.lab.reduce.tables import summarise
from lit_prune.lab.sweep.request import SweepRequest
from lit_prune.lab.sweep.run import derive_tables, write_derived
from lit_prune.train.axis_trace import dynamics_table

LAYER_COLUMNS = (
    "coupling", "rand_index", "null_95", "modularity_redundancy", "modularity_excess", "mean_hull_size",
    "singleton_ratio", "saturated_ratio", "triplet_ratio",
)  # fmt: skip

WIDTHS = {
    "conv1": 16, "layer1.0.conv1": 16, "layer1.0.conv2": 16, "layer2.0.conv1": 32, "layer2.0.conv2": 32,
    "layer2.1.conv1": 32, "layer2.1.conv2": 32, "layer3.0.conv1": 64, "layer3.0.conv2": 64,
}  # fmt: skip
GONE = ("layer2.1.conv1", "layer2.1.conv2")
CUT = {"layer1.0.conv1": 11, "layer2.0.conv2": 17, "layer3.0.conv1": 22}
EPOCHS, STEPS, STAGE_EPOCHS = 10, 40, (4, 7)


def scalar_at(epoch: int) -> dict[str, float]:
    """Loss and accuracy after `epoch` epochs, with a dent at each stage."""
    dent = sum(0.5 * np.exp(-(epoch - stage)) for stage in STAGE_EPOCHS if epoch > stage)
    loss = 2.2 * np.exp(-0.35 * epoch) + 0.25 + 0.4 * dent
    return {
        "train/loss": loss,
        "val/loss": loss + 0.12 + 0.01 * epoch,
        "train/accuracy": 1 - 0.38 * loss,
        "val/accuracy": 0.96 - 0.38 * loss,
    }


def write_events(folder: Path, first: int, last: int, shift: float = 0.0) -> None:
    """Logs the epochs first..last-1 as Lightning does: at the epoch's last step, beside the running epoch."""
    with SummaryWriter(str(folder)) as writer:
        for epoch in range(first, last):
            step = (epoch + 1) * STEPS - 1
            for tag, value in scalar_at(epoch + 1).items():
                writer.add_scalar(tag, value + shift, step, walltime=1e9 + 1000 * step + (0 if shift else 1))
            writer.add_scalar("epoch", epoch, step)


def channel_table(epoch: int) -> pd.DataFrame:
    """Channels of every layer still there after `epoch` epochs; one dead channel."""
    random, tables = np.random.default_rng(3), []
    widths = dict(WIDTHS)
    if epoch > STAGE_EPOCHS[0]:
        widths = {layer: width for layer, width in widths.items() if layer not in GONE}
    if epoch > STAGE_EPOCHS[1]:
        widths |= CUT
    for layer, width in widths.items():
        depth, grown = list(widths).index(layer), 0.15 + 0.85 * (1 - np.exp(-0.4 * epoch))
        talent, noise = random.normal(size=WIDTHS[layer])[:width], random.normal(size=WIDTHS[layer])[:width]
        capture = np.exp(0.5 * noise + 0.3 * grown * talent) * (0.4 + 0.3 * grown)
        task = 0.02 * (1 + depth) * grown * np.exp(0.6 * talent + (0.3 * depth - 0.6) * grown * noise)
        overlap = 0.1 * np.exp(0.6 * random.normal(size=WIDTHS[layer]))[:width] * (1 + grown)
        table = pd.DataFrame({"input_capture": capture, "peer_overlap": overlap, "task_information": task})
        tables.append(table.assign(layer=layer, depth=depth, channel=np.arange(width), epoch=epoch))
    table = pd.concat(tables, ignore_index=True)
    table.loc[2, ["input_capture", "peer_overlap", "task_information"]] = np.nan
    return table


def stage_records() -> list[dict]:
    """One stage that drops a block, one that removes inner channels."""
    blocks = {layer: {"before": width, "after": 0 if layer in GONE else width} for layer, width in WIDTHS.items()}
    left = {layer: width for layer, width in WIDTHS.items() if layer not in GONE}
    channels = {layer: {"before": width, "after": CUT.get(layer, width)} for layer, width in left.items()}
    information = {"layer1.0": 0.31, "layer2.0": 0.42, "layer2.1": 0.28}
    scores = {name: {"removed": [0.01, 0.02, 0.1], "kept": [0.1, 0.3, 0.9]} for name in CUT}
    first = {
        "stage": 0, "name": "blocks", "kind": "blocks", "epoch": 4, "widths": blocks,
        "plan": {"drop_blocks": ["layer2.1"], "keep_channels": {}, "sizes": {}, "notes": {"information": information}},
        "macs": {"dense": 12_400_000, "before": 12_400_000, "after": 9_800_000},
        "params": {"dense": 97_000, "before": 97_000, "after": 78_400},
        "accuracy": {"dense": 0.842, "dense_recalibrated": 0.843, "before": 0.842, "after_surgery": 0.588,
                     "after_recalibration": 0.741, "after_repair": 0.836},
    }  # fmt: skip
    second = {
        "stage": 1, "name": "channels", "kind": "channels", "epoch": 7, "widths": channels,
        "plan": {"drop_blocks": [], "keep_channels": {name: list(range(n)) for name, n in CUT.items()},
                 "sizes": {name: WIDTHS[name] for name in CUT}, "notes": {"scores": scores}},
        "macs": {"dense": 12_400_000, "before": 9_800_000, "after": 5_100_000},
        "params": {"dense": 97_000, "before": 78_400, "after": 41_200},
        "accuracy": {"dense": 0.842, "dense_recalibrated": 0.843, "before": 0.851, "after_surgery": 0.462,
                     "after_recalibration": 0.79, "after_repair": 0.8475},
    }  # fmt: skip
    seconds = {"plan": 0.8, "surgery": 0.31, "recalibration": 2.4, "repair": 61.5}
    protocol = {"score": "composite_ix", "allocation": "global"}
    return [stage | {"seconds": seconds, "protocol": protocol} for stage in (first, second)]


def result_record() -> dict:
    """Content of compact/report.json."""
    keys = ("accuracy", "macs", "params", "latency_ms", "throughput", "bytes")
    dense, blocks, channels, compact = (
        dict(zip(keys, row, strict=True))
        for row in (
            (0.8512, 12_400_000, 97_000, 3.42, 2210.5, 398_212),
            (0.836, 9_800_000, 78_400, 2.71, 2760.0, 322_000),
            (0.8475, 5_100_000, 41_200, 2.55, 4015.0, 171_000),
            (0.8475, 5_100_000, 41_200, 2.55, 4015.0, 171_000),
        )
    )
    stages = [{"name": "blocks"} | blocks, {"name": "channels"} | channels]
    return {"dense": dense, "compact": compact, "stages": stages}


def write_analysis(folder: Path) -> None:
    """What `analyze` and the tracing callbacks write: tables of the last epoch's channels, cosines, dynamics."""
    random, channels = np.random.default_rng(5), channel_table(EPOCHS).drop(columns="epoch")
    channels["weight_norm"] = random.random(len(channels))
    channels["target_redundancy"] = channels["task_information"].clip(upper=0.2)
    channels["target_excess"] = 0.1 * random.random(len(channels))
    channels["dead"] = channels["input_capture"].isna()
    channels["local_group"] = random.integers(0, 3, len(channels))
    channels.to_parquet(folder / "channels.parquet")
    layers = channels[["layer", "depth"]].drop_duplicates(ignore_index=True)
    for column in LAYER_COLUMNS:
        layers[column] = 0.5 * random.random(len(layers))
    layers.assign(null_mean=0.0).to_parquet(folder / "layers.parquet")
    (folder / "analysis").mkdir()
    names = list(layers["layer"])
    pairs = [(i, j, abs(np.sin(1 + i * j))) for i in range(11) for j in range(11)]
    graphs = pd.DataFrame(pairs, columns=["channel", "peer", "redundancy"])
    graphs.assign(layer="layer1.0.conv1").to_parquet(folder / "analysis" / "graphs.table.parquet")
    flows = [(a, b, s, d) for a, b in zip(names, names[1:], strict=False) for s in ROUTED for d in ROUTED]
    flows = pd.DataFrame(flows, columns=["source", "destination", "source_metric", "destination_metric"])
    flows["rank_correlation"] = 0.2 * random.normal(size=len(flows))
    flows.to_parquet(folder / "analysis" / "propagation.table.parquet")
    trace = pd.concat([channel_table(epoch) for epoch in range(EPOCHS + 1)], ignore_index=True)
    dynamics = dynamics_table(trace)
    dynamics.to_parquet(folder / "trace" / "dynamics.parquet")
    cosines = dynamics[["epoch", "layer", "depth"]].copy()
    for name in ("capture_task", "update_capture", "update_task", "capture_correlation", "update_correlation"):
        cosines[name] = 0.1 * random.normal(size=len(cosines))
    cosines.to_parquet(folder / "trace" / "gradients.parquet")


def write_lesions(folder: Path) -> None:
    """What `lesion` writes: damage that grows with depth, recovery that follows the peers."""
    random = np.random.default_rng(6)
    lesions = pd.read_parquet(folder / "channels.parquet")
    lesions["third"] = np.array(["shallow", "mid", "deep"])[3 * lesions["depth"] // (1 + lesions["depth"].max())]
    lesions["peer_r2"], lesions["hull_size"] = random.random(len(lesions)), random.integers(1, 11, len(lesions))
    lesions["compact_support"] = lesions["peer_r2"] / lesions["hull_size"]
    lesions["damage"] = np.exp(random.normal(-5, 2, len(lesions))) - 1e-3
    lesions["damage_error"] = 2e-3
    lesions["recovery"] = lesions["peer_r2"] + 0.4 * random.normal(size=len(lesions))
    lesions.to_parquet(folder / "lesions.parquet")
    write_tables(folder / "lesions", lesions, seed=0)


def write_sensitivity(folder: Path) -> None:
    """What `sensitivity` writes: every layer at two widths."""
    rows = [
        {"group": name, "layer": name, "depth": depth, "keep": keep, "loss": depth * (1 - keep), "loss_refit": 0.0}
        for depth, name in enumerate(WIDTHS)
        for keep in (0.5, 0.25)
    ]
    pd.DataFrame(rows).to_parquet(folder / "sensitivity.parquet")


def write_curve(folder: Path) -> None:
    """What `curve` writes: two budgets, three times of repair."""
    rows = [
        {"keep": keep, "repair": repair, "seconds": 60 + repair, "macs_ratio": keep - 0.01, "dense": 0.9}
        | {"figure": 0.9 - 0.2 * (1 - keep) + 0.0003 * repair}
        for keep in (0.7, 0.5)
        for repair in (0.0, 30.0, 120.0)
    ]
    pd.DataFrame(rows).to_parquet(folder / "curve.parquet")


def write_reduction(folder: Path) -> None:
    """What `reduce` writes: two methods at three widths, agreement that falls with the width."""
    cells = {}
    for seed in range(2):
        for width in (48, 32, 16):
            for place, method in enumerate(("cmr_logit", "variance")):
                iia = width / 64 - 0.02 * place + 0.01 * seed
                certificate = {"bound": iia**4, "empirical": iia**2, "distortion": 1.0}
                cells[f"{seed}{width}{place}"] = {
                    **{"seed": seed, "method": method, "width": width, "calibration_size": 100, "accuracy": 0.9},
                    **{"iia": iia, "kl": 1 - iia, "certificate": certificate},
                    "seconds": {"score": 0.1, "compile": 0.01, "verify": 0.02},
                }
    stress = [{"score": s, "low": 0.1, "high": 10.0, "jaccard": j} for s in ("cmr_logit", "random") for j in (1, 0.4)]
    request = {"layer": "fc1", "units": 64, "request": {}, "keys": list(cells), "stress": stress}
    request |= summarise(list(cells.values()), ["cmr_logit", "variance"])
    (folder / "reduction.json").write_text(json.dumps({"results": cells, "requests": [request]}))


def write_sweep(folder: Path) -> None:
    """What `sweep` writes: four scores and two mixed weights, two seeds, curves that fall with what is removed."""
    methods = {"magnitude": 0.7, "composite_ix": 0.8, "composite_pid": 0.6, "chip": 0.5}
    methods |= {"magnitude_plus_ix(0.5)": 0.75, "magnitude_plus_ix(1)": 0.72}
    axes = {"composite_ix": "local", "composite_pid": "target"}
    settings = [(rule, method) for rule in ("global", "uniform") for method in methods]
    base = {"checkpoint": "a", "removal": "physical", "recovery": "sgd", "batches": 50, "error": None}
    base |= {"accuracy_dense": 0.9, "test_images": 500, "unit_kind": "draw", "backbone": "resnet8"}
    rows = [
        base
        | {"allocation": rule, "method": method, "axis": axes.get(method, "baseline"), "seed": seed, "unit": str(seed)}
        | {"sparsity": share, "macs_removed": share, "accuracy_before": 0.9 - methods[method] * share}
        | {"accuracy_after": 0.9 - 0.3 * share / methods[method] + 0.01 * seed}
        for rule, method in settings
        for seed in range(2)
        for share in (0.1, 0.5, 0.9)
    ]
    cells = pd.DataFrame(rows)
    cells.to_parquet(folder / "sweep.parquet")
    (folder / "sweep").mkdir()
    request = SweepRequest(methods=list(methods)[:4], sparsities=[0.1, 0.5, 0.9])
    write_derived(folder / "sweep", derive_tables(cells, request)[0])


def make_run(folder: Path) -> Path:
    """Writes the whole run below `folder`; epochs 5 and 6 were logged, lost in an interruption, and run again."""
    for name in ("trace", "compact"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text("seed_everything: 1\nmodel:\n  backbone: resnet8\n")
    run = {"seed": 1, "versions": {"torch": "2.9"}, "data": {"name": "digits"}, "calibration_indices": list(range(512))}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "stages.jsonl").write_text("".join(json.dumps(stage) + "\n" for stage in stage_records()))
    (folder / "compact" / "report.json").write_text(json.dumps(result_record()))
    for epoch in range(EPOCHS + 1):
        channel_table(epoch).to_parquet(folder / "trace" / f"epoch={epoch:03d}.parquet")
    write_analysis(folder)
    write_lesions(folder)
    write_sensitivity(folder)
    write_curve(folder)
    write_reduction(folder)
    write_sweep(folder)
    write_events(folder / "tensorboard" / "version_0", 0, 7, shift=0.001)
    write_events(folder / "tensorboard" / "version_1", 5, EPOCHS)
    return folder


@pytest.fixture(scope="session")
def made_up() -> ModuleType:
    """This module: the values that the made-up run is written from."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run folder; tests leave its inputs as they are."""
    return make_run(tmp_path_factory.mktemp("runs") / "full")
