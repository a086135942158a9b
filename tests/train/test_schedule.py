import math

import pytest
import torch

from lit_prune.train.schedule import PhaseCosine


def rates(warmup: float, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = PhaseCosine(optimizer, warmup=warmup)
    schedule.begin(steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_cosine_runs_from_the_full_rate_to_nearly_zero():
    seen = rates(0.0, 20)
    assert seen == pytest.approx([1 + math.cos(math.pi * step / 20) for step in range(20)])


def test_warm_up_rises_to_the_full_rate_and_the_rest_falls():
    seen = rates(0.25, 20)
    assert seen[:5] == sorted(seen[:5]) and seen[5:] == sorted(seen[5:], reverse=True)
    assert max(seen) == pytest.approx(2.0) and seen[0] > 0


def test_state_restores_the_position():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    first = PhaseCosine(optimizer)
    first.begin(10)
    for _ in range(4):
        optimizer.step()
        first.step()
    second = PhaseCosine(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0))
    second.load_state_dict(first.state_dict())
    second.begin(10)
    assert second.get_lr() == first.get_lr()
