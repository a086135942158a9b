"""Controls of `analyze`: what must not move does not, what must move does."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lit_prune.errors import InputError
from lit_prune.lab.analyze import controls, invariance, structure
from lit_prune.lab.analyze.evidence import Analysis, cut_batches
from lit_prune.lab.analyze.request import AnalyzeRequest
from lit_prune.measurement.channel_table import measure
from lit_prune.measurement.protocol import Protocol
from lit_prune.scores.groupings import group_channels
from lit_prune.structure.example import Example
from lit_prune.task import Classification


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    classes = torch.randn(4, 3, 8, 8, generator=generator)
    labels = torch.arange(60) % 4
    images = classes[labels] + torch.randn(60, 3, 8, 8, generator=generator)
    return list(zip(images.split(25), labels.split(25), strict=True))


@pytest.fixture
def analysis(tiny_net, batches):
    extras = ("targets", "partners", "label_permutation", "calibration_sizes", "reparameterisation", "exact")
    return Analysis(tiny_net, batches, AnalyzeRequest(extras=extras, sizes=(20, 40), samples=200))


def test_one_pass_gives_the_channel_table_of_measure(analysis, tiny_net, batches):
    pd.testing.assert_frame_equal(analysis.channels, measure(tiny_net, batches), rtol=1e-5)  # cut differently


@pytest.mark.parametrize("limit, cuts", [(None, ()), (43, ()), (None, (10, 25, 30)), (31, (30,))])
def test_cut_batches_keep_the_order_and_end_at_the_cuts(batches, limit, cuts):
    parts = list(cut_batches(batches, Classification(), limit, cuts))
    every = torch.cat([images for images, _ in batches])[:limit]
    assert torch.equal(torch.cat([images for images, _ in parts]), every)
    assert set(cuts) <= set(np.cumsum([len(labels) for _, labels in parts]))


def test_each_target_has_the_task_information_of_its_own_measurement(analysis, tiny_net, batches):
    found = controls.targets(analysis)
    for name in ("negative_loss", "predicted_margin", "one_vs_rest"):
        expected = measure(tiny_net, batches, target=name)["task_information"]
        np.testing.assert_allclose(found["channels"][f"task_information_{name}"], expected, rtol=1e-4, atol=1e-7)
    table = found["table"].set_index("target")
    taus = table[[f"tau_{name}" for name in table.index]].to_numpy()
    np.testing.assert_allclose(taus, taus.T)
    np.testing.assert_allclose(np.diag(taus), 1)


def test_default_partner_rule_agrees_with_itself(analysis):
    table = controls.partners(analysis)["table"].set_index(["rule", "partners"])
    assert table.loc[("task", 10), "tau"] == pytest.approx(1)
    assert set(table.index) == {("task", 5), ("task", 10), ("task", 20), ("joint", 10), ("excess", 10), ("random", 10)}


def test_permuted_labels_leave_the_local_axis_as_it_is_to_the_last_bit(analysis):
    table = controls.label_permutation(analysis)["table"]
    assert (table["largest_change"] == 0).all()
    assert set(table["control"]) == {"labels", "pairing"}


def test_shuffled_targets_cost_the_channels_most_of_their_task_information():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(800, 4, 1, 1, generator=generator), torch.arange(800) % 3
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(6, 3))
    found = Analysis(net, [(images, labels)], AnalyzeRequest(target="predicted_logit"))
    table = controls.label_permutation(found)["table"].set_index(["control", "layer"])
    assert table.loc[("pairing", "0"), "ratio"] > 10
    assert table.loc[("labels", "0"), "ratio"] == pytest.approx(1)  # a predicted logit does not know the label


def test_all_images_agree_with_themselves_and_a_prefix_is_the_measurement_of_its_images(analysis, tiny_net, batches):
    table = controls.calibration_sizes(analysis)["table"].set_index(["images", "layer"])
    assert set(table.index.get_level_values(0)) == {20, 40, 60}
    whole = table.loc[60]
    assert (whole[["tau_input_capture", "tau_target_excess", "rand_index"]] > 1 - 1e-12).all(axis=None)
    some = measure(tiny_net, list(cut_batches(batches, Classification(), 20)))
    every = measure(tiny_net, batches)
    rows = some["layer"] == "conv1"
    expected = controls.kendall(some["task_information"][rows], every["task_information"][rows])
    assert table.loc[(20, "conv1"), "tau_task_information"] == pytest.approx(expected)


def test_rescaling_leaves_the_function_and_moves_the_rankings_of_raw_parameters(analysis):
    values = invariance.reparameterisation(analysis)["table"].set_index("quantity")["value"]
    assert values["largest_difference"] <= 1e-6 and values["same_class"] == 1
    for kept in ("tau_folded_norm", "tau_folded_power", "tau_peer_overlap", "tau_task_information"):
        assert values[kept] == pytest.approx(1, abs=1e-6), kept
    for moved in ("tau_weight_norm", "tau_norm_scale", "tau_signal_power", "tau_input_capture"):
        assert values[moved] < 0.9, moved


def test_rescaled_copy_has_other_parameters_and_the_model_its_own(tiny_net, batches):
    before = {name: value.clone() for name, value in tiny_net.state_dict().items()}
    example = Example((batches[0][0][:1],))
    twin = invariance.rescaled(tiny_net, invariance.batch_norms(tiny_net, example))
    assert all(torch.equal(value, before[name]) for name, value in tiny_net.state_dict().items())
    assert not torch.equal(twin.conv1.weight, tiny_net.conv1.weight)
    images = batches[0][0]
    torch.testing.assert_close(twin(images), tiny_net(images), rtol=1e-6, atol=1e-6)


def test_folded_columns_are_those_of_the_network_after_its_norms(analysis, tiny_net, batches):
    columns = invariance.variants(analysis)["channels"]
    after = measure(tiny_net, batches, protocol=Protocol(hook_point="post_bn"))
    folded = columns["folded_power"].notna()
    assert set(columns["layer"][folded]) == {"stem.0", "conv1", "conv2"}
    np.testing.assert_allclose(columns["folded_power"][folded], after["signal_power"][folded], rtol=1e-5)
    np.testing.assert_allclose(columns["folded_capture"][folded], after["input_capture"][folded], rtol=1e-5)
    np.testing.assert_allclose(analysis.channels["peer_overlap"], after["peer_overlap"], rtol=1e-4, atol=1e-9)


def test_unfolded_and_streamed_signal_power_agree_for_grouped_strided_and_linear_layers():
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 3, dilation=1)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 5))
    batches = [(torch.randn(10, 4, 8, 8), torch.arange(10) % 5) for _ in range(2)]
    table = invariance.exact(Analysis(net, batches, AnalyzeRequest(samples=160)))["table"]
    assert table["layer"].tolist() == ["0", "2", "4"]
    np.testing.assert_allclose(table["tau_input_capture"], 1)
    assert (table["largest_difference"] < 1e-5).all()


def test_reparameterisation_without_norms_and_after_them_is_refused(tiny_net, batches):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(InputError, match="needs a layer followed by BatchNorm"):
        invariance.reparameterisation(Analysis(plain, batches, AnalyzeRequest()))
    request = AnalyzeRequest(protocol=Protocol(hook_point="post_bn"))
    with pytest.raises(InputError, match="reads raw outputs"):
        invariance.variants(Analysis(tiny_net, batches, request))


def test_iterators_are_refused(tiny_net, batches):
    with pytest.raises(InputError, match="read only once"):
        Analysis(tiny_net, iter(batches), AnalyzeRequest())


@pytest.mark.parametrize(
    "arguments",
    [
        {"extras": ("hull",)},
        {"target": "one_vs_rest"},
        {"limit": 2},
        {"bins": 1},
        {"partner_counts": (0,)},
        {"seed": -1},
    ],
)
def test_bad_requests_are_named(arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        AnalyzeRequest(**arguments)


def test_pairs_within_groups_share_more_than_pairs_between(analysis):
    block = torch.kron(torch.eye(2), torch.full((3, 3), 0.8)).fill_diagonal_(1).double()
    facts = replace(analysis.facts("conv2"), correlations=block, between=block, task=torch.full((6,), 0.3).double())
    means = structure.pairs_by_group(facts, np.array([0, 0, 0, 1, 1, 1]))
    assert means["redundancy_within"] == pytest.approx(-0.5 * np.log(1 - 0.64))
    assert means["redundancy_between"] == pytest.approx(0)
    assert np.isnan(structure.pairs_by_group(facts, np.zeros(6))["redundancy_between"])


def test_groups_in_the_channel_table_are_those_of_the_agreement(analysis):
    frames = structure.groupings(analysis)
    rows = analysis.rows("conv1")
    expected = group_channels(rows[["input_capture", "peer_overlap"]].to_numpy(), 0)
    found = frames["channels"]
    assert found.loc[found["layer"] == "conv1", "local_group"].tolist() == expected.tolist()


def test_consecutive_layers_follow_the_flow_of_data_and_skip_the_residual_branch(analysis):
    assert structure.consecutive_layers(analysis) == [("stem.0", "conv1"), ("conv1", "conv2"), ("conv2", "head")]


def test_norm_of_equal_kernels_tracks_the_capture_perfectly(batches):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 1, bias=False), nn.Flatten(), nn.Linear(320, 4))
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(1.0, 6)[:, None, None, None] * torch.ones(1, 3, 1, 1))
    columns = structure.boundary(Analysis(net, batches, AnalyzeRequest()))["layers"].iloc[0]
    assert columns["norm_capture"] == pytest.approx(1)
    assert columns["deviation_log_rayleigh"] == pytest.approx(0, abs=1e-5)
