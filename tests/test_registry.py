"""What is registered is found by its name, what is not by its import path, and the lists show it."""

import pytest
from rich.cells import cell_len

from lit_prune.cli.listing import choices
from lit_prune.errors import InputError
from lit_prune.registry import Kinds, Named, Registry
from lit_prune.replace import Replacement, find_stand_in
from lit_prune.scores import SCORES
from lit_prune.structure.budgets import find_budget
from lit_prune.task import find_task
from lit_prune.train.stages import ChannelStage

OWN = """
from lit_prune.replace.fitting import Constant
from lit_prune.structure.budgets import Params
from lit_prune.task import Unlabelled

class Bytes(Params):
    pass

class Means(Constant):
    pass

class Silent(Unlabelled):
    pass
"""
FINDERS = {"Bytes": find_budget, "Means": find_stand_in, "Silent": find_task}


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "somebodys_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("name", FINDERS)
def test_a_class_of_ones_own_goes_by_its_import_path(own, name):
    assert type(FINDERS[name](f"somebodys_own:{name}")).__name__ == name


@pytest.mark.parametrize("name", FINDERS)
def test_a_class_of_another_kind_is_refused_in_one_line(own, name):
    with pytest.raises(InputError, match="give a") as raised:
        FINDERS[name]("builtins:dict")
    assert "\n" not in str(raised.value)


def test_a_stage_takes_both_by_import_path(own):
    stage = ChannelStage(0.5, budget="somebodys_own:Bytes", replace="somebodys_own:Means")
    assert find_stand_in(stage.replace).name == "somebodys_own:Means"
    find_stand_in(stage.replace).check(Replacement())


def test_two_things_of_one_name_are_refused():
    names: Registry[int] = Registry("colour")
    names.add("red", 1)
    with pytest.raises(ValueError, match="colour: two things are named 'red'"):
        names.add("red", 2)
    with pytest.raises(ValueError, match="colour: two things are named 'red'"):
        names["red"] = 2
    with pytest.raises(ValueError, match="colour: two things are named 'red'"):
        names.update(red=2)
    assert names["red"] == 1


def test_a_class_that_is_written_again_takes_its_own_place_and_another_is_refused():
    classes = Kinds("colour", Named)
    for _ in range(2):
        exec(
            "@register('mine')\nclass Mine(Named):\n    pass",
            {"register": classes.register, "Named": Named, "__name__": "cell", "__module__": "cell"},
        )
    assert len(classes) == 1 and type(classes.make("mine")).__name__ == "Mine"
    with pytest.raises(ValueError, match="two things are named 'mine'"):
        classes.register("mine")(type("Other", (Named,), {}))


def test_what_is_no_class_is_refused_before_it_is_called():
    with pytest.raises(InputError, match="give a subclass of"):
        find_budget("lit_prune.structure.budgets:find_budget")


def test_choices_list_every_registry(capsys):
    choices()
    shown = capsys.readouterr().out
    for name in ("macs", "refit", "depthwise convolution", "residual_stages", "segmentation", "DigitsData", "collapse"):
        assert name in shown


def test_choices_break_no_name_at_80_columns_and_say_what_a_score_costs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    choices(["scores", "backbones"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= 80
    names = {line.split()[0] for line in lines if line.strip() and line[:2].strip()}
    assert set(SCORES) <= names
    assert any("cmr_logit" in line and "local, from activations." in line for line in lines)
