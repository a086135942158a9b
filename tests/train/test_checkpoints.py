"""Checkpoints: whole whenever the run dies, written while training goes on, all there when the run ends."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from lightning.pytorch import Callback

from lit_prune.cli.parsing import causes
from lit_prune.errors import InputError
from lit_prune.train.checkpoints import WholeFileIO, checkpoint_writer

DIES_IN_A_WRITE = """
    import os, signal, sys, torch
    from lit_prune.train.checkpoints import checkpoint_writer
    writer = checkpoint_writer()
    writer.save_checkpoint({"epoch": 0, "weights": torch.zeros(1000)}, sys.argv[1])
    writer.teardown()

    def half_written(checkpoint, path):
        path.write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half_written
    writer.save_checkpoint({"epoch": 1, "weights": torch.ones(1000)}, sys.argv[1])
    writer.teardown()
"""


def test_a_process_killed_during_a_write_leaves_the_checkpoint_before_whole(tmp_path):
    file = tmp_path / "last.ckpt"
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(DIES_IN_A_WRITE), str(file)], timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert torch.load(file, weights_only=True)["epoch"] == 0
    assert len(list(tmp_path.iterdir())) == 2, "it did not die in the write"
    WholeFileIO().save_checkpoint({"epoch": 2}, file)
    assert torch.load(file, weights_only=True) == {"epoch": 2}
    assert os.listdir(tmp_path) == ["last.ckpt"]  # the half written one is gone


class Release(Callback):
    """Lets the writer go on when training is over."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def on_train_end(self, trainer, pl_module) -> None:
        self.over.set()


def test_training_goes_on_during_a_write_and_the_end_waits_for_it(tmp_path, make_run, monkeypatch):
    release, save = Release(), WholeFileIO.save_checkpoint

    def late(self, *arguments, **options):
        assert release.over.wait(60), "training waited for the write"
        save(self, *arguments, **options)

    monkeypatch.setattr(WholeFileIO, "save_checkpoint", late)
    trainer, module, data = make_run(tmp_path, stages=(), max_epochs=2, callbacks=[release])
    trainer.fit(module, datamodule=data)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["epoch"] == 1
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in saved["state_dict"].items())


def test_a_write_that_failed_is_raised_at_the_end_at_the_latest(tmp_path):
    (tmp_path / "file").write_text("")
    writer = checkpoint_writer()
    with pytest.raises(
        InputError, match="file cannot be written"
    ):  # by the call itself where the writing thread is quicker
        writer.save_checkpoint({"epoch": 0}, tmp_path / "file" / "last.ckpt")
        writer.teardown()


def test_a_checkpoint_that_cannot_be_written_says_why_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))  # as a disk with so little room
    try:
        with pytest.raises((OSError, RuntimeError)) as raised:
            WholeFileIO().save_checkpoint({"state_dict": {"weight": torch.zeros(5_000)}}, tmp_path / "last.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    reasons = [cause.errno for cause in causes(raised.value) if isinstance(cause, OSError)]
    assert reasons == [errno.EFBIG] and not list(tmp_path.iterdir())
