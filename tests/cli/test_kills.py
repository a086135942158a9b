"""Every verb, killed at many moments, goes on to the files of the run that was never killed."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from killing import TINY, contents, finish, interrupt, partial_files

KILLS = int(os.environ.get("KILLS", "3"))
"""Moments of each verb, evenly spread over its time."""
TRACE = ["--trainer.callbacks+=lit_prune.AxisTrace"]
QUICK = ["--trainer.callbacks", "[]"]
REDUCE = "{seeds: [0], kept: [0.5], methods: [{score: variance}, {score: random}], calibration_sizes: [64]}"
SUITE = "{a: {model: {backbone: cifar_resnet20}}}"
VERBS = {  # verb -> its command line; FOLDER is a run folder with a finished fit
    "fit": ["fit", "-c", TINY, *TRACE],
    "fit and gradients": ["fit", "-c", TINY, "--trainer.callbacks+=lit_prune.GradientTrace"],
    "compress": ["compress", "-c", TINY, "--repair_epochs", "1", "--model.weights", "WEIGHTS"],
    "analyze": ["analyze", "-c", TINY, *QUICK, "--ckpt_path", "CHECKPOINT"],
    "lesion": ["lesion", "-c", TINY, *QUICK, "--ckpt_path", "CHECKPOINT", "--request.channels", "4"],
    "sweep": ["sweep", "-c", TINY, *QUICK, "--checkpoints", "[CHECKPOINT]", "--request.epochs", "1"]
    + ["--request.methods", "[magnitude, taylor]", "--request.sparsities", "[0.3, 0.6]"],
    "reduce": ["reduce", "-c", TINY, *QUICK, "--ckpt_path", "CHECKPOINT", "--request", REDUCE],
    "export": ["export"],
    "report": ["report"],
    "suite": ["suite", "--base", "BASE", "--networks", SUITE, "--seeds", "[1]"],
}
IN_PLACE = ("export", "report")
"""Verbs that work in the folder of a finished run."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run folder with a finished fit, and the checkpoint of its dense network."""
    folder = tmp_path_factory.mktemp("trained")
    finish(["fit", "-c", TINY, *TRACE, "--run_dir", str(folder / "run")], folder / "log.txt")
    return folder / "run"


def command_line(verb: str, run_dir: Path, trained: Path) -> list[str]:
    names = {"CHECKPOINT": str(trained / "checkpoints" / "dense.ckpt"), "BASE": _base()}
    names["WEIGHTS"] = str(trained / "teacher" / "model.safetensors")
    words = VERBS[verb]
    for name, value in names.items():
        words = [word.replace(name, value) for word in words]
    return [*words, "--run_dir", str(run_dir)]


def _base() -> str:
    import yaml

    return str(yaml.safe_load(Path(TINY).read_text())).replace("'", '"').replace("False", "false")


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_killed_verb_goes_on_to_the_files_of_one_that_was_never_killed(verb, tmp_path, trained):
    def folder(name: str) -> Path:
        if verb in IN_PLACE:
            shutil.copytree(trained, tmp_path / name)
        return tmp_path / name

    log = tmp_path / "log.txt"
    seconds = finish(command_line(verb, whole := folder("whole"), trained), log)
    wanted = contents(whole)
    killed = 0
    for number in range(KILLS):
        run_dir = folder(f"killed{number}")
        arguments = command_line(verb, run_dir, trained)
        moment = seconds * (number + 1) / (KILLS + 1)
        killed += interrupt(arguments, log, moment, signal.SIGKILL) == -signal.SIGKILL
        finish(arguments, log)
        found = contents(run_dir)
        differing = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
        assert not differing, f"killed after {moment:.1f} of {seconds:.1f} s: {differing}"
        assert not partial_files(run_dir)
    assert killed, "no kill came in time"


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("number", "code", "words"), [
    (signal.SIGINT, 130, "error: interrupted"),
    (signal.SIGTERM, 143, "error: ended by SIGTERM"),
])  # fmt: skip
def test_an_interrupted_verb_says_so_in_one_line(verb, number, code, words, tmp_path, trained):
    run_dir = tmp_path / "run"
    if verb in IN_PLACE:
        shutil.copytree(trained, run_dir)
    arguments = command_line(verb, run_dir, trained)
    for moment in (1.0, 3.0):
        log = tmp_path / f"log{moment}.txt"
        found = interrupt(arguments, log, moment, number)
        printed = log.read_text()
        assert found in (code, 0), printed[-2000:]
        assert found == 0 or words in printed, printed[-2000:]
        assert "Traceback" not in printed
