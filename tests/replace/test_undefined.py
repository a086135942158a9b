"""NaN never passes as good: every use of calibration images names the batch or the layer that holds it."""

import pytest
import torch
from torch import nn

import lit_prune
from lit_prune.errors import InputError
from lit_prune.replace import STAND_INS

EXAMPLE = torch.randn(1, 3, 8, 8)
PLAN = lit_prune.Plan((), {"conv1": (0, 1, 2, 3)}, {"conv1": 8})


def batches(bad: int | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = [(torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 4) for _ in range(3)]
    if bad is not None:
        found[bad][0][5, 1, 3, 3] = torch.nan
    return found


def broken(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        net.conv2.weight[0, 0, 0, 0] = torch.nan
    return net


USES = {
    "measure": lambda net, data: lit_prune.measure(net, data),
    "score by data": lambda net, data: lit_prune.score(net, "taylor", data),
    "score by outputs": lambda net, data: lit_prune.score(net, "cmr_logit", data),
    "recalibrate": lambda net, data: lit_prune.recalibrate_batchnorm(net, data),
    "compress": lambda net, data: lit_prune.compress(net, data, keep=0.6),
    **{
        kind: lambda net, data, kind=kind: lit_prune.replace_mechanisms(net, PLAN, data, kind, example_input=EXAMPLE)
        for kind in STAND_INS
        if kind != "delete"
    },
}


@pytest.mark.parametrize("use", USES)
def test_one_nan_pixel_is_refused_and_its_batch_named(tiny_net, use):
    with pytest.raises(InputError, match="batch 1") as raised:
        USES[use](tiny_net, batches(1))
    assert "NaN" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("use", USES)
def test_a_network_with_nan_weights_is_refused(tiny_net, use):
    with pytest.raises(InputError, match="NaN"):
        USES[use](broken(tiny_net), batches())


@pytest.mark.parametrize("kind", STAND_INS)
def test_an_interchange_with_a_network_that_answers_nan_certifies_nothing(tiny_net, kind):
    reduced = lit_prune.replace_mechanisms(tiny_net, PLAN, batches(), kind, example_input=EXAMPLE)
    with torch.no_grad():
        reduced.model.head.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        lit_prune.interchange(tiny_net, reduced, batches(), example_input=EXAMPLE)
    with pytest.raises(InputError, match="NaN"):
        lit_prune.interchange(broken(tiny_net), reduced, batches(), example_input=EXAMPLE)
    with pytest.raises(InputError, match="NaN"):
        lit_prune.interchange(tiny_net, reduced, batches(0), example_input=EXAMPLE)
