import math

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, minimize

from lit_prune.errors import InputError
from lit_prune.lab.analyze.broja import best_peer_pairs, decompose, irrecoverable_loss, joint_counts

BIT = math.log(2)


def gate(function, symbols: int = 2) -> torch.Tensor:
    """Joint distribution [1, T, Y1, Y2] of T = function(Y1, Y2) for independent uniform inputs."""
    pairs = [(a, b) for a in range(symbols) for b in range(symbols)]
    outputs = [function(a, b) for a, b in pairs]
    joint = torch.zeros(1, max(outputs) + 1, symbols, symbols)
    for target, (a, b) in zip(outputs, pairs, strict=True):
        joint[0, target, a, b] += 1
    return joint


def atoms(joint: torch.Tensor) -> list[float]:
    found = decompose(joint)
    return [float(v[0]) for v in (found.shared, found.unique_first, found.unique_second, found.synergy)]


def random_joints(pairs: int, symbols: int, concentration: float, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    draws = generator.dirichlet(np.full(symbols**3, concentration), size=pairs)
    return torch.from_numpy(draws).view(pairs, symbols, symbols, symbols)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda a, b: a ^ b, [0, 0, 0, 1]),
        (lambda a, b: 2 * a + b, [0, 1, 1, 0]),
        (lambda a, b: a, [0, 1, 0, 0]),
        (lambda a, b: b, [0, 0, 1, 0]),
        (lambda a, b: a & b, [0.75 * math.log2(4 / 3), 0, 0, 0.5]),
        (lambda a, b: 0, [0, 0, 0, 0]),
    ],
    ids=["xor", "copy", "first", "second", "and", "constant"],
)
def test_gates_have_their_known_atoms(function, expected):
    assert atoms(gate(function)) == pytest.approx([BIT * bits for bits in expected], abs=2e-6)


def test_two_equal_channels_share_everything():
    joint = torch.zeros(1, 3, 3, 3)
    joint[0, [0, 1, 2], [0, 1, 2], [0, 1, 2]] = torch.tensor([1.0, 2.0, 3.0])
    entropy = float(torch.distributions.Categorical(torch.tensor([1.0, 2.0, 3.0])).entropy())
    assert atoms(joint) == pytest.approx([entropy, 0, 0, 0], abs=2e-6)


def reference_unique(joint: np.ndarray) -> tuple[float, float]:
    """min_q I_q(T;Y1|Y2) and min_q I_q(T;Y2|Y1) by a general-purpose solver; an upper bound, slow."""
    size = joint.size
    cells = np.eye(size).reshape(size, *joint.shape)
    independent = cells.sum(2)[:, :, :-1]  # one marginal a target symbol follows from the others
    rows = np.concatenate([cells.sum(3).reshape(size, -1), independent.reshape(size, -1)], 1).T

    def negative_entropy(q):
        q = q.reshape(joint.shape)
        ratio = np.log(np.maximum(q, 1e-300)) - np.log(np.maximum(q.sum(0), 1e-300))
        return float((q * ratio).sum()), ratio.reshape(-1)

    target = joint.sum((1, 2), keepdims=True)
    start = joint.sum(2, keepdims=True) * joint.sum(1, keepdims=True) / target
    constraint = LinearConstraint(rows, rows @ joint.reshape(-1), rows @ joint.reshape(-1))
    options = {"maxiter": 2000, "ftol": 1e-13}
    found = minimize(
        negative_entropy,
        start.reshape(-1),
        jac=True,
        bounds=[(1e-13, 1)] * size,
        constraints=constraint,
        method="SLSQP",
        options=options,
    )

    def conditional(axis):
        pair = joint.sum(axis)
        return -float((pair * np.log(pair / pair.sum(0))).sum())

    return conditional(1) + found.fun, conditional(2) + found.fun


@pytest.mark.parametrize(("symbols", "concentration"), [(2, 1.0), (3, 1.0), (3, 0.3), (4, 1.0)])
def test_atoms_agree_with_a_general_purpose_solver(symbols, concentration):
    joints = random_joints(3, symbols, concentration)
    joints = (joints + 1e-4) / (joints + 1e-4).sum((1, 2, 3), keepdim=True)
    found = decompose(joints)
    for pair, joint in enumerate(joints.numpy()):
        first, second = reference_unique(joint)
        assert float(found.unique_first[pair]) == pytest.approx(first, abs=1e-4)
        assert float(found.unique_second[pair]) == pytest.approx(second, abs=1e-4)
        assert float(found.unique_first[pair]) <= first + float(found.gap[pair]) + 1e-9


@pytest.mark.parametrize("symbols", [2, 3, 4, 5])
@pytest.mark.parametrize("samples", [3, 30, 1000])
def test_sparse_tables_are_certified_non_negative_and_consistent(symbols, samples):
    generator = np.random.default_rng(symbols + samples)
    weights = generator.dirichlet(np.full(symbols**3, 0.05), size=100)
    counts = np.stack([generator.multinomial(samples, row) for row in weights])
    found = decompose(torch.from_numpy(counts).view(100, symbols, symbols, symbols))
    parts = torch.stack([found.shared, found.unique_first, found.unique_second, found.synergy])
    assert float(found.gap.max()) < 1e-5
    assert float(parts.min()) >= 0
    torch.testing.assert_close(parts[0] + parts[1], found.information_first, atol=1e-12, rtol=0)
    torch.testing.assert_close(parts[0] + parts[2], found.information_second, atol=1e-12, rtol=0)
    torch.testing.assert_close(parts.sum(0), found.information_joint, atol=1e-12, rtol=0)


@pytest.mark.parametrize("concentration", [1.0, 0.03])
def test_every_random_pair_converges(concentration):
    assert float(decompose(random_joints(300, 4, concentration)).gap.max()) < 1e-5


def test_looser_tolerance_is_reported_by_the_gap_and_bounds_the_error():
    joints = random_joints(50, 4, 0.5)
    loose, tight = decompose(joints, tolerance=1e-2), decompose(joints)
    assert float(loose.gap.max()) > 1e-4
    assert bool(((loose.synergy - tight.synergy).abs() <= loose.gap + 1e-6).all())


def test_swapping_the_channels_swaps_the_unique_atoms():
    joints = random_joints(20, 3, 0.5)
    found, swapped = decompose(joints), decompose(joints.transpose(2, 3))
    torch.testing.assert_close(found.unique_first, swapped.unique_second, atol=2e-6, rtol=0)
    torch.testing.assert_close(found.shared, swapped.shared, atol=2e-6, rtol=0)


def test_relabelled_symbols_scaled_counts_and_company_change_nothing():
    joints = random_joints(300, 3, 0.5)
    found = decompose(joints).synergy
    other = decompose(7 * joints[:, [2, 0, 1]][:, :, [1, 2, 0]][..., [1, 0, 2]]).synergy
    torch.testing.assert_close(found, other, atol=2e-6, rtol=0)
    torch.testing.assert_close(found[280:281], decompose(joints[280:281]).synergy, atol=1e-9, rtol=0)


def test_symbols_that_never_occur_change_nothing():
    joints = random_joints(10, 3, 1.0)
    padded = torch.zeros(10, 4, 5, 4, dtype=torch.float64)
    padded[:, 1:, 1:4, :3] = joints
    torch.testing.assert_close(decompose(padded).synergy, decompose(joints).synergy, atol=2e-6, rtol=0)


def test_unequal_alphabets_are_allowed():
    draws = np.random.default_rng(0).dirichlet(np.full(2 * 5 * 3, 0.5), size=20)
    found = decompose(torch.from_numpy(draws).view(20, 2, 5, 3))
    assert float(found.gap.max()) < 1e-5


@pytest.mark.parametrize("joint", [torch.ones(2, 2, 2), -torch.ones(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)])
def test_bad_joints_are_refused(joint):
    with pytest.raises(InputError, match="joint"):
        decompose(joint)


def test_number_of_threads_is_left_as_found():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        decompose(random_joints(1, 2, 1.0))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_no_pairs_give_empty_atoms():
    assert decompose(torch.zeros(0, 2, 2, 2)).shared.shape == (0,)


def test_joint_counts_are_the_histogram_of_ranks():
    torch.manual_seed(0)
    target, values = torch.randn(40), torch.randn(40, 3)
    pairs = torch.tensor([[0, 1], [2, 0]])
    counts = joint_counts(target, values, pairs, bins=4)
    columns = torch.cat([target[:, None], values], 1).argsort(0).argsort(0).numpy() // 10
    for pair, (i, j) in enumerate(pairs.tolist()):
        expected = np.histogramdd(columns[:, [0, i + 1, j + 1]], bins=[np.arange(5) - 0.5] * 3)[0]
        np.testing.assert_array_equal(counts[pair].numpy(), expected)


def test_joint_counts_refuse_too_few_samples():
    with pytest.raises(InputError, match="bins"):
        joint_counts(torch.randn(3), torch.randn(3, 2), torch.tensor([[0, 1]]))


def test_best_peer_is_the_most_informative_other_live_channel():
    pairs = best_peer_pairs(torch.tensor([0.1, 0.5, math.nan, 0.3]))
    assert pairs.tolist() == [[0, 1], [1, 3], [3, 1]]
    assert best_peer_pairs(torch.tensor([math.nan, 0.3])).shape == (0, 2)


def test_loss_is_zero_for_a_duplicate_one_for_a_lone_source_and_undefined_without_information():
    duplicate = torch.zeros(1, 2, 2, 2)
    duplicate[0, 0, 0, 0] = duplicate[0, 1, 1, 1] = 1
    joints = torch.cat([duplicate, gate(lambda a, b: a), gate(lambda a, b: b)])
    loss = irrecoverable_loss(decompose(joints))
    assert loss[:2].tolist() == pytest.approx([0, 1], abs=1e-5)
    assert math.isnan(loss[2])
