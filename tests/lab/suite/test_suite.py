"""The suite: networks × seeds, resumable, finished runs skipped, a dry run that does nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from lit_prune.cli.main import main
from lit_prune.lab.suite import suite
from lit_prune.lab.suite.suite import device_slots, merge
from lit_prune.structure import cost

CONFIG = {
    "seeds": [1, 2],
    "base": {
        "data": {
            "class_path": "lit_prune.data.DigitsData",
            "init_args": {"resolution": 8, "train_size": 96, "calibration_size": 32, "batch_size": 32, "pad": 1},
        },
        "model": {
            "backbone": "cifar_convnet",
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}},
        },
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "callbacks": [{"class_path": "lit_prune.AxisTrace"}],
        },
    },
    "networks": {
        "narrow": {"model": {"arguments": {"widths": [4]}}},
        "wide": {"model": {"arguments": {"widths": [6]}}},
    },
}


@pytest.fixture
def command(tmp_path) -> list[str]:
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(CONFIG))
    return ["suite", "-c", str(tmp_path / "suite.yaml"), "--run_dir", str(tmp_path / "suite")]


class Inside:
    """A run carried out in this process; `broken` names those that fail, `started` all in order."""

    started: list[str] = []
    broken: set[str] = set()

    def __init__(self, run, slot) -> None:
        name = f"{run.network} {run.seed}"
        self.started.append(name)
        self.returncode = 1 if name in self.broken else 0
        if not self.returncode:
            main(run.arguments)

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def inside(monkeypatch) -> type[Inside]:
    monkeypatch.setattr(suite, "_start", Inside)
    monkeypatch.setattr(suite, "POLL_SECONDS", 0)
    Inside.started, Inside.broken = [], set()
    return Inside


def test_a_failed_run_is_named_the_others_finish_and_the_same_command_does_only_the_rest(
    command, inside, tmp_path, capsys
):
    inside.broken = {"wide 1"}
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code == 2 and "1 of 4 runs failed" in capsys.readouterr().err
    assert inside.started == ["narrow 1", "wide 1", "narrow 2", "wide 2"]
    inside.started, inside.broken = [], set()
    main(command)
    assert inside.started == ["wide 1"]
    table = pd.read_parquet(tmp_path / "suite" / "suite.parquet")
    runs = list(zip(table["network"], table["seed"], strict=True))
    assert runs == [(network, seed) for seed in (1, 2) for network in ("narrow", "wide")]
    assert table["accuracy"].between(0, 1).all()
    traces = sorted(file.name for file in (tmp_path / "suite" / "wide" / "seed=1" / "trace").glob("epoch=*"))
    assert traces == [f"epoch=00{epoch}.parquet" for epoch in range(3)]
    seeds = [torch.load(path, weights_only=True)["state_dict"]["backbone.fc2.weight"] for path in last(tmp_path)]
    assert not torch.equal(*seeds)


def test_what_follows_each_fit_uses_its_network_and_only_what_is_left_is_done(inside, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CONFIG, "seeds", [1])
    monkeypatch.setitem(CONFIG, "networks", {"narrow": CONFIG["networks"]["narrow"]})
    command = ["suite", "-c", str(tmp_path / "suite.yaml"), "--run_dir", str(tmp_path / "suite")]

    def run(extra: str) -> pd.DataFrame:
        then = {"analyze": {"request": {"extras": [extra]}}}
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump({**CONFIG, "then": then}))
        main(command)
        return pd.read_parquet(tmp_path / "suite" / "narrow" / "seed=1" / "layers.parquet")

    assert "mean_hull_size" in run("hulls") and inside.started == ["narrow 1"] * 2
    run("hulls")
    assert inside.started == ["narrow 1"] * 2
    assert "triplet_ratio" in run("triplets") and inside.started == ["narrow 1"] * 3  # the fit stays
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*command, "--then", "{fit: {}}"])
    assert "then: 'fit' cannot follow a fit" in capsys.readouterr().err


def test_a_report_takes_the_folder_alone(tmp_path):
    (fit,) = suite.Suite(tmp_path, {}, {"a": {}}, (1,), ("--data.root", "x"), {"lesion": {}, "report": {}}).runs()
    folder = str(tmp_path / "a" / "seed=1")
    assert [run.arguments[0] for run in fit.left] == ["fit", "lesion", "report"]
    assert fit.then[0].arguments == ["lesion", "-c", f"{folder}/lesion.yaml", "--run_dir", folder, "--data.root", "x"]
    assert fit.then[1].arguments == ["report", "--run_dir", folder]


def last(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "suite" / "narrow").glob("seed=*/checkpoints/last.ckpt"))


def test_dry_run_says_what_is_left_and_its_cost_and_does_nothing(command, inside, tmp_path, capsys):
    main([*command, "--dry_run", "true"])
    shown = capsys.readouterr().out
    assert not inside.started and not (tmp_path / "suite").exists()
    assert all(words in shown for words in ("narrow seed 1", "wide seed 2", "to do", "PFLOP", "hours"))


def test_the_estimate_counts_six_operations_a_multiplication_image_and_epoch(inside, tmp_path, command):
    from lit_prune.cli.prune_cli import fit_parts
    from lit_prune.lab.suite.estimate import estimate_fit

    file = tmp_path / "fit.yaml"
    file.write_text(yaml.safe_dump(merge(CONFIG["base"], CONFIG["networks"]["wide"])))
    module, data, trainer = fit_parts(["fit", "-c", str(file)])
    estimate = estimate_fit(module, data, trainer)
    macs = cost(module.backbone, module.example_input).macs
    assert estimate.petaflop * 1e15 == pytest.approx(6 * macs * 96 * 2)
    assert estimate.epochs == 2 and estimate.seconds > 0


def test_another_configuration_in_the_same_folder_is_refused(command, inside, tmp_path, capsys):
    (tmp_path / "suite" / "narrow" / "seed=1").mkdir(parents=True)
    (tmp_path / "suite" / "narrow" / "seed=1" / "fit.yaml").write_text("seed_everything: 5\n")
    with pytest.raises(SystemExit):
        main(command)
    assert "another configuration" in capsys.readouterr().err and not inside.started


def test_parts_share_the_runs_without_overlap(command, inside):
    main([*command, "--parts", "3", "--part", "1"])
    assert inside.started == ["wide 1"]


def test_runs_are_spread_over_the_visible_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in device_slots(None, 2)] == ["4", "4", "7", "7"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in device_slots(1, 1)] == ["4"]
    with pytest.raises(ValueError, match="devices=3"):
        device_slots(3, 1)


def test_a_run_is_a_process_of_its_own_with_a_log(command, tmp_path):
    main([*command, "--seeds", "[1]", "--networks", "{narrow: {model: {arguments: {widths: [4]}}}}"])
    folder = tmp_path / "suite" / "narrow" / "seed=1"
    assert (folder / "finished.json").exists() and "max_epochs=2" in (folder / "log.txt").read_text()


def start_suite(folder: Path) -> subprocess.Popen:
    """The suite of one narrow run of six epochs, as a process of its own with its children in one group."""
    command = [sys.executable, "-m", "lit_prune", "suite", "-c", str(folder / "suite.yaml"), "--seeds", "[1]"]
    command += ["--networks", "{narrow: {model: {arguments: {widths: [4]}}}}", "--options"]
    command += ['["--trainer.max_epochs", "6", "--trainer.log_every_n_steps", "1"]']
    command += ["--run_dir", str(folder / "suite")]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)


def epochs_saved(run: Path) -> int:
    file = run / "checkpoints" / "last.ckpt"
    return int(torch.load(file, weights_only=True)["epoch"]) + 1 if file.exists() else 0


@pytest.mark.slow
def test_a_suite_and_its_run_killed_in_the_middle_go_on_to_the_same_weights(command, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "suite.yaml").write_bytes((tmp_path / "suite.yaml").read_bytes())
    assert start_suite(tmp_path / "whole").wait(200) == 0
    run, process, limit = tmp_path / "suite" / "narrow" / "seed=1", start_suite(tmp_path), time.monotonic() + 200
    while not epochs_saved(run) and time.monotonic() < limit:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # the suite and its child
    assert process.wait(60) == -signal.SIGKILL
    assert 0 < epochs_saved(run) < 6 and not (run / "finished.json").exists()
    assert start_suite(tmp_path).wait(200) == 0
    assert "Restored all states from the checkpoint" in (run / "log.txt").read_text()
    wanted, got = (
        torch.load(folder / "suite" / "narrow" / "seed=1" / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (tmp_path / "whole", tmp_path)
    )
    assert wanted["epoch"] == got["epoch"] == 5
    assert all(torch.equal(got["state_dict"][name], value) for name, value in wanted["state_dict"].items())
    tables = [pd.read_parquet(folder / "suite" / "suite.parquet") for folder in (tmp_path / "whole", tmp_path)]
    pd.testing.assert_frame_equal(*(table.drop(columns="run_dir") for table in tables))


def children_of(process: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system ends children on Linux only")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_suite_that_is_stopped_ends_its_runs_and_a_second_one_meanwhile_is_refused(
    command, tmp_path, number, capsys, monkeypatch
):
    process, run = start_suite(tmp_path), tmp_path / "suite" / "narrow" / "seed=1"
    limit = time.monotonic() + 200
    while not epochs_saved(run) and time.monotonic() < limit:
        time.sleep(0.01)
    children = children_of(process.pid)
    assert len(children) == 1
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code == 2 and "another process is at work" in capsys.readouterr().err
    os.kill(process.pid, number)
    assert process.wait(60) == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    while any(map(is_alive, children)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(map(is_alive, children))
    assert not (run / "finished.json").exists() and epochs_saved(run) < 6
    assert start_suite(tmp_path).wait(200) == 0 and epochs_saved(run) == 6


def test_a_run_that_ended_before_its_last_epoch_is_not_finished_whatever_it_says(command, inside, tmp_path, capsys):
    main([*command, "--seeds", "[1]"])
    folder = tmp_path / "suite" / "narrow" / "seed=1"
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({**checkpoint, "epoch": 0}, folder / "checkpoints" / "last.ckpt")
    inside.started, inside.broken = [], {"narrow 1"}
    with pytest.raises(SystemExit):
        main([*command, "--seeds", "[1]"])
    assert inside.started == ["narrow 1"] and "1 of 2 runs failed" in capsys.readouterr().err
