"""A disk that is full is said as such, with exit code 2, and nothing half-written stays: on a tiny file system."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from killing import TINY

SIZES = ("100k", "1m", "3m", "5m", "7m")
"""The whole run folder takes about 9 MiB."""


def on_small_disk(folder: Path, size: str, arguments: list[str]) -> subprocess.CompletedProcess:
    """The command line with `folder` as a file system of its own; the last line printed counts half-written files."""
    command = " ".join([sys.executable, "-m", "lit_prune", *arguments])
    script = f"mount -t tmpfs -o size={size} none {folder} && {command} 1>&2; code=$?\n"
    script += f"find {folder} -name '*.partial' | wc -l; exit $code"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )


def can_mount(folder: Path) -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(folder)]
    return subprocess.run(mount, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path, size):
    if not can_mount(tmp_path):
        pytest.skip("no file system of one's own can be mounted here")
    arguments = ["fit", "-c", TINY, "--run_dir", str(tmp_path / "run"), "--trainer.callbacks+=lit_prune.AxisTrace"]
    found = on_small_disk(tmp_path, size, arguments)
    errors = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert found.returncode == 2, found.stderr[-3000:]
    assert len(errors) == 1 and "the disk is full" in errors[0], errors
    assert "Traceback" not in found.stderr, found.stderr[-3000:]
    assert found.stdout.split() == ["0"]
