import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_prune.errors import InputError
from lit_prune.lab.reduce.diagnostics import kept_jaccard, rescaling_stress
from lit_prune.models import build_backbone
from lit_prune.replace import measure_curvature
from lit_prune.scores import score


def head_derivatives(net, batches):
    """Values a [n, C], gradients g [n, C] and Hessians H [n, C, C] of a linear softmax head, in closed form."""
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    values = torch.relu(net.body(images)).detach()
    weight, p = net.head.weight.detach(), net.head(values).softmax(1).detach()
    gradient = (p - F.one_hot(labels, p.shape[1])) @ weight
    spread = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return values, gradient, weight.T @ spread @ weight


def test_curvature_of_a_linear_softmax_head_is_its_hessian(net, batches):
    values, gradient, hessian = head_derivatives(net, batches)
    found = measure_curvature(net, ["head"], batches)["head"]
    torch.testing.assert_close(found.hessian, hessian.mean(0))
    torch.testing.assert_close(found.gradient, gradient.mean(0))
    h = hessian.diagonal(dim1=1, dim2=2)
    best = ((h * values).sum(0) - gradient.sum(0)) / h.sum(0)
    torch.testing.assert_close(found.constants(), best)
    n = len(values)
    scores = (h * values**2).sum(0) / (2 * n) - (gradient * values).sum(0) / n
    scores -= ((h * values).sum(0) - gradient.sum(0)) ** 2 / (2 * n * h.sum(0))
    torch.testing.assert_close(found.scores(), scores)
    torch.testing.assert_close(score(net, "cmr_const", batches)["body"], scores)


def test_joint_constants_minimise_the_joint_risk(net, batches):
    values, gradient, hessian = head_derivatives(net, batches)
    found = measure_curvature(net, ["head"], batches)["head"]
    replaced = [1, 2, 5]
    joint = found.joint_constants(replaced, ridge=1e-12)
    part = hessian[:, replaced][:, :, replaced]
    wanted = (part @ values[:, replaced, None])[..., 0].mean(0) - gradient[:, replaced].mean(0)
    torch.testing.assert_close(joint, torch.linalg.solve(part.mean(0), wanted), rtol=1e-5, atol=1e-6)
    assert found.risk(replaced, joint) <= found.risk(replaced, found.constants()[replaced])


def test_risk_is_the_second_order_change_of_the_loss(net, batches):
    found = measure_curvature(net, ["head"], batches)["head"]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    values = torch.relu(net.body(images)).detach()
    with torch.no_grad():
        net.head.weight[:, 3] *= 1e-3  # small effect: the expansion holds
    found = measure_curvature(net, ["head"], batches)["head"]
    replaced = values.clone()
    replaced[:, 3] = found.constants()[3]
    rise = F.cross_entropy(net.head(replaced), labels) - F.cross_entropy(net.head(values), labels)
    assert float(rise.detach()) == pytest.approx(float(found.scores()[3]), rel=1e-2)


def test_gauss_newton_counts_a_unit_at_all_its_positions_at_once():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(12, 4)).double().eval()
    batches = [(torch.randn(10, 2, 2, 2, dtype=torch.float64), torch.randint(4, (10,)))]
    found = measure_curvature(net, ["0"], batches)["0"]
    images, labels = batches[0]
    base = torch.zeros(10, 2, dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(net(images + base[:, :, None, None]), labels, reduction="none")
    for image in range(10):
        gradient = torch.autograd.grad(loss[image], base, create_graph=True)[0][image]
        rows = [torch.autograd.grad(g, base, retain_graph=True)[0][image] for g in gradient]
        loss_hessian = torch.stack(rows)
        found.hessian.sub_(loss_hessian / 10)  # the logits are affine in the images: Gauss-Newton is exact
    assert found.hessian.abs().max() < 1e-12


def test_sampled_labels_estimate_the_same_curvature(make_classifier):
    net = make_classifier(classes=12)
    images = torch.randn(20, 5, dtype=torch.float64).repeat(400, 1)
    labels = torch.zeros(len(images), dtype=torch.int64)
    _, _, hessian = head_derivatives(net, [(images[:20], labels[:20])])
    found = measure_curvature(net, ["head"], [(images, labels)])["head"]
    error = (found.hessian - hessian.mean(0)).norm() / hessian.mean(0).norm()
    assert error < 0.1


def test_off_diagonal_ratio_is_zero_for_a_diagonal_and_known_for_a_constant_matrix(net, batches):
    found = measure_curvature(net, ["head"], batches)["head"]
    found.hessian.copy_(torch.diag(torch.arange(1.0, 8.0)))
    assert found.off_diagonal_ratio(block=4) == 0
    found.hessian.fill_(1.0)
    assert found.off_diagonal_ratio(block=4) == pytest.approx((12 / 16) ** 0.5)


def test_logit_distortion_survives_rescaling_exactly_and_variance_does_not():
    torch.manual_seed(0)
    net = build_backbone("cifar_convnet", num_classes=3, widths=[8, 8], hidden=32).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, 0.0, 1.0)
    images = torch.randn(24, 3, 8, 8)
    batches = [(images, torch.randint(3, (24,)))]
    names = ("cmr_logit", "cmr_const", "variance")
    rankings = {name: lambda network, name=name: score(network, name, batches) for name in names}
    for group in ("fc1", "features.0"):
        rows = rescaling_stress(net, group, rankings, images, draws=1)
        means = rows.groupby("score")["jaccard"].mean()
        assert means["cmr_logit"] == 1 and means["cmr_const"] == 1
        assert means["variance"] < 0.8
        assert (rows["logit_change"] < 1e-4).all()


def test_a_group_that_cannot_be_rescaled_is_named(tiny_net):
    rankings = {"magnitude": lambda network: score(network, "magnitude")}
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(InputError, match="'stem.0' has 2 producers"):
        rescaling_stress(tiny_net, "stem.0", rankings, images)
    with pytest.raises(InputError, match="'stem' is not"):
        rescaling_stress(tiny_net, "stem", rankings, images)
    sigmoid = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3)).eval()
    with pytest.raises(InputError, match="changes the logits"):
        rescaling_stress(sigmoid, "0", {"m": lambda network: score(network, "magnitude")}, torch.randn(4, 4))


def test_jaccard_of_kept_sets():
    values = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert kept_jaccard(values, values * 7, 0.5) == 1
    assert kept_jaccard(values, -values, 0.5) == 0
    assert kept_jaccard(values, torch.tensor([4.0, 1.0, 3.0, 2.0]), 0.5) == pytest.approx(1 / 3)
