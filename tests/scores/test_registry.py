"""A score is one function: registered, given as it is, or named by where it lies."""

import sys
import types

import pytest
import torch

from lit_prune.errors import InputError
from lit_prune.scores import SCORES, find_score, register_score, score


def first_kept(evidence):
    """The first channels of each layer, before the later ones."""
    return {name: -torch.arange(len(layer.weight), dtype=torch.float64) for name, layer in evidence.layers.items()}


@pytest.fixture
def own_module(monkeypatch):
    module = types.ModuleType("own_scores")
    module.first_kept, module.number = first_kept, 3
    monkeypatch.setitem(sys.modules, "own_scores", module)


def batches():
    return [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)]


@pytest.mark.usefixtures("own_module")
def test_a_function_of_ones_own_ranks_as_one_of_the_table(tiny_net):
    given = score(tiny_net, first_kept, batches())
    named = score(tiny_net, "own_scores:first_kept", batches())
    register_score("baseline", "weights", name="first_kept_of_a_test")(first_kept)
    try:
        registered = score(tiny_net, "first_kept_of_a_test", batches())
    finally:
        del SCORES["first_kept_of_a_test"]
    for layer, values in given.items():
        assert torch.equal(values, named[layer]) and torch.equal(values, registered[layer])
        assert values.argmax() == 0


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize("name", ["own_scores:none", "no_such_module:f", "own_scores:number", ":f", "own_scores:"])
def test_a_place_without_a_function_is_one_line(name):
    with pytest.raises(InputError, match=r"give package\.module:function"):
        find_score(name)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="score: two things are named 'random'"):
        register_score("baseline", name="random")(first_kept)


def test_the_table_is_the_registry():
    assert find_score("hybrid").name == "hybrid"
