"""Two processes on the CPU: ranks stay equal through every stage, and a resumed run may change their number."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


def launch(run_dir: Path, devices: int, config: str = "two_process_run", **variables: str):
    """One `fit` on small digits through the command line, as a user would start it."""
    command = [sys.executable, str(REPOSITORY / "train.py"), "fit"]
    command += ["-c", str(REPOSITORY / "tests" / f"{config}.yaml"), "--run_dir", str(run_dir)]
    command += ["--trainer.devices", str(devices)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "tests"), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)


def checksums(run_dir: Path) -> dict[str, list[int]]:
    """Checksums that every rank wrote at the end of each epoch: `{rank: [...]}`."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(run_dir.glob("rank*.json"))}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    result = launch(folder, 2)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_ranks_hold_equal_parameters_after_every_epoch(two_processes):
    sums = checksums(two_processes)
    assert set(sums) == {"rank0", "rank1"}
    assert sums["rank0"] == sums["rank1"] and len(sums["rank0"]) == 4
    assert len(set(sums["rank0"])) == 4, "parameters did not change"


def test_a_network_that_is_not_wrapped_again_is_caught_before_ranks_drift_apart(tmp_path):
    result = launch(tmp_path / "run", 2, SKIP_WRAPPING="1")
    assert result.returncode != 0
    assert "not wrapped for gradient reduction: ranks would drift apart" in result.stderr


@pytest.mark.parametrize("resumed_on", [2, 1])
def test_a_killed_run_resumes_on_two_processes_or_on_one(two_processes, tmp_path, resumed_on):
    killed = launch(tmp_path / "run", 2, KILL_AT_EPOCH="2")
    assert killed.returncode != 0 and (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    resumed = launch(tmp_path / "run", resumed_on)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    got, wanted = weights(tmp_path / "run"), weights(two_processes)
    assert got.keys() == wanted.keys()
    assert all(got[name].shape == wanted[name].shape for name in wanted)
    if resumed_on == 2:
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert (tmp_path / "run" / "compact" / "report.json").exists()


def start(run_dir: Path, **variables: str) -> subprocess.Popen:
    """As `launch`, going on beside the test."""
    command = [sys.executable, str(REPOSITORY / "train.py"), "fit"]
    command += ["-c", str(REPOSITORY / "tests" / "two_process_run.yaml"), "--run_dir", str(run_dir)]
    command += ["--trainer.devices", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "tests"), **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=REPOSITORY)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["launcher", "both"])
@pytest.mark.parametrize("where, later", [("stage", 0.0), ("stage", 0.2), ("stage", 0.5), ("epoch", 0.0)])
def test_sigterm_ends_both_ranks_at_once_wherever_they_are(two_processes, tmp_path, where, later, to):
    process = start(tmp_path, SAY_WHERE=where)
    deadline = time.monotonic() + 200
    while len(list(tmp_path.glob("where*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    ranks = [int(file.read_text()) for file in tmp_path.glob("where*")]
    assert len(ranks) == 2
    time.sleep(later)
    for rank in ranks if to == "both" else [process.pid]:
        os.kill(rank, signal.SIGTERM)
    assert process.wait(60) in (143, -signal.SIGTERM)
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    resumed = launch(tmp_path, 2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    got, wanted = weights(tmp_path), weights(two_processes)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


TRACES = "two_process_traces"


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("traced")
    result = launch(folder, 2, TRACES)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def trace_tables(run_dir: Path) -> dict[str, pd.DataFrame]:
    return {file.name: pd.read_parquet(file) for file in sorted((run_dir / "trace").glob("*.parquet"))}


def test_ranks_stay_equal_under_the_regulariser(traced):
    sums = checksums(traced)
    assert sums["rank0"] == sums["rank1"] and len(set(sums["rank0"])) == 2


def test_both_traces_of_two_processes_are_those_of_one(traced, tmp_path):
    """At initialisation, where the networks are the same; later ones differ, for each rank has its own batch norm."""
    result = launch(tmp_path, 1, TRACES)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = trace_tables(tmp_path), trace_tables(traced)
    assert one.keys() == two.keys() and {"gradients.parquet", "epoch=000.parquet"} < one.keys()
    pd.testing.assert_frame_equal(one["epoch=000.parquet"], two["epoch=000.parquet"], rtol=1e-4, atol=1e-6)
    first = [tables["gradients.parquet"].query("epoch == 0") for tables in (one, two)]
    pd.testing.assert_frame_equal(*first, atol=1e-5)
    assert two["gradients.parquet"]["epoch"].unique().tolist() == [0, 1, 2]


def test_a_killed_traced_run_resumes_on_two_processes_to_the_same_traces(traced, tmp_path):
    killed = launch(tmp_path, 2, TRACES, KILL_AT_EPOCH="1")
    assert killed.returncode != 0 and not (tmp_path / "trace" / "dynamics.parquet").exists()
    resumed = launch(tmp_path, 2, TRACES)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    got, wanted = weights(tmp_path), weights(traced)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    found, expected = trace_tables(tmp_path), trace_tables(traced)
    assert found.keys() == expected.keys()
    for name, table in expected.items():
        pd.testing.assert_frame_equal(found[name], table)
