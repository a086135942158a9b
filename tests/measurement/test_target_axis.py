import math
import time

import pytest
import torch

from lit_prune.errors import InputError
from lit_prune.measurement import target_axis
from lit_prune.measurement.protocol import Protocol
from lit_prune.task import task_variable

GENERATOR = torch.Generator().manual_seed(0)


def random_correlations(channels, seed=0):
    """Correlations a [N] with T and r [N, N] of a random Gaussian model (positive definite together)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2 * channels + 20, channels + 1, dtype=torch.float64, generator=generator)
    values = values + 0.8 * torch.randn(len(values), 1, dtype=torch.float64, generator=generator)
    matrix = torch.corrcoef(values.T)
    return matrix[0, 1:], matrix[1:, 1:]


def joint_information(task, between, i, j):
    """-½·log(1-R²) by the definition's own formula."""
    a, b, r = float(task[i]), float(task[j]), float(between[i, j])
    return -0.5 * math.log(1 - (a * a + b * b - 2 * a * b * r) / (1 - r * r))


def brute_force(task, between, partners):
    """Red_T and Syn by loops over the definitions."""
    alone = [-0.5 * math.log(1 - float(a) ** 2) for a in task]
    redundancy, excess = [], []
    for i, row in enumerate(partners):
        redundancy.append(sum(min(alone[i], alone[j]) for j in row) / len(row))
        pairs = [joint_information(task, between, i, j) - max(alone[i], alone[j]) for j in row]
        excess.append(sum(pairs) / len(row))
    return torch.tensor(redundancy).double(), torch.tensor(excess).double()


def brute_partners(task, between, rule, m):
    alone = target_axis.task_information(task)
    rows = []
    for i in range(len(task)):
        others = [j for j in range(len(task)) if j != i]
        keys = {
            "task": lambda j: float(alone[j]),
            "joint": lambda j, i=i: joint_information(task, between, i, j),
            "excess": lambda j, i=i: joint_information(task, between, i, j) - max(float(alone[i]), float(alone[j])),
        }
        rows.append(sorted(others, key=keys[rule], reverse=True)[:m])
    return rows


@pytest.mark.parametrize("rule", ["task", "joint", "excess"])
@pytest.mark.parametrize(("channels", "m"), [(2, 10), (7, 3), (25, 10), (25, 5)])
def test_axis_equals_the_definition_by_loops(rule, channels, m):
    task, between = random_correlations(channels)
    partners = target_axis.find_partners(task, between, Protocol(partner_rule=rule, partners=m))
    expected = brute_partners(task, between, rule, min(m, channels - 1))
    assert [sorted(row) for row in partners.tolist()] == [sorted(row) for row in expected]
    redundancy, excess = brute_force(task, between, expected)
    torch.testing.assert_close(target_axis.target_redundancy(task, partners), redundancy)
    torch.testing.assert_close(target_axis.target_excess(task, between, partners), excess, rtol=1e-6, atol=1e-9)


def test_excess_is_never_negative_not_even_for_near_duplicates():
    first = torch.tensor([0.5, 0.5, 0.5, -0.9, 0.0]).double()
    second = torch.tensor([0.5, 0.5 + 1e-9, -0.5, 0.9, 0.0]).double()
    between = torch.tensor([1.0, 1 - 1e-12, -1.0, -1.0, 0.0]).double()
    excess = target_axis.pair_excess(first, second, between)
    assert (excess >= 0).all()
    assert (excess < 1e-5).all()


def test_two_independent_halves_of_the_target_add_up():
    # T = (y1 + y2)/√2 + noise of variance 1: a = b = ½, R² = ½
    half = torch.tensor(0.5).double()
    excess = target_axis.pair_excess(half, half, torch.tensor(0.0).double())
    expected = -0.5 * math.log(0.5) + 0.5 * math.log(0.75)
    torch.testing.assert_close(excess, torch.tensor(expected).double())


@pytest.mark.parametrize("rule", ["task", "joint", "excess", "excess_of_redundant"])
def test_permuting_channels_permutes_the_columns(rule):
    task, between = random_correlations(30, seed=3)
    order = torch.randperm(30, generator=GENERATOR)
    protocol = Protocol(partner_rule=rule)

    def axis(task, between):
        partners = target_axis.find_partners(task, between, protocol)
        return target_axis.target_redundancy(task, partners), target_axis.target_excess(task, between, partners)

    for moved, original in zip(axis(task[order], between[order][:, order]), axis(task, between), strict=True):
        torch.testing.assert_close(moved, original[order])


def test_random_partners_are_seeded_others_among_the_top():
    task, between = random_correlations(60)
    rule = Protocol(partner_rule="random", partners=5)
    partners = target_axis.find_partners(task, between, rule)
    assert torch.equal(partners, target_axis.find_partners(task, between, rule))
    changed = Protocol(partner_rule="random", partners=5, seed=1)
    assert not torch.equal(partners, target_axis.find_partners(task, between, changed))
    top = set(target_axis.task_information(task).argsort(descending=True)[:21].tolist())
    for channel, row in enumerate(partners.tolist()):
        assert channel not in row
        assert len(set(row)) == 5
        assert set(row) <= top


def test_authors_partners_are_the_best_excesses_among_the_fifty_most_redundant():
    task, between = random_correlations(80)
    partners = target_axis.find_partners(task, between, Protocol(partner_rule="excess_of_redundant"))
    information = target_axis.task_information(task)
    excess = target_axis.pair_excess(task[:, None], task[None], between)
    for channel in (0, 17, 79):
        pool = [j for j in information.argsort(descending=True).tolist() if j != channel][:50]
        best = sorted(pool, key=lambda j, row=excess[channel]: float(row[j]), reverse=True)[:10]
        assert sorted(partners[channel].tolist()) == sorted(best)


def test_excess_of_512_channels_takes_less_than_50_milliseconds():
    task, between = random_correlations(512)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        partners = target_axis.find_partners(task, between)
        target_axis.target_excess(task, between, partners)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


def test_task_variables_of_known_logits():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]])
    labels = torch.tensor([1, 0])
    expected = {
        "true_margin": [[1.0], [-5.0]],
        "true_logit": [[3.0], [0.0]],
        "predicted_margin": [[1.0], [5.0]],
        "predicted_logit": [[3.0], [5.0]],
        "one_vs_rest": [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]],
    }
    for name, values in expected.items():
        assert task_variable(name, logits, labels).tolist() == values
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(task_variable("negative_loss", logits, labels)[:, 0].float(), -loss)


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("margin", [0, 1], "target: 'margin' is not one of true_margin"),
        ("true_logit", [0, 3], "labels from 0 to 3, but 0 to 2"),
        ("true_logit", [-1, 2], "labels from -1 to 2"),
        ("true_logit", [0, 1, 1], "labels are"),
        ("true_logit", [0.0, 1.0], "labels are"),
    ],
)
def test_bad_targets_and_labels_are_named(name, labels, message):
    with pytest.raises(InputError, match=message):
        task_variable(name, torch.zeros(2, 3), torch.tensor(labels))
