import numpy as np
import pytest
import torch

from lit_prune.errors import InputError
from lit_prune.scores import hulls
from lit_prune.scores.hulls import full_explanation, greedy_hulls


def correlations(channels: int, factors: int = 3, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    samples = generator.normal(size=(200, channels))
    samples += generator.normal(size=(200, factors)) @ generator.normal(size=(factors, channels))
    return torch.tensor(np.corrcoef(samples.T))


def explanation(matrix: np.ndarray, target: int, peers: list[int]) -> float:
    if not peers:
        return 0.0
    inner = matrix[np.ix_(peers, peers)] + 1e-6 * np.eye(len(peers))
    return float(np.clip(matrix[target, peers] @ np.linalg.inv(inner) @ matrix[target, peers], 0, 1))


def slow_hull(matrix: np.ndarray, target: int, largest: int) -> tuple[float, list[int]]:
    others = [j for j in range(len(matrix)) if j != target]
    full, chosen = explanation(matrix, target, others), []
    while explanation(matrix, target, chosen) < 0.95 * full and len(chosen) < largest:
        rest = [j for j in others if j not in chosen]
        chosen.append(max(rest, key=lambda j: explanation(matrix, target, [*chosen, j])))
    return full, chosen


@pytest.mark.parametrize(("channels", "factors", "largest"), [(8, 2, 10), (12, 3, 10), (12, 6, 3)])
def test_hulls_agree_with_brute_force(channels, factors, largest):
    matrix = correlations(channels, factors)
    found = greedy_hulls(matrix, largest=largest)
    for channel in range(channels):
        full, chosen = slow_hull(matrix.numpy(), channel, largest)
        assert float(found.full[channel]) == pytest.approx(full, abs=1e-9)
        assert found.members[channel][: len(chosen)].tolist() == chosen
        assert int(found.sizes[channel]) == len(chosen)
        assert float(found.explained[channel]) == pytest.approx(explanation(matrix.numpy(), channel, chosen), abs=1e-9)


def test_many_chunks_give_the_same_hulls(monkeypatch):
    matrix = correlations(30)
    whole = greedy_hulls(matrix)
    monkeypatch.setattr(hulls, "CHUNK_VALUES", 7 * 300)
    parts = greedy_hulls(matrix)
    assert torch.equal(whole.members, parts.members)
    torch.testing.assert_close(whole.explained, parts.explained)


def test_duplicates_have_singleton_hulls_and_full_support():
    samples = np.random.default_rng(0).normal(size=(100, 4))
    matrix = torch.from_numpy(np.corrcoef(np.concatenate([samples, -2 * samples], 1).T))
    found = greedy_hulls(matrix)
    assert found.members[:, 0].tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert found.singleton_ratio == 1
    torch.testing.assert_close(found.compact_support, torch.ones(8, dtype=torch.float64), atol=1e-5, rtol=0)


def test_independent_channels_need_nobody():
    found = greedy_hulls(torch.eye(5, dtype=torch.float64))
    assert found.sizes.tolist() == [0] * 5
    assert found.compact_support.tolist() == pytest.approx([0] * 5)
    assert (found.singleton_ratio, found.saturated_ratio) == (0, 0)


def test_a_sum_of_many_equal_parts_saturates():
    samples = np.random.default_rng(0).normal(size=(4000, 20))
    matrix = torch.from_numpy(np.corrcoef(np.concatenate([samples.sum(1, keepdims=True), samples], 1).T))
    found = greedy_hulls(matrix)
    assert int(found.sizes[0]) == 10
    assert float(found.compact_support[0]) == pytest.approx(0.1, abs=1e-3)
    assert found.saturated_ratio >= 1 / 21


def test_dead_channels_are_nobodys_peer():
    matrix = correlations(9)
    dead = torch.zeros(9, dtype=torch.bool)
    dead[[2, 5]] = True
    live = (~dead).nonzero().flatten()
    found, alone = greedy_hulls(matrix, dead), greedy_hulls(matrix[live][:, live])
    torch.testing.assert_close(found.full[live], alone.full)
    assert torch.equal(found.sizes[live], alone.sizes)
    assert found.full[dead].isnan().all() and (found.sizes[dead] == -1).all()
    assert not torch.isin(found.members, dead.nonzero()).any()
    holes = matrix.clone()
    holes[dead] = holes[:, dead] = torch.nan
    assert torch.equal(greedy_hulls(holes).members, found.members)


def test_order_of_the_channels_does_not_matter():
    matrix, order = correlations(10), torch.randperm(10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(full_explanation(matrix)[order], full_explanation(matrix[order][:, order]))
    assert torch.equal(greedy_hulls(matrix).sizes[order], greedy_hulls(matrix[order][:, order]).sizes)


def test_a_lone_channel_has_an_empty_hull():
    found = greedy_hulls(torch.ones(1, 1))
    assert (found.full.item(), found.sizes.item()) == (pytest.approx(0, abs=1e-12), 0)


def test_bad_matrices_are_refused():
    with pytest.raises(InputError, match="square"):
        greedy_hulls(torch.ones(2, 3))
    with pytest.raises(InputError, match="dead"):
        greedy_hulls(torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]))
    with pytest.raises(InputError, match="largest"):
        greedy_hulls(torch.eye(3), largest=0)


def test_full_explanation_of_fewer_samples_than_channels_is_one_in_spite_of_rounding():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(30, 90, generator=generator)
    rounded = torch.corrcoef(values.T).double() + 2e-6 * torch.randn(90, 90, generator=generator)
    rounded = ((rounded + rounded.T) / 2).fill_diagonal_(1)
    full = full_explanation(rounded)
    assert bool((full > 0.999).all() & (full <= 1).all())
    hulls = greedy_hulls(rounded)
    assert bool(((hulls.explained >= 0) & (hulls.explained <= 1)).all())
