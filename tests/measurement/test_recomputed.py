"""Networks that recompute parts of themselves in the backward pass (gradient checkpointing)."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import lit_prune


class Recomputing(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x):
        x = self.first(x).relu()
        if self.reentrant is None:
            x = self._part(x)
        else:
            x = torch.utils.checkpoint.checkpoint(self._part, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))

    def _part(self, x):
        return x + self.second(x).relu()


@pytest.mark.parametrize("reentrant", [True, False])
def test_compress_gives_what_it_gives_without(reentrant):
    torch.manual_seed(0)
    plain, batches = Recomputing(), [torch.randn(64, 3, 8, 8)]
    recomputing = copy.deepcopy(plain)
    recomputing.reentrant = reentrant
    expected, found = (lit_prune.compress(network, batches, keep=0.6)[0] for network in (plain, recomputing))
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=0)


def test_training_recomputes_as_before():
    network, calls = Recomputing(False), []
    lit_prune.measure(network, [torch.randn(8, 3, 8, 8)])
    network.second.register_forward_hook(lambda *_: calls.append(1))
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    assert len(calls) == 2
