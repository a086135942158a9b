"""Masks zero single layers' outputs; budgets count as if what is zero everywhere had gone."""

import copy

import numpy as np
import pytest
import torch

from lit_prune.errors import InputError
from lit_prune.structure import Budget, CostModel, cost, mask_channels, plan_channels, plan_masks, trace_groups


def traced(build, random_ranks, name):
    model, images = build(name)
    return model, images, trace_groups(model, images), random_ranks(model)


def test_masked_outputs_are_zero_and_the_skip_connection_still_carries(build, random_ranks):
    model, images, graph, _ = traced(build, random_ranks, "cifar_resnet20")
    seen = {}
    masked = mask_channels(model, {"layer1.0.conv2": [0, 3]})
    masked.layer1[0].conv2.register_forward_hook(lambda m, i, o: seen.update(raw=o))
    masked.layer1[1].conv1.register_forward_pre_hook(lambda m, i: seen.update(trunk=i[0]))
    with torch.no_grad():
        masked(images)
        reference = copy.deepcopy(model)
        for parameter in (reference.layer1[0].conv2.weight,):
            parameter[[c for c in range(16) if c not in (0, 3)]] = 0
        torch.testing.assert_close(masked(images), reference(images))
    gone = [c for c in range(16) if c not in (0, 3)]
    assert bool((seen["raw"][:, gone] == 0).all()) and bool((seen["raw"][:, [0, 3]] != 0).any())
    assert bool((seen["trunk"][:, gone] != 0).any())
    with torch.no_grad():
        assert not torch.equal(model(images), masked(images))  # the model itself is as it was


def test_fine_tuning_does_not_bring_masked_kernels_back(build, random_ranks):
    model, images, _, _ = traced(build, random_ranks, "convnet")
    masked = mask_channels(model, {"features.0": [1]})
    masked(images).square().sum().backward()
    gradient = masked.get_submodule("features.0").weight.grad
    assert bool((gradient[0] == 0).all()) and bool((gradient[1] != 0).any())


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("kind", ["macs", "channels"])
def test_budgets_are_met_from_below(build, random_ranks, kind, allocation):
    model, images, graph, ranks = traced(build, random_ranks, "cifar_resnet20")
    plan = plan_masks(graph, cost(model, images), ranks, Budget(kind, 0.6, allocation))
    share = plan.channels if kind == "channels" else plan.macs / plan.dense_macs
    assert plan.met and 0.58 < share <= 0.6
    assert plan.dense_macs == cost(model, images).macs


def test_without_coupling_masks_cost_what_removal_does(build, random_ranks):
    model, images, graph, ranks = traced(build, random_ranks, "convnet")
    counted = cost(model, images)
    cost_model = CostModel.build(model, graph, images)
    request = Budget(keep=0.5)
    removed = plan_channels(graph, cost_model, ranks, request)
    masked = plan_masks(graph, counted, ranks, request)
    assert {name: kept for name, kept in masked.kept.items()} == dict(removed.keep_channels)
    assert masked.macs == cost_model.macs(cost_model.widths(removed.keep_channels))


def test_a_trunk_channel_counts_until_every_producer_masks_it(build, random_ranks):
    model, images, graph, ranks = traced(build, random_ranks, "cifar_resnet20")
    group = next(group for group in graph.prunable if len(group.producers) > 1)
    request = Budget("channels", 0.5, "uniform", only=(group.name,))
    same = {name: torch.arange(16.0) for name in group.producers}
    other = same | {group.producers[0]: torch.arange(16.0).flip(0)}
    costs = [plan_masks(graph, cost(model, images), chosen, request) for chosen in (same, other)]
    assert costs[0].channels == costs[1].channels
    removed = plan_channels(graph, CostModel.build(model, graph, images), same, request)
    cost_model = CostModel.build(model, graph, images)
    assert costs[0].macs == cost_model.macs(cost_model.widths(removed.keep_channels))
    assert costs[1].macs > costs[0].macs


def test_each_layer_is_a_unit_of_its_own_under_one_threshold(build, random_ranks):
    model, images, graph, ranks = traced(build, random_ranks, "cifar_resnet20")
    plan = plan_masks(graph, cost(model, images), ranks, Budget("channels", 0.5, cap=1.0))
    layers = [name for group in graph.prunable for name in group.producers]
    values = np.concatenate([ranks[name].numpy() for name in layers])
    threshold = np.sort(values)[len(values) // 2 :]
    for name, kept in plan.kept.items():
        assert all(ranks[name][channel] >= threshold[0] for channel in kept)


def test_what_masks_cannot_do_is_refused(build, random_ranks):
    model, images, graph, ranks = traced(build, random_ranks, "convnet")
    with pytest.raises(InputError, match="masks take a budget of macs or channels"):
        plan_masks(graph, cost(model, images), ranks, Budget("params"))
    with pytest.raises(InputError, match=r"channels must lie in 0\.\."):
        mask_channels(model, {"features.0": [999]})
