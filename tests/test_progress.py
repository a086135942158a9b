import pytest
from rich.console import Console

from lit_prune.progress import looking_on, watched


@pytest.mark.parametrize("looked_on", [False, True])
def test_bars_show_where_somebody_looks_on_and_the_items_are_the_same(looked_on, monkeypatch, capsys):
    monkeypatch.setattr(Console, "is_terminal", property(lambda console: looked_on))
    assert list(watched(iter("abc"), "outside")) == list("abc")
    with looking_on():
        assert list(watched(iter("abc"), "layers solved", 3)) == list("abc")
    said = capsys.readouterr()
    assert said.out == ""
    assert ("layers solved" in said.err) == looked_on
    assert "outside" not in said.err
