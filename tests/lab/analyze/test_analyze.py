"""The verb `analyze`: what it writes, what it does not do twice, and the command line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lit_prune.cli.main import main
from lit_prune.cli.prune_cli import build_cli
from lit_prune.errors import InputError
from lit_prune.lab.analyze.analysis import analyze
from lit_prune.lab.analyze.extras import EXTRAS, extra_names
from lit_prune.lab.analyze.request import AnalyzeRequest
from lit_prune.measurement.channel_table import measure

TINY = str(Path(__file__).resolve().parents[2] / "tiny_run.yaml")
EVERYTHING = tuple(extra for extra in extra_names() if extra != "damage")


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(30, 3, 8, 8, generator=generator), torch.arange(30) % 4) for _ in range(2)]


def test_every_extra_survives_a_layer_with_one_channel_and_says_nan_there(tiny_net, batches):
    narrow = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.BatchNorm2d(1), torch.nn.Conv2d(1, 3, 1), tiny_net)
    tables = analyze(narrow.eval(), batches, AnalyzeRequest(extras=EVERYTHING, sizes=(20,)))
    row = tables["layers"].iloc[0]
    assert row["channels"] == 1 and not row["dead"]
    undefined = ["coupling", "rand_index", "modularity_redundancy", "modularity_excess", "triplet_ratio", "broja_gap"]
    assert row[undefined].isna().all()
    assert tables["layers"].iloc[2:][["coupling", "broja_gap"]].notna().all(axis=None)


class CountingNet(torch.nn.Module):
    """Counts the images that go through a network."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net, self.seen = net, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return self.net(images)


def test_every_extra_adds_its_columns_or_its_table_and_the_model_stays_as_found(tiny_net, batches, tmp_path):
    before = {name: value.clone() for name, value in tiny_net.state_dict().items()}
    tables = analyze(tiny_net, batches, AnalyzeRequest(extras=EVERYTHING, sizes=(20,)), run_dir=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in tiny_net.state_dict().items())
    assert not any(module._forward_hooks for module in tiny_net.modules())
    channels, layers = tables["channels"], tables["layers"]
    pd.testing.assert_frame_equal(channels[measure(tiny_net, batches).columns], measure(tiny_net, batches))
    for column in ("local_group", "redundancy_community", "hull_size", "folded_norm", "task_information_ksg"):
        assert channels[column].notna().any(), column
    shared, unique = channels["broja_shared"], channels["broja_unique"]
    np.testing.assert_allclose(channels["broja_irrecoverable_loss"], unique / (shared + unique), atol=1e-6)
    for column in ("collapse", "rand_index", "modularity_excess", "triplet_ratio", "norm_capture", "ksg_task"):
        assert layers[column].notna().any(), column
    for name in ("channels", "layers"):
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / f"{name}.parquet"), tables[name])
    controls = {name for name, part in EXTRAS.items() if "table" in part.outputs} - {"damage"}
    assert controls <= set(tables)
    record = json.loads((tmp_path / "run.json").read_text())["analyze"]
    assert record["request"]["protocol"]["hook_point"] == "pre_bn" and set(record["extras"]) == set(EVERYTHING)


def test_everyday_extras_take_one_pass_over_the_images(tiny_net, batches):
    net = CountingNet(tiny_net)
    analyze(net, batches, AnalyzeRequest(extras=("groupings", "graphs", "hulls", "triplets", "boundary", "partners")))
    assert net.seen == 60 + 2  # and two that say what the task is


def test_extras_that_are_there_are_not_computed_again_and_join_later_ones(tiny_net, batches, tmp_path):
    net = CountingNet(tiny_net)
    first = analyze(net, batches, AnalyzeRequest(extras=("hulls",)), run_dir=tmp_path)
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "analysis").iterdir()}
    net.seen = 0
    again = analyze(net, batches, AnalyzeRequest(extras=("hulls",)), run_dir=tmp_path)
    assert net.seen == 0
    pd.testing.assert_frame_equal(again["channels"], first["channels"])
    joined = analyze(net, batches, AnalyzeRequest(extras=("triplets",)), run_dir=tmp_path)
    assert net.seen == 60 + 2  # and two that say what the task is
    assert {"hull_size"} <= set(joined["channels"]) and {"triplet_ratio", "mean_hull_size"} <= set(joined["layers"])
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps


@pytest.mark.parametrize("change", ["weights", "limit", "record"])
def test_another_network_other_images_or_other_settings_are_computed_anew(tiny_net, batches, tmp_path, change):
    analyze(tiny_net, batches, AnalyzeRequest(extras=()), run_dir=tmp_path, record={"data": 1})
    net = CountingNet(tiny_net)
    if change == "weights":
        with torch.no_grad():
            tiny_net.conv1.weight[0, 0, 0, 0] += 1
    request = AnalyzeRequest(extras=(), limit=40 if change == "limit" else None)
    net.net, net.seen = tiny_net, 0
    handle = tiny_net.register_forward_hook(lambda *_: setattr(net, "seen", net.seen + 1))
    analyze(tiny_net, batches, request, run_dir=tmp_path, record={"data": 2 if change == "record" else 1})
    handle.remove()
    assert net.seen > 0


def test_interrupted_analysis_keeps_the_extras_that_were_done(tiny_net, batches, tmp_path, monkeypatch):
    request = AnalyzeRequest(extras=("hulls", "triplets"))
    expected = analyze(tiny_net, batches, request)

    def stop(analysis):
        raise KeyboardInterrupt

    whole = EXTRAS["triplets"]
    monkeypatch.setattr(EXTRAS, "_things", {**EXTRAS, "triplets": replace(whole, build=stop)})
    with pytest.raises(KeyboardInterrupt):
        analyze(tiny_net, batches, request, run_dir=tmp_path)
    assert not (tmp_path / "channels.parquet").exists()
    monkeypatch.undo()
    stamp = (tmp_path / "analysis" / "hulls.channels.parquet").stat().st_mtime_ns
    found = analyze(tiny_net, batches, request, run_dir=tmp_path)
    assert (tmp_path / "analysis" / "hulls.channels.parquet").stat().st_mtime_ns == stamp
    pd.testing.assert_frame_equal(found["layers"], expected["layers"])


def test_damage_joins_the_lesions_of_the_run_folder(tiny_net, batches, tmp_path):
    request = AnalyzeRequest(extras=("damage",))
    with pytest.raises(InputError, match="run `lesion` first"):
        analyze(tiny_net, batches, request, run_dir=tmp_path)
    table = measure(tiny_net, batches)
    table.assign(damage=3 * table["input_capture"]).to_parquet(tmp_path / "lesions.parquet")
    found = analyze(tiny_net, batches, request, run_dir=tmp_path)["damage"].set_index("quantity")["value"]
    assert found["r2_capture"] == pytest.approx(1)


def test_the_verb_reads_a_checkpoint_of_a_pruned_run_and_the_report_shows_it(tmp_path, tiny_run, capsys):
    run_dir = str(shutil.copytree(tiny_run, tmp_path / "run"))
    config = (tmp_path / "run" / "config.yaml").read_text()
    command = ["analyze", "-c", TINY, "--run_dir", run_dir, "--request.extras", "[groupings,propagation]"]
    main(command)
    layers = pd.read_parquet(tmp_path / "run" / "layers.parquet")
    widths = json.loads((tmp_path / "run" / "stages.jsonl").read_text().splitlines()[-1])["widths"]
    assert layers["channels"].tolist() == [widths[name]["after"] for name in layers["layer"]]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["verb"] == "fit" and record["analyze"]["backbone"]["name"] == "cifar_resnet20"
    assert (tmp_path / "run" / "config.yaml").read_text() == config
    assert "ARI" in capsys.readouterr().out
    for wrong, words in (
        (["--ckpt_path", "/nowhere.ckpt"], "/nowhere.ckpt: no such file"),
        (["--request.extras", "[hull]"], "hull"),
        (["--run_dir", str(tmp_path / "other")], "analyze needs a trained network"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main([*command, *wrong])
        assert exit_.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["everyday", "controls"])
def test_the_configurations_of_the_verb_are_valid(name):
    root = Path(__file__).resolve().parents[3] / "configs"
    files = ("base.yaml", "data/digits.yaml", "model/cifar_resnet20.yaml", f"experiment/analyze_{name}.yaml")
    cli = build_cli(["analyze", *(part for file in files for part in ("-c", str(root / file)))], run=False)
    assert set(cli.config["analyze"]["request"]["extras"]) <= set(extra_names())
