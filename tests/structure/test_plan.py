"""Plans survive storage unchanged and damaged ones are refused in one line."""

import dataclasses
import json

import numpy as np
import pytest

from lit_prune.errors import InputError
from lit_prune.structure import Plan

PLAN = Plan(("layer1.1",), {"conv1": (0, 2, 3)}, {"conv1": 5}, {"met": True, "requested": 0.5, "keep": {"a": 1}})


def test_round_trip_through_dict_json_and_file(tmp_path) -> None:
    assert Plan.from_dict(PLAN.to_dict()) == PLAN
    assert Plan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN


def test_values_are_plain_whatever_they_were_made_from() -> None:
    plan = Plan(["b"], {"g": np.array([1, 2])}, {"g": np.int64(3)}, {"x": np.float32(0.5), "y": (1, 2)})
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict()
    assert all(type(unit) is int for unit in plan.keep_channels["g"]) and plan.notes == {"x": 0.5, "y": [1, 2]}


def test_removed_is_the_complement_of_kept() -> None:
    assert PLAN.removed("conv1") == [1, 4]
    assert PLAN.removed("another") == []
    assert not PLAN.removes_nothing and Plan((), {"g": (0, 1)}, {"g": 2}).removes_nothing


def test_plan_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.drop_blocks = ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "something"}, "no plan of format"),
        ({"version": 99}, "no plan of format"),
        ({"sizes": {}}, "different groups"),
        ({"keep_channels": {"conv1": [0, 7]}}, "ascending units"),
        ({"keep_channels": {"conv1": [2, 0]}}, "ascending units"),
        ({"keep_channels": {"conv1": []}}, "at least one"),
        ({"keep_channels": {"conv1": [0, 1.5]}}, "damaged"),
        ({"keep_channels": {"conv1": 3}}, "damaged"),
        ({"drop_blocks": "layer1"}, "damaged"),
        ({"drop_blocks": [1]}, "damaged"),
        ({"notes": None}, "damaged"),
    ],
)
def test_damaged_plans_are_refused_in_one_line(change: dict, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        Plan.from_dict(PLAN.to_dict() | change, "plan.json")
    assert "\n" not in str(caught.value) and "plan.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "\x80"])
def test_files_that_are_no_plan_are_refused(tmp_path, text: str) -> None:
    (tmp_path / "plan.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="plan"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(InputError, match="cannot be read"):
        Plan.load(tmp_path / "missing.json")
