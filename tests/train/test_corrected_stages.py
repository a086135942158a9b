"""A finished run that is started again with other stages says so, and can go back to before them."""

import json
import re
from dataclasses import replace

import pytest

from lit_prune import ChannelStage
from lit_prune.errors import InputError

STAGES = [("channels", 1), ("mid", 2)]


@pytest.fixture
def again(tmp_path, make_run):
    """Starts the finished run of two stages again with others; `from_` names the checkpoint."""

    def start(correct, from_="last.ckpt") -> None:
        trainer, module, data = make_run(tmp_path, stages=STAGES, max_epochs=4)
        staged = next(callback for callback in trainer.callbacks if hasattr(callback, "stages"))
        staged.stages = correct(staged.stages)
        path = tmp_path / "checkpoints" / from_
        trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)

    trainer, module, data = make_run(tmp_path, stages=STAGES, max_epochs=4)
    trainer.fit(module, datamodule=data)
    return start


def handed_over(folder) -> dict:
    return json.loads((folder / "compact" / "report.json").read_text())


def left(folder) -> float:
    report = handed_over(folder)
    return report["compact"]["macs"] / report["dense"]["macs"]


@pytest.mark.parametrize(
    ("place", "changed", "words", "back"),
    [
        (0, {"score": "magnitude"}, "channels at epoch 1 is done, with score=proxy, and now with score=", "dense.ckpt"),
        (1, {"keep": 0.3}, "mid at epoch 2 is done, with keep=0.4, and now with keep=0.3", "1-channels.ckpt"),
    ],
)
def test_a_finished_run_refuses_another_stage_and_names_the_way_back(tmp_path, again, place, changed, words, back):
    def corrected(stages):
        return tuple(replace(stage, **changed) if place == at else stage for at, stage in enumerate(stages))

    with pytest.raises(InputError, match=f"stage {re.escape(words)}") as refused:
        again(corrected)
    assert f"resume from {tmp_path / 'checkpoints' / back}" in str(refused.value) and "\n" not in str(refused.value)
    first = handed_over(tmp_path)
    again(corrected, back)
    assert handed_over(tmp_path)["run"] != first["run"]
    assert (left(tmp_path) < 0.35) is ("keep" in changed)
    assert [json.loads((folder / "report.json").read_text())["run"] for folder in tmp_path.glob("compact-*")] == (
        [] if place else [first["run"]]  # a run from the dense network on is another
    )


def test_a_finished_run_refuses_a_stage_more_and_a_stage_less(again):
    with pytest.raises(InputError, match="mid at epoch 2 is done, .* now left out; resume from .*1-channels.ckpt"):
        again(lambda stages: stages[:1])
    with pytest.raises(InputError, match="stage planes at epoch 3 was not done"):
        again(lambda stages: (*stages, ChannelStage(0.3, 3, "planes")))
