import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_prune.replace import Replacement, replace_mechanisms
from lit_prune.replace.flow import observe
from lit_prune.replace.patches import PositionSample, input_rows, output_rows
from lit_prune.replace.regression import PairSums, solve_held_out
from lit_prune.replace.rows import Rows
from lit_prune.replace.walk import watching
from lit_prune.structure import Plan, apply_plan
from lit_prune.task import Unlabelled

IMAGE = torch.zeros(1, 3, 6, 6, dtype=torch.float64)


class Block(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(5, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(5)
        self.in_place = in_place

    def forward(self, trunk):
        values = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(trunk)))))
        if self.in_place:
            values += trunk
            return torch.relu_(values)
        return torch.relu(trunk + values)


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.first, self.second = Block(False), Block(True)
        self.head = nn.Linear(5, 3)

    def forward(self, images):
        return self.head(self.second(self.first(torch.relu(self.stem(images)))).mean((2, 3)))


@pytest.fixture
def trunk():
    torch.manual_seed(3)
    net = Trunk()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
    return net.double().eval()


@pytest.fixture
def batches():
    torch.manual_seed(4)
    return [(torch.randn(20, 3, 6, 6, dtype=torch.float64), torch.zeros(20)) for _ in range(3)]


PLAN = Plan(
    keep_channels={"first.conv1": (0, 1, 3, 5), "second.conv1": (1, 2, 4)},
    sizes={"first.conv1": 6, "second.conv1": 6},
)


def test_passes_wait_at_the_addition_that_reads_a_layer_and_in_front_of_others(trunk):
    flow = observe(trunk, IMAGE)
    stops = flow.stops(["first.conv1", "first.conv2", "second.conv2", "head"])
    assert [(stop.layer, stop.norm, stop.joined) for stop in stops] == [
        ("first.conv1", "first.bn1", False),
        ("first.conv2", "first.bn2", True),
        ("second.conv2", "second.bn2", True),
        ("head", "", False),
    ]


def test_of_two_layers_that_one_addition_reads_only_the_last_waits_there():
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.projection, self.both = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, images):
            total = self.norm(self.branch(images)) + self.projection(images)
            seen_twice = self.both(total)
            return seen_twice + seen_twice.relu()

    stops = observe(Joined().eval(), torch.zeros(1, 3, 4, 4)).stops(["branch", "projection", "both"])
    assert [(stop.layer, stop.joined) for stop in stops] == [("branch", False), ("projection", True), ("both", False)]


def test_one_waiting_pass_solves_what_layer_by_layer_passes_solve(trunk, batches):
    images = torch.cat([batch for batch, _ in batches])
    settings = Replacement(ridge=1e-9, clipped=False, scope="consumers")
    reduced = replace_mechanisms(trunk, PLAN, batches, "refit", IMAGE, settings=settings).model
    naive = apply_plan(trunk, PLAN, IMAGE)
    seen = {}
    for name in ("first", "second"):
        block, original = naive.get_submodule(name), trunk.get_submodule(name)
        seen.clear()
        hooks = [
            block.conv2.register_forward_pre_hook(lambda m, args: seen.update(u=args[0])),
            block.register_forward_pre_hook(lambda m, args: seen.update(shortcut=args[0].clone())),
            original.conv2.register_forward_hook(lambda m, args, z: seen.update(z=z)),
            original.register_forward_pre_hook(lambda m, args: seen.update(trunk=args[0].clone())),
        ]
        with torch.no_grad():
            naive(images), trunk(images)
            scale = original.bn2.weight * (original.bn2.running_var + original.bn2.eps).rsqrt()
            target = seen["z"] + (seen["trunk"] - seen["shortcut"]) / scale[:, None, None]
            rows = input_rows(block.conv2, seen["u"], None)
            design = torch.cat([rows, torch.ones(len(rows), 1)], 1)
            solution = torch.linalg.lstsq(design, target.permute(0, 2, 3, 1).flatten(0, 2)).solution.T
            block.conv2.weight.copy_(solution[:, :-1].reshape(block.conv2.weight.shape))
            block.bn2.running_mean -= solution[:, -1]
        for hook in hooks:
            hook.remove()
        found = reduced.get_submodule(name)
        torch.testing.assert_close(found.conv2.weight, block.conv2.weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.bn2.running_mean, block.bn2.running_mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(reduced(images), naive(images), rtol=0, atol=1e-5)


def test_a_reader_of_512_maps_is_solved_as_least_squares_on_all_rows_at_once_solves_it():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 512, 3, padding=1), nn.ReLU(), nn.Conv2d(512, 48, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 3)).double().eval()
    batches = [(torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.zeros(5)) for _ in range(5)]
    kept = tuple(range(0, 512, 4))  # 1,152 columns against 1,600 rows, streamed in five parts
    plan = Plan(keep_channels={"0": kept}, sizes={"0": 512})
    settings = Replacement(ridge=1e-12, held_out=0.0, clipped=False)
    found = replace_mechanisms(net, plan, batches, "refit", torch.zeros(1, 3, 8, 8).double(), settings=settings).model
    with torch.no_grad():
        maps = net[:2](torch.cat([images for images, _ in batches]))
        rows = F.unfold(maps[:, kept], 3, padding=1).mT.flatten(0, 1)
        target = net[2](maps).permute(0, 2, 3, 1).flatten(0, 2)
    solution = torch.linalg.lstsq(torch.cat([rows, torch.ones(len(rows), 1).double()], 1), target).solution.T
    torch.testing.assert_close(found[2].weight.flatten(1), solution[:, :-1], rtol=0, atol=1e-8)
    torch.testing.assert_close(found[2].bias, solution[:, -1], rtol=0, atol=1e-8)


def test_the_order_of_batches_does_not_matter(trunk, batches):
    settings = Replacement(ridge=1e-6)
    one = replace_mechanisms(trunk, PLAN, batches, "refit", IMAGE, settings=settings)
    other = replace_mechanisms(trunk, PLAN, batches[::-1], "refit", IMAGE, settings=settings)
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(value, other.model.state_dict()[name], rtol=0, atol=1e-9)


def test_the_same_plan_is_refitted_to_the_same_function_after_units_are_rescaled(trunk, batches):
    """Units times factors in [0.01, 100], undone by their reader: the ridge is relative to each unit's own scale."""
    scaled = copy.deepcopy(trunk)
    with torch.no_grad():
        for block in (scaled.first, scaled.second):
            factors = torch.exp(torch.empty(6, dtype=torch.float64).uniform_(-4.6, 4.6))
            block.bn1.weight *= factors
            block.bn1.bias *= factors
            block.conv2.weight /= factors[:, None, None]
    images = batches[0][0]
    torch.testing.assert_close(scaled(images), trunk(images))
    one, other = (replace_mechanisms(net, PLAN, batches, "refit", task=Unlabelled()).model for net in (trunk, scaled))
    torch.testing.assert_close(other(images), one(images), rtol=1e-6, atol=1e-6)
    assert (one(images) - trunk(images)).abs().max() > 1e-3


def test_an_error_in_the_network_ends_all_waiting_passes(trunk, batches):
    class Fragile(Trunk):
        def forward(self, images):
            if len(images) == 20 and getattr(self, "armed", False):
                raise RuntimeError("broken network")
            return super().forward(images)

    net = Fragile().double().eval()
    net.load_state_dict(copy.deepcopy(trunk.state_dict()))
    net.armed = True
    with pytest.raises(RuntimeError, match="broken network"):
        replace_mechanisms(net, PLAN, batches, "refit", IMAGE)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


def test_streamed_sums_solve_the_ridge_problem():
    generator = torch.Generator().manual_seed(0)
    inputs = 3 + torch.randn(500, 7, generator=generator, dtype=torch.float64)
    targets = torch.randn(500, 2, generator=generator, dtype=torch.float64) + inputs[:, :2] - 5
    sums = PairSums.zeros(inputs[:50], targets[:50])
    for part in range(0, 500, 50):
        sums.add(inputs[part : part + 50], targets[part : part + 50])
    data = sums.covariance()
    fit = data.solve(0.1)
    u, z = inputs - inputs.mean(0), targets - targets.mean(0)
    penalty = 0.1 * u.square().mean(0) * 500
    expected = torch.linalg.solve(u.T @ u + torch.diag(penalty), u.T @ z).T
    torch.testing.assert_close(fit.weight, expected, rtol=0, atol=1e-10)
    residual = inputs @ fit.weight.T + fit.bias - targets
    assert data.error(fit) == pytest.approx(float(residual.square().sum() / z.square().sum()), rel=1e-9)


def test_float32_rows_agree_with_float64_sums():
    generator = torch.Generator().manual_seed(0)
    inputs = 100 + torch.randn(20_000, 9, generator=generator)
    targets = inputs[:, :3] * 0.5 + torch.randn(20_000, 3, generator=generator)
    pairs = [(inputs, targets), (inputs.double(), targets.double())]
    found = []
    for u, z in pairs:
        sums = PairSums.zeros(u[:100], z[:100])
        sums.add(u, z)
        found.append(sums.covariance())
    torch.testing.assert_close(found[0].inputs, found[1].inputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0].cross, found[1].cross, rtol=1e-5, atol=1e-5)


def test_held_out_rows_choose_a_strong_ridge_for_noise_and_a_weak_one_for_a_clean_signal():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(80, 30, generator=generator, dtype=torch.float64)
    noise = torch.randn(80, 1, generator=generator, dtype=torch.float64)
    for targets, strong in ((noise, True), (inputs[:, :1], False)):
        fitted = PairSums.zeros(inputs[:40], targets[:40])
        held_out = fitted.empty()
        fitted.add(inputs[:40], targets[:40])
        held_out.add(inputs[40:], targets[40:])
        fit, _ = solve_held_out(fitted, held_out)
        assert (fit.ridge >= 1e-2) == strong


@pytest.mark.parametrize(
    "options", [{}, {"padding": 1}, {"stride": 2, "padding": (2, 1)}, {"dilation": 2, "padding": "same"}]
)
def test_sampled_rows_are_the_patches_that_the_convolution_reads(options):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, (3, 2), bias=False, **options).double()
    inputs = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    outputs = layer(inputs)
    chosen = PositionSample(5, seed=1).draw(2, outputs[0, 0].numel())
    for positions in (None, chosen):
        rows = input_rows(layer, inputs, positions)
        torch.testing.assert_close(rows @ layer.weight.flatten(1).T, output_rows(layer, outputs, positions))


@pytest.mark.parametrize(("kind", "size"), [(nn.Conv1d, (11,)), (nn.Conv3d, (4, 5, 6))])
@pytest.mark.parametrize("options", [{}, {"padding": 1, "stride": 2}, {"dilation": 2, "padding": 2}])
def test_sampled_rows_of_one_and_three_dimensions(kind, size, options):
    torch.manual_seed(0)
    layer = kind(3, 4, 2, bias=False, **options).double()
    inputs = torch.randn(2, 3, *size, dtype=torch.float64)
    outputs = layer(inputs)
    chosen = PositionSample(4, seed=1).draw(2, outputs[0, 0].numel())
    for positions in (None, chosen):
        rows = input_rows(layer, inputs, positions)
        torch.testing.assert_close(rows @ layer.weight.flatten(1).T, output_rows(layer, outputs, positions))


def test_sampled_positions_are_seeded_distinct_and_in_range():
    draws = [PositionSample(5, seed=1).draw(4, 30) for _ in range(2)]
    assert torch.equal(*draws)
    assert all(len(set(row.tolist())) == 5 and max(row) < 30 for row in draws[0])
    assert PositionSample(30, seed=1).draw(4, 30) is None


def test_waiting_passes_keep_no_graph(trunk, batches):
    stops = {stop.layer: stop for stop in observe(trunk, IMAGE).stops(["first.conv2", "second.conv2"])}
    with watching(trunk, Unlabelled(), stops, before=False) as start:
        walk = start(batches[0][0])
        for layer in stops:
            seen = walk.advance(layer)
            assert not seen.inputs.requires_grad and not seen.output.requires_grad
        assert walk.advance() is None
        torch.testing.assert_close(walk.output, trunk(batches[0][0]).detach())


class Clipped(nn.Module):
    """One layer, its norm with a negative scale too, a shortcut, a clip."""

    def __init__(self, clip: nn.Module, joined: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1, bias=False)
        self.second = nn.Conv2d(6, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.short = nn.Conv2d(3, 4, 1)
        self.clip, self.joined = clip, joined

    def forward(self, images):
        values = self.norm(self.second(torch.tanh(self.first(images))))
        return self.clip(values + self.short(images) if self.joined else values)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("clip", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6()])
def test_behind_a_clip_only_what_it_lets_through_is_fitted(clip, joined):
    torch.manual_seed(7)
    net = Clipped(clip, joined).double().eval()
    net.norm.weight.data = torch.tensor([2.0, -3.0, 1.0, 4.0]).double()
    net.norm.running_var.fill_(0.02)
    batches = [(torch.randn(60, 3, 4, 4, dtype=torch.float64), None) for _ in range(4)]
    plan = Plan(keep_channels={"first": (0, 2, 3)}, sizes={"first": 6})
    settings = [Replacement(rows=10**6, clipped=clipped, scope="consumers") for clipped in (True, False)]
    models = [replace_mechanisms(net, plan, batches, "refit", IMAGE, settings=given).model for given in settings]
    images = torch.cat([images for images, _ in batches])
    flow = observe(net, IMAGE)
    stop = next(stop for stop in flow.stops(["second"]))
    assert stop.clip == (0.0, 6.0 if isinstance(clip, nn.ReLU6) else float("inf"))
    wanted = net(images)
    errors = [float((model(images) - wanted).detach().square().mean()) for model in models]
    assert errors[0] < 0.97 * errors[1]


def test_clips_are_seen_where_nothing_else_reads_the_value():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, images):
            first = self.a(images)
            second = self.b(torch.relu(first)) + first
            return torch.relu(second) + second

    flow = observe(Twice(), IMAGE.float())
    assert flow.clips == {}
    assert [addition.clip for addition in flow.additions] == [None, None]


def test_few_batches_wait_at_large_maps_and_all_at_small_ones(trunk, batches, monkeypatch):
    """The later ones start when maps have become small, through layers that are solved: nothing changes there."""
    settings = Replacement(ridge=1e-6)
    found = replace_mechanisms(trunk, PLAN, batches, "refit", IMAGE, settings=settings)
    monkeypatch.setattr("lit_prune.replace.side_by_side.LEAST_WAITING", 1)
    monkeypatch.setattr(
        "lit_prune.replace.side_by_side.WAITING", 2 * 8 * 20 * (5 + 3) * 8
    )  # bytes of two batches at the head
    fewer = replace_mechanisms(trunk, PLAN, batches, "refit", IMAGE, settings=settings)
    rows = {
        name: (layer["rows"], fewer.report["layers"][name]["rows"]) for name, layer in found.report["layers"].items()
    }
    assert rows["first.conv2"] == (60 * 36, 20 * 36) and rows["head"] == (60, 60)
    alone = replace_mechanisms(trunk, PLAN, batches[:1], "refit", IMAGE, settings=settings).model
    for name in ("first.conv2", "second.conv1", "second.conv2"):
        torch.testing.assert_close(fewer.model.get_submodule(name).weight, alone.get_submodule(name).weight)


def faint() -> nn.Sequential:
    """Two kept units nearly say the same; their small difference is the removed one, and a third carries some of it."""
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]]))
        net[1].weight.copy_(torch.tensor([[0.5, 0.5, 1.0]]))
    return net


@pytest.mark.parametrize("kind", ["affine", "refit"])
@pytest.mark.parametrize("towards", ["zero", "weights"])
def test_a_solution_that_bears_noise_reads_no_faint_differences(kind, towards):
    torch.manual_seed(0)
    net, batches = faint(), [torch.randn(200, 2, dtype=torch.float64) for _ in range(5)]
    plan = Plan(keep_channels={"0": (0, 1)}, sizes={"0": 3})
    weights, errors = [], []
    for noise in (0.0, 0.1):
        settings = Replacement(noise=noise, towards=towards, parents=None)
        small = replace_mechanisms(net, plan, batches, kind, settings=settings).model
        weights.append(float(small[1].weight.detach().abs().max()))
        hidden = small[0](batches[0])
        noisy = hidden + 0.1 * hidden.std(0) * torch.randn_like(hidden)
        errors.append(float((small[1](noisy) - net(batches[0])).var().detach()))
    assert weights[0] > 50 and weights[1] < 5
    assert errors[1] < 0.1 * errors[0]


def test_an_input_that_was_shut_off_is_not_read_and_one_that_was_scaled_down_is():
    """Both have a ten-thousandth of the others' spread; the second's weights make up for it."""
    torch.manual_seed(0)
    common = torch.randn(4096, 1, dtype=torch.float64)
    rows = torch.cat([torch.randn(4096, 6, dtype=torch.float64), 1e-4 * common, 1e-4 * common], 1)
    weight = torch.ones(1, 8, dtype=torch.float64)
    weight[0, 7] = 1e4
    wanted = rows @ weight.T
    power = weight.square().sum(0)
    for shut, scaled in ((6, 7), (7, 6)):
        order = [0, 1, 2, 3, 4, 5, shut, scaled]
        sums = PairSums.zeros(rows, wanted)
        sums.add(rows[:, order], wanted)
        fit = sums.covariance(power).solve(1e-4)
        assert fit.weight[0, 6].abs() < 10
        assert fit.weight[0, 7] == pytest.approx(1e4, rel=0.01)


@pytest.mark.parametrize("kept", [False, True])
def test_fewer_rows_than_inputs_are_solved_by_rows_as_by_moments(kept):
    torch.manual_seed(0)
    rows, wanted = torch.randn(20, 30, dtype=torch.float64) * torch.logspace(-2, 1, 30), torch.randn(20, 4).double()
    prior = torch.randn(4, 30, dtype=torch.float64) if kept else None
    power = torch.rand(30, dtype=torch.float64)
    found = []
    for parts in ([PairSums.zeros(rows, wanted) for _ in range(2)], [Rows(), Rows()]):
        parts[0].add(rows[:14], wanted[:14])
        parts[1].add(rows[14:], wanted[14:])
        fit, error = solve_held_out(parts[0], parts[1], (1e-6, 1e-2, 1.0), prior, power)
        targets = (parts[0] + parts[1]).retargeted()
        targets.add(rows, wanted.clamp(-0.5, 0.5))
        found.append((*vars(fit).values(), error, *vars(targets.covariance(power).solve(0.1, prior)).values()))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(torch.as_tensor(other), torch.as_tensor(mine))
