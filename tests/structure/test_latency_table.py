"""A budget of time by a table of layer shapes: the table is arithmetic, the plan suits what the device is quick at."""

import numpy as np
import pytest
import torch
from torch import nn

from lit_prune import make_plan
from lit_prune.errors import InputError
from lit_prune.structure import CostModel, apply_plan, latency_table, trace_groups
from lit_prune.structure.budgets import find_budget
from lit_prune.structure.latency_table import LayerTimes, levels_of, time_layers
from lit_prune.structure.layers import layer_type
from lit_prune.structure.runtimes import OnnxRuntime
from lit_prune.timing import Best


def steps(width: int) -> int:
    """A device that works on sixteen channels at once."""
    return -(-width // 16) * 16


class Made:
    """A runtime whose passes take `price(layer, values)`."""

    copies = 1

    def __init__(self, price):
        self.price = price

    def layers(self, modules, values):
        return self.price(modules[0], values)


@pytest.fixture
def times_are_told(monkeypatch):
    """Runs are the seconds that they take."""
    monkeypatch.setattr(latency_table, "best_times", lambda runs, seconds: [Best(float(run), 0.0) for run in runs])


def macs_of(layer: nn.Module, values: torch.Tensor) -> int:
    return layer_type(layer).count(layer, (values,), {}, layer(values)).macs


@pytest.mark.parametrize("name", ["convnet", "efficientnet"])
def test_a_table_of_what_is_known_is_the_known_at_every_level(build, times_are_told, name):
    """With multiply-adds for seconds the sum over layers is that of the network, whose joint widths vary freely."""
    model, images = build(name)
    graph = trace_groups(model, images)
    cost_model = CostModel.build(model, graph, images)
    table = time_layers(model, graph, images[:1], Made(macs_of))
    generator = np.random.default_rng(0)
    for _ in range(5):
        free = [
            generator.choice(levels_of(group.size)) if not group.protected else group.size for group in graph.groups
        ]
        assert table(np.array(free)) == pytest.approx(cost_model.macs(np.array(free)))


def test_between_levels_a_block_counts_whole_and_a_wider_layer_never_less():
    times = LayerTimes(np.array([16, 32, 64]), np.array([1]), np.array([[1.0], [2.0], [4.0]]), 0.0)
    rows = np.array([1, 0]), np.array([0, 1])
    table = latency_table.LatencyTable.build([(*rows, times)])
    found = [table(np.array([width])) for width in range(1, 65)]
    assert found == sorted(found) and found[0] == found[15] == 1.0 and found[63] == 4.0
    assert found[32] == found[39] == pytest.approx(2.5)  # 33 to 40: five blocks of eight


@pytest.fixture
def chain():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 48, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)).eval()


@pytest.fixture
def staircase(monkeypatch, times_are_told):
    """A device whose layers take time by blocks of sixteen, and whose networks take as much again for their calls."""

    def price(layer, values):
        read = values.shape[1]
        return macs_of(layer, values) * steps(layer.weight.shape[0]) * steps(read) / (layer.weight.shape[0] * read)

    def whole(models, images, runtime):
        return [overhead + layers_of(model, images) for model in models]

    def layers_of(model, images):
        total, values = 0.0, images
        for module in model:
            total += price(module, values) if hasattr(module, "weight") and module.weight.dim() > 1 else 0.0
            values = module(values)
        return total

    monkeypatch.setattr("lit_prune.structure.runtimes.Eager.layers", lambda self, modules, x: price(modules[0], x))
    monkeypatch.setattr("lit_prune.structure.latency.best_latencies", whole)
    overhead = 5e6
    return layers_of


def test_a_plan_by_the_table_takes_the_widths_that_the_device_is_quick_at(chain, staircase):
    image = torch.zeros(1, 3, 16, 16)
    ranks = {name: torch.rand(module.out_channels) for name, module in chain.named_children() if name in "035"}
    by_time, by_macs = (make_plan(chain, ranks, image, budget=kind, keep=0.6) for kind in ("latency", "macs"))
    assert by_time.notes["met"] and by_time.notes["achieved"] <= 0.6
    assert by_time.notes["predicted"] == pytest.approx(by_time.notes["achieved"], abs=0.05)
    # What is left of a width beyond a block is free: time does not fall when it goes.
    seconds = [staircase(apply_plan(chain, plan, image), image) for plan in (by_time, by_macs)]
    assert by_time.notes["macs_achieved"] / seconds[0] > by_macs.notes["achieved"] / seconds[1]


def test_layers_that_vary_between_passes_are_told(chain, staircase, monkeypatch):
    monkeypatch.setattr(latency_table, "best_times", lambda runs, seconds: [Best(float(run), 0.4) for run in runs])
    ranks = {"0": torch.rand(64), "3": torch.rand(64)}
    with pytest.warns(UserWarning, match=r"single layers took up to 40% longer"):
        make_plan(chain, ranks, torch.zeros(1, 3, 16, 16), budget="latency", keep=0.7)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(6, 4, 3, stride=2, padding=1), (2, 6, 9, 9)),
        (nn.Conv2d(6, 6, (3, 1), padding=(1, 0), groups=6), (1, 6, 5, 5)),
        (nn.Conv1d(4, 5, 3, dilation=2), (2, 4, 12)),
        (nn.Linear(6, 5), (2, 7, 6)),
    ],
)
def test_onnx_runtime_runs_a_layer_of_the_same_shape(layer, shape):
    pytest.importorskip("onnxruntime")
    values = torch.randn(shape)
    (output,) = OnnxRuntime().layers([layer], values)()
    assert output.shape == layer(values).shape


def test_onnx_runtime_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("lit_prune.structure.runtimes.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"budget=latency_onnx: onnx, onnxscript, onnxruntime missing; pip"):
        find_budget("latency_onnx").check(torch.zeros(1, 3, 8, 8))


def test_onnx_runtime_exports_the_dense_network_once(chain, monkeypatch, tmp_path):
    """Every trial is compared with it."""
    exported = []

    def export(model, shape, to, formats):
        exported.append(model)
        (tmp_path / "model.onnx").write_bytes(b"")
        return {"onnx": {"file": tmp_path / "model.onnx"}}

    monkeypatch.setattr("lit_prune.export.export_module", export)
    monkeypatch.setattr("lit_prune.structure.runtimes.onnx_session", lambda model, values: lambda: None)
    monkeypatch.setattr(OnnxRuntime, "missing", lambda self: [])
    quantity = find_budget("latency_onnx")
    smaller = [nn.Conv2d(3, width, 3).eval() for width in (4, 5)]
    for small in smaller:
        quantity.compare([chain, small], torch.zeros(1, 3, 16, 16))
    assert exported == [chain, *smaller]
