"""What a run hands over when it is killed while it does, and where it could not."""

import os
import signal

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prune.errors import InputError
from lit_prune.files import read_json
from lit_prune.train import hand_over
from tests.lightning_modules import Classifier, loaders, pruning, trainer


def run(folder) -> None:
    """To its end, or on to its end."""
    last = ModelCheckpoint(folder / "checkpoints", save_last=True, save_top_k=-1)
    one = trainer(folder, pruning(monitor="val/acc"), last, epochs=2, enable_checkpointing=True)
    there = folder / "checkpoints" / "last.ckpt"
    one.fit(Classifier(), *loaders(), ckpt_path=there if there.exists() else None)


def killed_at(name: str, folder, monkeypatch) -> int:
    """The signal that ended a run which was killed as it called a function of `hand_over`."""
    if not (child := os.fork()):
        torch.set_num_threads(1)  # it has none of the others
        monkeypatch.setattr(hand_over, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        run(folder)
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.cpu
@pytest.mark.parametrize("moment", ["stage_profiles", "save_compact", "write_program", "write_json"])
def test_a_run_that_was_killed_as_it_handed_over_hands_all_of_it_over_when_it_goes_on(tmp_path, monkeypatch, moment):
    assert killed_at(moment, tmp_path, monkeypatch) == signal.SIGKILL
    run(tmp_path)
    compact = tmp_path / "compact"
    assert {path.name for path in compact.iterdir()} == {
        "model.safetensors", "structure.json", "report.json", "README.md", hand_over.PROGRAM,
    }  # fmt: skip
    assert read_json(compact / "report.json", ["run", "program"])["program"].startswith(hand_over.PROGRAM)
    written = (compact / "report.json").read_bytes()
    run(tmp_path)
    assert (compact / "report.json").read_bytes() == written, "a finished run that is started again changes nothing"


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("mine")
    one = trainer(tmp_path / "file" / "run", pruning(monitor="val/acc"), epochs=2)
    with pytest.raises(InputError, match="file/run cannot be written"):
        one.fit(Classifier(), *loaders())
    assert one.global_step == 0
