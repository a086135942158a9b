"""The examples run, with small settings."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))


@pytest.mark.slow
def test_a_timm_network_with_mixup_and_one_cycle_is_cut_and_trains_on(tmp_path):
    import timm_mixup

    figures = timm_mixup.main(["--epochs", "3", "--images", "128", "--folder", str(tmp_path)])
    assert {"dense", "after_surgery", "after_repair"} <= figures.keys()
    assert all(0 <= value <= 1 for value in figures.values())
