"""Measured figures: the shape of the measurement, not its value."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lit_prune import timing
from lit_prune.errors import InputError
from lit_prune.structure import compare_latencies, compare_profiles, cost, latency

TIMES = ("latency_spread_ms", "noisy")


class Counting(nn.Module):
    """Notes what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.calls: list[tuple] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls.append((tuple(images.shape), self.training, torch.is_grad_enabled()))
        return self.layer(images)


def test_passes_are_warmed_up_in_evaluation_mode_without_gradients(monkeypatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP", 3)
    model = Counting().train()
    assert compare_latencies([model], (4,), batch_size=5, repeats=2)[0] > 0
    assert model.calls == [((5, 4), False, False)] * 5  # three to warm up, two timed
    assert model.training


def test_profile_reports_the_keys_of_the_report_and_the_size_on_disk(build, tmp_path) -> None:
    model, images = build("convnet")
    figures = compare_profiles([model], images, [0.5])[0]
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    counted = cost(model, images)
    assert set(figures) == {
        "accuracy",
        "macs",
        "params",
        "latency_ms",
        "throughput",
        "throughput_batch",
        "bytes",
        *TIMES,
    }
    assert (figures["accuracy"], figures["macs"], figures["params"]) == (0.5, counted.macs, counted.params)
    assert figures["bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert figures["throughput"] > 0 and figures["latency_ms"] > 0


def test_the_batch_of_a_slow_network_is_as_large_as_it_takes_in_two_seconds(monkeypatch) -> None:
    def times(models, shape, batch_size=1, repeats=20):
        seen.append((batch_size, repeats))
        return [timing.Timing.of([0.15 * batch_size] * 3)]

    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(latency, "time_networks", times)
    monkeypatch.setattr(latency, "SINGLE", 60)
    figures = compare_profiles([Counting()], torch.zeros(1, 4), [None])[0]
    assert (figures["throughput_batch"], figures["throughput"]) == (8, pytest.approx(1 / 0.15))
    assert seen == [(1, 1), (1, 60), (8, latency.BATCHED)]


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(InputError, match="batch_size=0"):
        compare_latencies([Counting()], (4,), batch_size=0)
