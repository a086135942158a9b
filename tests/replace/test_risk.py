from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_prune.errors import InputError
from lit_prune.lab.reduce.remainder import CROSS_ENTROPY, hessian_lipschitz, remainder_bound, spectral_norm
from lit_prune.measurement.passes import collect
from lit_prune.replace import Replacement, measure_curvature, replace_mechanisms
from lit_prune.replace.curvature import CurvatureSums, HutchinsonSums
from lit_prune.replace.flow import observe
from lit_prune.replace.risk import RiskRows, RiskSamples, SoftmaxHead, solve_ridged, weighted_affine
from lit_prune.replace.stand_ins import affine_risks
from lit_prune.scores import score
from lit_prune.structure import Plan
from lit_prune.task import Classification

TASK = Classification()
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


def softmax_head(net, batches) -> SoftmaxHead:
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    values = torch.relu(net.body(images)).detach()
    return SoftmaxHead(values, labels, net.head.weight.detach(), net.head.bias.detach())


def test_closed_form_curvature_of_a_head_is_what_backward_passes_give(net, batches):
    closed, measured = softmax_head(net, batches).curvature(), measure_curvature(net, ["head"], batches)["head"]
    for name in ("gradient", "product", "hessian", "mixed", "power"):
        torch.testing.assert_close(getattr(closed, name), getattr(measured, name), **CLOSE)
    rows = softmax_head(net, batches).rows()
    other = collect(net, batches, RiskSamples(net, ["head"], TASK), TASK)["head"]
    for name in ("values", "gradient", "curvature"):
        torch.testing.assert_close(getattr(rows, name), getattr(other, name), **CLOSE)
    assert (rows.method, other.method) == ("exact", "gauss_newton")


def test_rows_of_a_head_are_the_second_derivatives_of_the_loss(net, batches):
    head = softmax_head(net, batches)
    values = head.values[:1].clone().requires_grad_()

    def loss(units):
        return F.cross_entropy(units @ head.weight.T + head.bias, head.labels[:1])

    hessian = torch.autograd.functional.hessian(loss, values)[0, :, 0]
    torch.testing.assert_close(head.rows().curvature[0], hessian.diagonal(), **CLOSE)
    torch.testing.assert_close(head.rows().gradient[0], torch.autograd.grad(loss(values), values)[0][0], **CLOSE)


def test_hutchinson_approaches_gauss_newton_on_a_piecewise_linear_network(net, batches):
    exact = measure_curvature(net, ["body", "head"], batches)
    estimated = collect(net, batches, HutchinsonSums(net, ["body", "head"], TASK, probes=400), TASK)
    for name, found in estimated.items():
        for field in ("hessian", "mixed"):
            expected = getattr(exact[name], field).diagonal()
            error = (getattr(found, field).diagonal() - expected).abs().max()
            assert error < 0.1 * expected.abs().max()
        torch.testing.assert_close(found.gradient, exact[name].gradient, **CLOSE)
    with pytest.raises(InputError, match="gauss_newton"):
        estimated["head"].joint_constants([0, 1])


def test_joint_constants_are_the_minimum_that_gradient_descent_finds(net, batches):
    curvature = softmax_head(net, batches).curvature()
    replaced = [1, 3, 4]
    found = curvature.joint_constants(replaced, ridge=1e-13)
    constants = curvature.constants()[replaced].clone().requires_grad_()
    hessian = curvature.hessian[replaced][:, replaced]
    wanted = curvature.mixed[replaced][:, replaced].sum(1) - curvature.gradient[replaced]
    optimiser = torch.optim.LBFGS([constants], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-16)

    def risk():
        optimiser.zero_grad()
        value = 0.5 * constants @ hessian @ constants - constants @ wanted
        value.backward()
        return value

    optimiser.step(risk)
    assert curvature.risk(replaced, found) == pytest.approx(float(risk()), rel=1e-7)
    assert curvature.risk(replaced, found) < curvature.risk(replaced, curvature.constants()[replaced])


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(4)
    values, gradient = (torch.randn(200, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    curvature = torch.rand(200, 8, generator=generator, dtype=torch.float64)
    return RiskRows(values, 0.1 * gradient, curvature, 200, "exact")


def test_weighted_affine_is_the_minimum_of_its_objective(rows):
    parents = torch.tensor([[2, 5, 6], [3, 5, 7]])
    fit = weighted_affine(rows, [0, 1], parents, ridge=0)
    for place, unit in enumerate((0, 1)):
        design = torch.cat([torch.ones(200, 1, dtype=torch.float64), rows.values[:, parents[place]]], 1)
        a, g, h = (part[:, unit] for part in (rows.values, rows.gradient, rows.curvature))
        normal, wanted = design.T @ (h[:, None] * design), design.T @ (h * a - g)  # the paper's normal equations
        theta = torch.linalg.solve(normal, wanted)
        torch.testing.assert_close(fit.offsets[place], theta[0], **CLOSE)
        torch.testing.assert_close(fit.coefficients[place], theta[1:], **CLOSE)
        change = design @ theta - a
        assert fit.risk[place] == pytest.approx(float((g * change + 0.5 * h * change**2).mean()))


def test_without_parents_the_constant_of_equation_7_comes_out(net, batches):
    head = softmax_head(net, batches)
    fit = weighted_affine(head.rows(), range(7), torch.zeros(7, 0, dtype=torch.int64), 0.0)
    live = head.rows().curvature.sum(0) > 1e-9
    torch.testing.assert_close(fit.offsets[live], head.curvature().constants()[live], **CLOSE)
    torch.testing.assert_close(fit.risk[live], head.curvature().scores()[live], **CLOSE)


def test_equation_7_repeated_ends_at_the_constant_of_least_loss(net, batches):
    """On a unit that is a constant already it is a Newton step; the oracle is a search over the real loss."""
    head = softmax_head(net, batches)
    place = torch.arange(7) == 2

    def with_constant(value) -> SoftmaxHead:
        return replace(head, values=torch.where(place, value, head.values))

    def loss(value) -> float:
        moved = with_constant(value)
        return float(F.cross_entropy(moved.values @ head.weight.T + head.bias, head.labels))

    low, high = -50.0, 50.0
    for _ in range(200):  # the loss is convex in the constant
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    constant = head.curvature().constants()[2]
    for _ in range(8):
        constant = with_constant(constant).curvature().constants()[2]
    assert float(constant) == pytest.approx(low, abs=1e-5)
    near = with_constant(constant + 1e-3).curvature()  # equation 9 is what the step to the minimum changes
    assert float(near.scores()[2]) == pytest.approx(loss(constant) - loss(constant + 1e-3), rel=1e-2)


def test_curvature_without_gradients_is_weighted_least_squares_whose_constant_is_the_weighted_mean(net, batches):
    rows, curvature = softmax_head(net, batches).rows(), softmax_head(net, batches).curvature().without_gradient()
    mean = (rows.curvature * rows.values).sum(0) / rows.curvature.sum(0)
    torch.testing.assert_close(curvature.constants(), mean, **CLOSE)
    spread = 0.5 * (rows.curvature * (rows.values - mean) ** 2).mean(0)
    torch.testing.assert_close(curvature.scores(), spread, **CLOSE)
    torch.testing.assert_close(score(net, "cmr_curvature", batches)["body"], spread, **CLOSE)
    fit = weighted_affine(rows.without_gradient(), [0], torch.tensor([[2, 4]]), ridge=0)
    root = rows.curvature[:, :1].sqrt()
    design = torch.cat([torch.ones(len(root), 1).double(), rows.values[:, [2, 4]]], 1)
    theta = torch.linalg.lstsq(root * design, root * rows.values[:, :1]).solution[:, 0]
    torch.testing.assert_close(torch.cat([fit.offsets, fit.coefficients[0]]), theta, **CLOSE)


def test_more_parents_never_raise_the_affine_score(rows):
    risks = [affine_risks(rows, torch.ones(3, 8), parents, ridge=1e-12) for parents in (1, 3, 7)]
    assert (risks[1] <= risks[0] + 1e-12).all() and (risks[2] <= risks[1] + 1e-12).all()


@pytest.mark.cpu  # rows have come from the device when this is asked
@pytest.mark.parametrize("rule", ["pearson", "weighted_pearson", "random"])
def test_the_affine_score_does_not_change_where_the_reader_undoes_a_scale(rows, rule):
    torch.manual_seed(0)
    weight, scale = torch.randn(3, 8).double(), 10 ** torch.linspace(-2, 2, 8, dtype=torch.float64)
    scaled = RiskRows(rows.values * scale, rows.gradient / scale, rows.curvature / scale**2, 200, "exact")
    plain = affine_risks(rows, weight, 3, 0.1, rule)
    torch.testing.assert_close(affine_risks(scaled, weight / scale, 3, 0.1, rule), plain, **CLOSE)


def test_too_few_samples_and_singular_systems_are_told(rows):
    few = RiskRows(*(part[:3] for part in (rows.values, rows.gradient, rows.curvature)), 3, "exact")
    with pytest.raises(InputError, match="parents=4"):
        weighted_affine(few, [0], torch.tensor([[1, 2, 3, 4]]), 1e-4)
    twins = rows.values.clone()
    twins[:, 2] = twins[:, 1]
    fit = weighted_affine(RiskRows(twins, rows.gradient, rows.curvature, 200, "exact"), [0], torch.tensor([[1, 2]]), 0)
    assert fit.singular == 1 and fit.coefficients.isfinite().all()
    _, singular = solve_ridged(torch.eye(2, dtype=torch.float64)[None], torch.ones(1, 2, 1, dtype=torch.float64), 0)
    assert not singular.any()


@pytest.mark.parametrize("seed", range(6))
def test_remainder_of_the_risk_stays_under_its_bound(make_classifier, seed):
    net = make_classifier(seed)
    nn.init.normal_(net.head.weight, std=2.0)
    images, labels = torch.randn(50, 5, dtype=torch.float64), torch.randint(4, (50,))
    lipschitz = hessian_lipschitz(net, "head", observe(net, images[:1]), images)
    head = softmax_head(net, [(images, labels)])
    for constants in (head.curvature().constants(), head.values.mean(0), torch.full_like(head.values[0], 3.0)):
        bound = remainder_bound(lipschitz, head.values, constants)
        for unit in range(7):
            replaced = head.values.clone()
            replaced[:, unit] = constants[unit]
            rise = sum(
                sign * F.cross_entropy(values @ head.weight.T + head.bias, labels)
                for sign, values in ((1, replaced), (-1, head.values))
            )
            change = constants[unit] - head.values[:, unit]
            rows = head.rows()
            proxy = (rows.gradient[:, unit] * change + 0.5 * rows.curvature[:, unit] * change**2).mean()
            assert abs(rise - proxy) <= bound[unit] + 1e-12


def test_kappa_bounds_third_derivatives_of_log_sum_exp_and_is_reached():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 5, generator=generator, dtype=torch.float64) * 3
    direction = F.normalize(torch.randn(4000, 5, generator=generator, dtype=torch.float64), dim=1)
    p = logits.softmax(1)
    centred = direction - (p * direction).sum(1, keepdim=True)
    assert (p * centred**3).sum(1).abs().max() <= CROSS_ENTROPY
    share = 0.5 + 3**0.5 / 6
    pair = torch.tensor([1.0, -1.0]).double() / 2**0.5
    p = torch.tensor([share, 1 - share]).double()
    assert abs(float((p * (pair - p @ pair) ** 3).sum())) == pytest.approx(CROSS_ENTROPY)


def test_spectral_norm_is_the_largest_singular_value_and_additions_are_refused(tiny_net):
    torch.manual_seed(0)
    linear, conv = nn.Linear(6, 4), nn.Conv2d(2, 3, 3, padding=1)
    assert spectral_norm(linear, (6,), 1000) == pytest.approx(float(torch.linalg.matrix_norm(linear.weight, 2)), 1e-4)
    basis = torch.eye(2 * 5 * 5).view(-1, 2, 5, 5)
    matrix = F.conv2d(basis, conv.weight, padding=1).flatten(1)
    assert spectral_norm(conv, (2, 5, 5), 1000) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), 1e-3)
    image = torch.zeros(1, 3, 8, 8)
    flow = observe(tiny_net, image)
    with pytest.raises(InputError, match="'conv2'"):
        hessian_lipschitz(tiny_net, "conv2", flow, image)
    assert hessian_lipschitz(tiny_net, "head", flow, image).shape == (6,)


@pytest.mark.parametrize("settings", [
    Replacement(objective="loss"), Replacement(objective="joint_loss"), Replacement(objective="curvature"),
    Replacement(objective="loss", curvature="hutchinson"),
])  # fmt: skip
def test_constants_by_loss_are_folded_in_a_whole_network(net, batches, settings):
    plan = Plan(keep_channels={"body": (0, 2, 5, 6)}, sizes={"body": 7})
    reduced = replace_mechanisms(net, plan, batches, "constant", torch.zeros(1, 5).double(), settings=settings)
    estimated = settings.curvature == "hutchinson"
    measure = HutchinsonSums if estimated else CurvatureSums
    curvature = collect(net, batches, measure(net, ["head"], TASK), TASK)["head"]
    curvature = curvature.without_gradient() if settings.objective == "curvature" else curvature
    joint = settings.objective == "joint_loss"
    constants = curvature.joint_constants([1, 3, 4]) if joint else curvature.constants()[[1, 3, 4]]
    values = torch.relu(net.body(batches[0][0]))
    values[:, [1, 3, 4]] = constants
    torch.testing.assert_close(reduced.model(batches[0][0]), net.head(values), rtol=0, atol=1e-10)
    assert reduced.report["layers"]["head"]["curvature"] == curvature.method


def test_objectives_that_a_kind_does_not_have_are_refused(net, batches):
    plan, example = Plan(keep_channels={"body": (0, 2)}, sizes={"body": 7}), torch.zeros(1, 5).double()
    for kind, settings in (
        ("affine", Replacement(objective="joint_loss")),
        ("refit", Replacement(objective="loss")),
        ("affine", Replacement(objective="loss", curvature="hutchinson")),
    ):
        with pytest.raises(InputError, match="objective|curvature"):
            replace_mechanisms(net, plan, batches, kind, example, settings=settings)
    with pytest.raises(InputError, match="has no loss"):
        unlabelled = [(images, None) for images, _ in batches]
        replace_mechanisms(net, plan, unlabelled, "constant", example, settings=Replacement(objective="loss"))
