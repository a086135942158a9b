"""Two processes started by torchrun, as on a cluster, end with the weights of two that Lightning starts itself."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
seed_everything: 7
data:
  class_path: lit_prune.data.DigitsData
  init_args: {resolution: 8, train_size: 64, calibration_size: 32, batch_size: 16, pad: 1}
model:
  backbone: cifar_convnet
  arguments: {widths: [4, 8]}
  optimizer:
    class_path: torch.optim.SGD
    init_args: {lr: 0.05}
trainer:
  max_epochs: 2
  accelerator: cpu
  devices: 2
  strategy: ddp
  num_sanity_val_steps: 0
  use_distributed_sampler: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lit_prune.AxisTrace
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def weights(folder: Path, launcher: list[str]) -> dict[str, torch.Tensor]:
    """Weights after a run in `folder` whose processes `launcher` starts."""
    folder.mkdir()
    (folder / "fit.yaml").write_text(CONFIG)
    command = [sys.executable, *launcher, "-m", "lit_prune", "fit", "-c", str(folder / "fit.yaml")]
    command += ["--run_dir", str(folder / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (folder / "run" / "trace" / "epoch=002.parquet").exists()
    return torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_torchrun_starts_what_lightning_starts(tmp_path):
    by_torchrun, by_lightning = weights(tmp_path / "torchrun", TORCHRUN), weights(tmp_path / "lightning", [])
    assert by_torchrun.keys() == by_lightning.keys()
    assert all(torch.equal(by_torchrun[name], by_lightning[name]) for name in by_lightning)
