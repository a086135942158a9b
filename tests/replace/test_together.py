import copy

import pytest
import torch
from torch import nn

from lit_prune.replace import Replacement, replace_mechanisms
from lit_prune.replace.segments import find_segments
from lit_prune.replace.together import Samples, solve_together
from lit_prune.structure import Plan, apply_plan, trace_groups

IMAGE = torch.zeros(1, 3, 8, 8)


class Gate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, values):
        return values * self.excite(torch.relu(self.squeeze(values.mean((2, 3), keepdim=True)))).sigmoid()


class Block(nn.Module):
    """An inverted bottleneck with a gate."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(width, 16, 1), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.gate = Gate(16)
        self.project = nn.Conv2d(16, width, 1)

    def forward(self, values):
        inner = torch.relu(self.norm(self.expand(values)))
        return torch.relu(values + self.project(self.gate(torch.relu_(self.depthwise(inner)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        return self.head(self.stage(torch.relu(self.stem(images))).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [torch.randn(16, 3, 8, 8) for _ in range(10)]


def test_samples_of_two_sizes_are_solved_for_together():
    torch.manual_seed(0)
    wanted, module = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    values = [(x, wanted(x).detach()) for x in (torch.randn(8, 3, size, size) for size in (6, 8, 6, 9))]
    fitted, held_out = samples(values), samples(values[:2])
    found = solve_together(module, fitted, held_out, passes=200, seed=0)
    assert found["after"] < 0.5 * found["before"]
    apart = [samples([pair for pair in values if pair[0].shape[2] == size]) for size in (6, 8, 9)]
    assert fitted.spread() == pytest.approx(sum(found.spread() for found in apart))


def samples(values):
    found = Samples()
    for inputs, wanted in values:
        found.add(inputs, wanted)
    return found


def plan_of(net, **kept):
    graph = trace_groups(net, IMAGE)
    keep = {name.replace("_", "."): tuple(places) for name, places in kept.items()}
    return Plan(keep_channels=keep, sizes={name: graph.by_name[name].size for name in keep}), graph


def segments_of(net, plan, graph):
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return find_segments(net, apply_plan(net, plan, IMAGE), plan, graph, IMAGE, names)


def test_a_block_with_its_gate_is_a_segment_and_a_chain_of_blocks_is_none(net):
    found = segments_of(net, *plan_of(net, stage_0_expand=range(9)))
    assert [segment.name for segment in found] == ["stage.0", "stage.1"]
    assert found[0].layers == tuple(
        sorted(f"stage.0.{name}" for name in ("expand", "depthwise", "gate.squeeze", "gate.excite", "project"))
    )
    assert all(segment.kept is None for segment in found)


def test_outputs_that_stay_are_those_of_the_trunk(net):
    kept = (0, 2, 3, 7)
    found = segments_of(net, *plan_of(net, stem=kept))
    assert [(segment.dim, segment.kept) for segment in found] == [(1, kept), (1, kept)]
    values = torch.randn(2, 8, 5, 5)
    assert torch.equal(found[0].left(values), values[:, list(kept)])


class Flat(nn.Module):
    """Two layers and no module around them: the network itself is the segment."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)

    def forward(self, images):
        return self.second(torch.relu(self.first(images)).mean((2, 3)))


def test_a_network_of_two_layers_is_a_segment_itself_and_gets_nearer():
    torch.manual_seed(5)
    net = Flat().eval()
    plan, graph = plan_of(net, first=(0, 1, 2, 4))
    assert [segment.name for segment in segments_of(net, plan, graph)] == [""]
    images, fresh = [torch.randn(16, 3, 8, 8) for _ in range(10)], torch.randn(200, 3, 8, 8)
    alone, together = (
        replace_mechanisms(net, plan, images, "refit", settings=Replacement(together=passes)).model
        for passes in (0, 40)
    )
    with torch.no_grad():
        errors = [float((small(fresh) - net(fresh)).square().mean()) for small in (alone, together)]
    assert errors[1] < 0.9 * errors[0]


def test_blocks_solved_together_are_nearer_on_images_that_were_not_seen(net, batches):
    kept = [0, 1, 3, 4, 6, 7]
    plan, _ = plan_of(net, stage_0_expand=range(8), stage_1_expand=range(8), stem=kept)
    torch.manual_seed(2)
    fresh = torch.randn(100, 3, 8, 8)
    errors = []

    def features(model):
        return model.stage(torch.relu(model.stem(fresh)))

    for passes in (0, 40):
        small = replace_mechanisms(net, plan, batches, "refit", settings=Replacement(together=passes))
        with torch.no_grad():
            errors.append(float((features(small.model) - features(net)[:, kept]).square().mean()))
    found = {name: entry["segment"] for name, entry in small.report["layers"].items() if "segment" in entry}
    assert {entry["name"] for entry in found.values()} == {"stage.0", "stage.1"}
    assert all(entry["after"] < entry["before"] for entry in found.values())
    assert errors[1] < 0.9 * errors[0]


def test_the_original_is_untouched_and_twice_is_the_same(net, batches):
    plan, _ = plan_of(net, stage_0_expand=range(8))
    before = copy.deepcopy(net.state_dict())
    both = [replace_mechanisms(net, plan, batches, "refit", settings=Replacement(together=3)).model for _ in range(2)]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    states = [model.state_dict() for model in both]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_parameters_stay_where_held_out_samples_are_not_served_better():
    torch.manual_seed(0)
    module, truth = (nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))
    truth.load_state_dict(module.state_dict())
    inputs = torch.randn(40, 5)
    with torch.no_grad():
        right = samples([(inputs, truth(inputs))])
    wrong = samples([(inputs, torch.randn(40, 4))])
    found = solve_together(module, wrong, right, 5, 0)
    assert found["before"] == found["after"] < 1e-9
    assert all(torch.equal(value, truth.state_dict()[name]) for name, value in module.state_dict().items())


class Root(nn.Module):
    """Its gradient is not a number."""

    def forward(self, values):
        return values + (0 * values).sqrt()


def test_parameters_stay_where_the_way_ends_in_nan():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), Root(), nn.Linear(8, 4))
    before = copy.deepcopy(module.state_dict())
    given = samples([(torch.randn(40, 5), torch.randn(40, 4))])
    found = solve_together(module, given, given, 2, 0)
    assert found["share"] == 0.0
    assert found["before"] == found["after"] > 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Tied(nn.Module):
    """Two blocks, one convolution of which is held by both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Block(), Block(), Block()
        self.second.project = self.first.project

    def forward(self, images):
        return self.third(self.second(self.first(images)))


def test_a_block_whose_layer_another_holds_too_is_left_alone():
    torch.manual_seed(0)
    net, image = Tied().eval(), torch.zeros(1, 8, 6, 6)
    graph = trace_groups(net, image)
    plan = Plan(keep_channels={"third.expand": tuple(range(9))}, sizes={"third.expand": 16})
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    found = find_segments(net, apply_plan(net, plan, image), plan, graph, image, names)
    assert [segment.name for segment in found] == ["third"]


@pytest.mark.parametrize("make", [nn.Linear, lambda i, o: nn.Conv2d(i, o, 3, padding=1)])
def test_rescaling_units_and_undoing_it_changes_nothing(make):
    torch.manual_seed(0)
    module = nn.Sequential(make(5, 8), nn.ReLU(), make(8, 4)).double()
    shape = (5,) if make is nn.Linear else (5, 6, 6)
    inputs = torch.randn(64, *shape, dtype=torch.float64)
    with torch.no_grad():
        wanted = module(inputs) + 0.3 * module(inputs.flip(0)).tanh()
    factors = torch.logspace(-2, 2, 8, dtype=torch.float64)[torch.randperm(8)]
    scaled = copy.deepcopy(module)
    with torch.no_grad():
        spread = factors.view(-1, *[1] * (module[0].weight.dim() - 1))
        scaled[0].weight *= spread
        scaled[0].bias *= factors
        scaled[2].weight /= factors.view(1, -1, *[1] * (module[2].weight.dim() - 2))
    given = samples([(inputs[:48], wanted[:48])]), samples([(inputs[48:], wanted[48:])])
    found = [solve_together(net, *given, 20, 0) for net in (module, scaled)]
    assert found[0]["after"] < found[0]["before"]
    with torch.no_grad():
        assert torch.allclose(module(inputs), scaled(inputs), rtol=1e-5, atol=1e-7)


def test_a_transposed_and_a_grouped_convolution_have_steps_of_the_shape_of_their_weights():
    torch.manual_seed(0)
    module = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3))
    inputs = torch.randn(32, 4, 5, 5)
    with torch.no_grad():
        wanted = module(inputs) * 1.3 + 0.2
    found = solve_together(module, samples([(inputs[:24], wanted[:24])]), samples([(inputs[24:], wanted[24:])]), 20, 0)
    assert found["after"] < 0.5 * found["before"]
