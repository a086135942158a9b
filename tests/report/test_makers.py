"""The commands that the page names for what a run does not have."""

import shlex

import pytest

from lit_prune.cli.prune_cli import build_cli
from lit_prune.report.page import MAKERS, SAME

COMMANDS = sorted({command for _, command, said in MAKERS if said == SAME})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_understood_with_the_recipe_of_the_run(command, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lit-prune"])
    program, *words = shlex.split(command.format(run=tmp_path))
    assert program == "lit-prune"
    build_cli([*words, "-c", "demo"], run=False)
