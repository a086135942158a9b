"""Scores of outputs and readers against plain loops, and how many passes they cost."""

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional

from lit_prune.errors import InputError
from lit_prune.measurement.channel_table import measure
from lit_prune.models import build_backbone
from lit_prune.scores import SCORES, Evidence, find_score, score
from lit_prune.scores.hulls import greedy_hulls
from lit_prune.scores.independence import nuclear_drops
from lit_prune.scores.planning import method_needs

OWN_PASSES = {"reconstruction": 1}  # passes of `mechanisms`


def batches(count=40):
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(count) % 4
    return [(images[:25], labels[:25]), (images[25:], labels[25:])]


def outputs(model, name):
    """Raw output of a layer for all images."""
    kept = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, i, o: kept.append(o.double()))
    with torch.no_grad():
        for images, _ in batches():
            model(images)
    handle.remove()
    return torch.cat(kept)


def plain_drops(features):
    """The nuclear norm's drop, by singular values, a row at a time."""
    drops = torch.empty(features.shape[:2], dtype=torch.float64)
    for image, matrix in enumerate(features.double()):
        for row in range(len(matrix)):
            without = matrix.clone()
            without[row] = 0
            drops[image, row] = torch.linalg.svdvals(matrix).sum() - torch.linalg.svdvals(without).sum()
    return drops


@pytest.mark.parametrize("shape", [(2, 5, 40), (2, 12, 12), (2, 30, 6), (3, 8, 1), (1, 2, 3)])
def test_nuclear_drops_are_those_of_the_singular_values(shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    features[0, 1] = features[0, 0]  # a duplicate
    features[-1, -1] = 0  # a dead row
    expected = plain_drops(features)
    norm = float(torch.linalg.matrix_norm(features, "nuc").max())
    torch.testing.assert_close(nuclear_drops(features), expected, rtol=0, atol=1e-7 * norm)
    scaled = nuclear_drops(1e3 * features)
    torch.testing.assert_close(scaled, 1e3 * expected, rtol=0, atol=1e-4 * norm)


def test_orthogonal_rows_lose_their_own_length():
    features = torch.diag(torch.tensor([3.0, 1.0, 0.5]))[None]
    torch.testing.assert_close(nuclear_drops(features)[0], torch.tensor([3.0, 1.0, 0.5]).double(), atol=1e-7, rtol=0)


def test_chip_is_the_mean_drop_over_images(tiny_net):
    found = score(tiny_net, "chip", batches())
    expected = plain_drops(outputs(tiny_net, "conv1").flatten(2)).mean(0)
    torch.testing.assert_close(found["conv1"], expected, rtol=1e-5, atol=1e-6)
    logits = outputs(tiny_net, "head")[..., None]  # a single column for each image
    torch.testing.assert_close(found["head"], plain_drops(logits).mean(0), rtol=1e-5, atol=1e-6)


def test_mipp_is_the_information_lost_without_the_unit(tiny_net):
    """log det of the whole Gaussian channel less that of the channel without the unit."""
    inner = torch.relu(tiny_net.bn1(outputs(tiny_net, "conv1").float())).detach().double()  # what conv2 reads
    joint = torch.cov(inner.movedim(1, 0).flatten(1), correction=0) + 1e-12 * torch.eye(8).double()
    noise = outputs(tiny_net, "conv2").var((0, 2, 3), correction=0).quantile(0.5)
    weight = tiny_net.conv2.weight.detach().double().movedim(1, -1).flatten(0, -2)  # [outputs·taps, 8]

    def information(covariance, columns):
        return 0.5 * torch.logdet(torch.eye(len(weight)).double() + columns @ covariance @ columns.T / noise)

    expected = []
    for unit in range(8):
        others = [channel for channel in range(8) if channel != unit]
        given = joint[unit, others] @ torch.linalg.solve(joint[others][:, others], joint[others, unit])
        left = (joint[unit, unit] - given).view(1, 1)  # I(Y'; a_i | others) is that of the residual alone
        expected.append(information(left, weight[:, [unit]]))
    found = score(tiny_net, "mipp", batches())["conv1"]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-6)


def test_compact_support_is_the_difference_of_z_scores(tiny_net):
    raw = outputs(tiny_net, "conv1").movedim(1, 0).flatten(1)
    support = greedy_hulls(torch.corrcoef(raw)).compact_support
    table = measure(tiny_net, batches())
    capture = torch.tensor(table[table["layer"] == "conv1"]["input_capture"].to_numpy())
    expected = [(v - v.mean()) / v.std(correction=0) for v in (capture, support)]
    found = score(tiny_net, "compact_support", batches())["conv1"]
    torch.testing.assert_close(found, expected[0] - expected[1], rtol=1e-3, atol=1e-4)


def test_group_norm_is_that_of_torch_pruning():
    torch.manual_seed(0)
    model = build_backbone("resnet18", 10).eval()
    images = torch.randn(1, 3, 32, 32)
    found = score(model, "group_norm", [(images, torch.zeros(1, dtype=torch.int64))])
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=images)
    for name in ("layer1.0.conv1", "layer2.0.conv2", "conv1"):
        module = model.get_submodule(name)
        group = graph.get_pruning_group(module, tp.prune_conv_out_channels, list(range(module.out_channels)))
        expected = tp.importance.GroupMagnitudeImportance(p=2)(group).double()
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["pearson", "weighted_pearson", "random"])
def test_cmr_affine_at_a_softmax_head_is_the_weighted_least_squares_of_the_paper(rule):
    """Two units, one parent: every rule must take the other one; solved here by the plain normal equations."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2), nn.Tanh(), nn.Linear(2, 4)).eval()
    images, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    with torch.no_grad():
        a = model[:3](images).double()
        p = model(images).double().softmax(1)
    w = model[3].weight.detach().double()
    g = (p - functional.one_hot(labels, 4)) @ w
    h = p @ w.square() - (p @ w).square()
    expected = []
    for unit, parent in ((0, 1), (1, 0)):
        design = torch.stack([torch.ones(len(a)).double(), a[:, parent]], 1)
        curved = h[:, unit, None] * design
        theta = torch.linalg.solve(design.T @ curved, curved.T @ a[:, unit] - design.T @ g[:, unit])
        change = design @ theta - a[:, unit]
        expected.append((g[:, unit] * change + 0.5 * h[:, unit] * change.square()).mean())
    found = score(model, f"cmr_affine(1,0,{rule})", batches())["1"]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-7)


def test_cmr_affine_without_parents_is_cmr_const_at_a_head_and_more_parents_cost_no_more():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    constant = score(model, "cmr_const", batches())["1"]
    none, some = (score(model, f"cmr_affine({r},0)", batches())["1"] for r in (0, 3))
    torch.testing.assert_close(none, constant, rtol=1e-3, atol=1e-6)
    assert bool((some <= none + 1e-9).all())


def test_bad_parameters_of_cmr_affine_are_explained(tiny_net):
    with pytest.raises(InputError, match="no parent rule 'spearman'; use one of pearson"):
        score(tiny_net, "cmr_affine(2,0,spearman)", batches())
    with pytest.raises(InputError, match="parents is a whole number"):
        score(tiny_net, "cmr_affine(1.5)", batches())


@pytest.mark.parametrize("name", SCORES)
def test_a_score_and_its_dead_channels_cost_one_pass(tiny_net, name):
    runs = []
    handle = tiny_net.register_forward_pre_hook(lambda m, i: runs.append(len(i[0])))
    evidence = Evidence(tiny_net, batches())
    find_score(name).at(0.8).ranks(evidence)
    handle.remove()
    images = sum(count for count in runs if count > 2)  # tracing and the search for norms look at one or two
    assert images == 40 * (1 + OWN_PASSES.get(name, 0))
    assert evidence.passes == 1


def test_all_scores_share_one_pass_when_told_beforehand(tiny_net):
    evidence = Evidence(tiny_net, batches())
    evidence.gather(method_needs(SCORES))
    expected = {name: score(tiny_net, name, batches()) for name in ("taylor", "chip", "cap_qgw", "label_information")}
    for name in SCORES:
        found = find_score(name).at(0.8).ranks(evidence)
        for layer, values in expected.get(name, {}).items():
            torch.testing.assert_close(found[layer], values)
    assert evidence.passes == 1
