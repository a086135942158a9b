"""The verb `lesion`: what it writes, resuming, the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lit_prune.cli.main import main
from lit_prune.cli.prune_cli import build_cli
from lit_prune.errors import InputError
from lit_prune.lab.analyze.analysis import analyze
from lit_prune.lab.analyze.request import AnalyzeRequest
from lit_prune.lab.lesion import run as verb
from lit_prune.lab.lesion.request import LesionRequest
from lit_prune.lab.lesion.run import ImagePair, choose_layers, lesion
from lit_prune.measurement.channel_table import measure
from lit_prune.report import write_report

ROOT = Path(__file__).resolve().parents[3]
TINY = str(ROOT / "tests" / "tiny_run.yaml")
ALL = LesionRequest(layers=("*conv*", "stem.0"), channels=None, peers=4)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)

    def batch(size):
        return torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % 4

    return ImagePair([batch(30), batch(30)], [batch(20), batch(12)])


def mean_loss(net, batches, layer=None, edit=None):
    """Mean cross-entropy, with the output of one layer edited."""
    handles = [] if layer is None else [net.get_submodule(layer).register_forward_hook(lambda m, i, o: edit(o))]
    with torch.no_grad():
        total = sum(nn.functional.cross_entropy(net(x.to(net.head.weight)), y, reduction="sum") for x, y in batches)
    for handle in handles:
        handle.remove()
    return float(total) / sum(len(y) for _, y in batches)


@torch.no_grad()
def image_losses(net, batches):
    losses = [nn.functional.cross_entropy(net(x.to(net.head.weight)), y, reduction="none") for x, y in batches]
    return torch.cat(losses)


def test_damage_and_recovery_are_those_of_plain_hooks(tiny_net, images):
    tiny_net.double()
    table, whole = lesion(tiny_net, images, ALL)
    assert whole.loss == pytest.approx(mean_loss(tiny_net, images.evaluation))
    assert table["layer"].unique().tolist() == ["stem.0", "conv1", "conv2"] and len(table) == 20
    metrics = measure(tiny_net, images.calibration, layers=("*conv*", "stem.0"))
    np.testing.assert_allclose(table["task_information"], metrics["task_information"])
    for row in table.itertuples():
        channel = torch.arange(len(metrics[metrics["layer"] == row.layer])) == row.channel
        loss = mean_loss(tiny_net, images.evaluation, row.layer, lambda o, c=channel: o * ~c[:, None, None])
        assert row.damage == pytest.approx(loss - whole.loss, abs=1e-10)
        handle = tiny_net.get_submodule(row.layer).register_forward_hook(
            lambda m, i, o, c=channel: o * ~c[:, None, None]
        )
        harmed = image_losses(tiny_net, images.evaluation)
        handle.remove()
        rise = harmed - image_losses(tiny_net, images.evaluation)
        assert row.damage_error == pytest.approx(float(rise.std()) / 32**0.5, abs=1e-10)
    harmful = table["damage"] > 0
    expected = 1 - table["damage_replaced"] / table["damage"]
    np.testing.assert_allclose(table["recovery"][harmful], expected[harmful])
    assert table["recovery"][~harmful].isna().all()


def test_an_exact_duplicate_recovers_all_the_damage(tiny_net, images):
    with torch.no_grad():
        tiny_net.conv1.weight[5] = -0.5 * tiny_net.conv1.weight[2]
        tiny_net.bn1.bias.fill_(2.0)
        tiny_net.conv2.weight.mul_(10)  # so that they matter
    table, _ = lesion(tiny_net, images, LesionRequest(layers=("conv1",), channels=None, peers=4))
    pair = table.set_index("channel").loc[[2, 5]]
    np.testing.assert_allclose(pair["peer_r2"], 1, atol=1e-5)
    np.testing.assert_allclose(pair["damage_replaced"], 0, atol=1e-4)
    assert (pair["damage"].abs() > 1e-3).any()
    harmful = pair[pair["damage"] > 1e-3]
    np.testing.assert_allclose(harmful["recovery"], 1, atol=0.05)


def test_the_draw_of_a_layer_does_not_depend_on_the_others_and_skips_dead_channels(tiny_net, images):
    with torch.no_grad():
        tiny_net.conv1.weight[1] = 0
    few = LesionRequest(layers=("conv1", "conv2"), channels=4, peers=4)
    both, _ = lesion(tiny_net, images, few)
    alone, _ = lesion(tiny_net, images, LesionRequest(layers=("conv2",), channels=4, peers=4))
    conv2 = both[both["layer"] == "conv2"].reset_index(drop=True)
    pd.testing.assert_frame_equal(conv2, alone)
    many, _ = lesion(tiny_net, images, LesionRequest(layers=("conv1",), channels=100, peers=4))
    assert many["channel"].tolist() == [0, 2, 3, 4, 5, 6, 7]


def test_a_killed_run_goes_on_and_ends_with_the_same_table(tiny_net, images, tmp_path, monkeypatch):
    expected, _ = lesion(tiny_net, images, ALL)
    whole, done = verb.lesion_layer, []

    def stop_at_second(start, request, watch):
        if done:
            raise KeyboardInterrupt
        done.append(start.metrics["layer"].iloc[0])
        return whole(start, request, watch)

    monkeypatch.setattr(verb, "lesion_layer", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        lesion(tiny_net, images, ALL, run_dir=tmp_path)
    assert not (tmp_path / "lesions.parquet").exists()
    stamp = (tmp_path / "lesions" / "parts" / f"{done[0]}.parquet").stat().st_mtime_ns
    monkeypatch.setattr(verb, "lesion_layer", whole)
    found, _ = lesion(tiny_net, images, ALL, run_dir=tmp_path)
    pd.testing.assert_frame_equal(found, expected)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "lesions.parquet"), expected)
    assert (tmp_path / "lesions" / "parts" / f"{done[0]}.parquet").stat().st_mtime_ns == stamp


def test_another_network_is_lesioned_anew(tiny_net, images, tmp_path):
    request = LesionRequest(layers=("conv1",), channels=None, peers=4)
    first, _ = lesion(tiny_net, images, request, run_dir=tmp_path)
    with torch.no_grad():
        tiny_net.head.weight.mul_(2)
    second, _ = lesion(tiny_net, images, request, run_dir=tmp_path)
    assert not np.allclose(first["damage"], second["damage"])
    table, _ = lesion(tiny_net, images, request)
    pd.testing.assert_frame_equal(second, table)


def test_layers_come_from_each_third_of_the_depth_and_not_from_the_head():
    net = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(9)], nn.Flatten(), nn.Linear(12, 2))
    batches = [(torch.zeros(1, 3, 2, 2), torch.zeros(1, dtype=torch.long))]
    assert choose_layers(net, batches, LesionRequest()).index.tolist() == ["1", "4", "7"]
    places = choose_layers(net, batches, LesionRequest(per_third=3))
    assert places["depth"].tolist() == list(range(9))
    assert places["third"].tolist() == ["shallow"] * 4 + ["mid"] * 3 + ["deep"] * 2  # the head is a layer of the depth
    assert choose_layers(net, batches, LesionRequest(layers=("10", "0"))).index.tolist() == ["0", "10"]


def test_analyze_takes_the_lesions(tiny_net, images, tmp_path):
    lesion(tiny_net, images, ALL, run_dir=tmp_path)
    table = analyze(tiny_net, images.calibration, AnalyzeRequest(extras=("damage",)), run_dir=tmp_path)["damage"]
    assert table.set_index("quantity")["value"].notna().all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": ("convolution",)}, "layers: no convolution or linear layer matches 'convolution'"),
        ({"layers": ()}, "layers: empty"),
        ({"seed": -1}, "seed=-1 is no seed"),
        ({"channels": 0}, "channels: 0 is too small"),
        ({"limit": 9}, "limit: 9 is too small; give at least 10"),
        ({"ridge": 0.0}, "ridge"),
        ({"target": "margin"}, "target: 'margin' is not one of"),
    ],
)
def test_bad_requests_are_refused(tiny_net, images, settings, words):
    with pytest.raises(InputError, match=words):
        lesion(tiny_net, images, LesionRequest(**settings))


@pytest.mark.usefixtures("without_drawing")
def test_the_verb_reads_a_checkpoint_pools_runs_and_the_report_shows_it(tmp_path, tiny_run, capsys):
    run_dir = str(shutil.copytree(tiny_run, tmp_path / "run"))
    command = ["lesion", "-c", TINY, "--request.images", "32", "--request.channels", "40"]
    checkpoint = ["--ckpt_path", f"{run_dir}/checkpoints/last.ckpt"]
    main([*command, "--run_dir", run_dir])
    assert "fewer than 40 live ones" in capsys.readouterr().out
    main([*command, "--run_dir", str(tmp_path / "two"), *checkpoint, "--compare", f"[{run_dir}]"])
    one, pooled = (
        pd.read_parquet(tmp_path / name / "thresholds.parquet") for name in ("run/lesions", "two/lesions/pooled")
    )
    assert (pooled["channels"] == 2 * one["channels"]).all()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["verb"] == "fit" and record["lesion"]["images"] == 32
    assert "Lesions" in Path(write_report(run_dir)).read_text()
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--run_dir", run_dir, "--compare", f"[{tmp_path}/none]"])
    assert exit_.value.code == 2 and "has no lesions.parquet" in capsys.readouterr().err


def test_the_configurations_of_the_verb_are_valid():
    base = ("configs/base.yaml", "configs/data/digits.yaml", "configs/model/cifar_resnet20.yaml")
    for files in ((*base, "configs/experiment/lesion.yaml"), ("configs/experiment/lesion_cifar10.yaml",)):
        cli = build_cli(["lesion", *(part for file in files for part in ("-c", str(ROOT / file)))], run=False)
        assert cli.config["lesion"]["request"]["channels"] == 64
