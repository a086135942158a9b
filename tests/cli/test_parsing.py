"""Errors of the parser: the innermost cause in one line, whatever the exceptions were raised from."""

import pytest

from lit_prune.cli.main import main
from lit_prune.cli.parsing import causes
from lit_prune.errors import InputError


def test_a_ring_of_exceptions_ends_with_each_of_them_once():
    first, second, third = ValueError("1"), TypeError("2"), InputError("3")
    first.__cause__, second.__context__, third.__cause__ = second, third, first
    assert list(causes(first)) == [first, second, third]
    assert list(causes(None)) == []


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("class_path: ChannelStag, init_args: {keep: 0.5}", ["ChannelStag"]),
        (
            "class_path: lit_prune.ChannelStage, init_args: {keep: 0.5, budget: mac}",
            ["stage channels", "budget='mac'", "macs"],
        ),
        ("class_path: lit_prune.ChannelStage, init_args: {keep: half}", ["keep", "half"]),
        ("class_path: lit_prune.ChannelStage, init_args: {keep: 0.5, keeep: 3}", ["keeep"]),
    ],
)
def test_a_typing_error_inside_a_stage_is_one_line_that_names_it(tmp_path, capsys, stage, words):
    options = [
        "--data=lit_prune.data.DigitsData",
        "--model.backbone=cifar_resnet20",
        "--trainer.callbacks+=lit_prune.StagedPruning",
        f"--trainer.callbacks.stages=[{{{stage}}}]",
    ]
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *options, "--run_dir", str(tmp_path / "run")])
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and len(lines) == 1
    assert all(word in lines[0] for word in words), lines
