"""A module of somebody's own on two processes: ranks stay equal, and a killed run ends like the uninterrupted one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_prune import load_compact
from lit_prune.structure.record import record_of

SCRIPT = Path(__file__).resolve().parents[1] / "ddp_own_module.py"


def launch(folder: Path, *arguments: str, module: str = "Classifier") -> int:
    paths = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[1])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "MODULE": module}
    command = [sys.executable, str(SCRIPT), str(folder), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False).returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert launch(folder) == 0
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


def test_ranks_hold_equal_networks_through_a_stage_and_the_record_is_whole(whole):
    sums = [json.loads((whole / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert sums[0] == sums[1] and len(set(sums[0])) == 3
    (record,) = json.loads((whole / "records.json").read_text())
    assert record["distillation"]["evaluations"] == 2 * 2, "two epochs of two batches on each rank"
    assert weights(whole)["net.3.weight"].shape[0] < 12
    assert (whole / "trace" / "epoch=003.parquet").exists() and (whole / "compact").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("epoch", ["1", "2"])
def test_a_killed_run_resumes_to_the_same_weights(whole, tmp_path, epoch):
    assert launch(tmp_path, epoch) != 0
    assert launch(tmp_path) == 0
    got, wanted = weights(tmp_path), weights(whole)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_a_module_that_is_its_own_network_is_cut_alike_on_both_ranks_and_resumes(tmp_path):
    assert launch(tmp_path / "whole", module="Itself") == 0
    sums = [json.loads((tmp_path / "whole" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert sums[0] == sums[1] and len(set(sums[0])) == 3
    (record,) = json.loads((tmp_path / "whole" / "records.json").read_text())
    assert record["distillation"]["evaluations"] == 2 * 2, "hooks see the calls of the step, not those of DDP around it"
    assert launch(tmp_path / "part", "2", module="Itself") != 0
    assert launch(tmp_path / "part", module="Itself") == 0
    got, wanted = weights(tmp_path / "part"), weights(tmp_path / "whole")
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert wanted["branches.left.weight"].numel() < 12 * 8 * 9


@pytest.mark.real  # torch.export reads no program of another
def test_the_compact_folder_of_a_class_that_we_do_not_know_needs_the_class_or_its_program(whole):
    from lightning_modules import network

    small = load_compact(whole / "compact", model=network())
    saved = {k.removeprefix("net."): v for k, v in weights(whole).items() if k.startswith("net.")}
    assert all(torch.equal(value, saved[name]) for name, value in small.state_dict().items())
    assert len(record_of(small).plans) == 1
    images = torch.randn(5, 3, 8, 8)
    program = torch.export.load(whole / "compact" / "program.pt2").module()
    torch.testing.assert_close(program(images), small(images))
