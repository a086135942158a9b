import pytest
import torch

from lit_prune.data.sampling import seeded_generator, stratified_order

pytestmark = pytest.mark.cpu  # sums and labels have come from the device when this is asked

LABELS = torch.arange(5).repeat_interleave(torch.tensor([50, 20, 3, 50, 7]))


def order(seed=0):
    return stratified_order(LABELS, seeded_generator(seed, "test"))


def test_order_is_a_permutation_fixed_by_the_seed():
    assert torch.equal(order().sort().values, torch.arange(len(LABELS)))
    assert torch.equal(order(), order())
    assert not torch.equal(order(), order(1))


def test_every_prefix_is_balanced_up_to_exhausted_classes():
    sizes = torch.bincount(LABELS)
    for count in range(1, len(LABELS) + 1):
        taken = torch.bincount(LABELS[order()[:count]], minlength=5)
        unfinished = taken[taken < sizes]
        assert not len(unfinished) or taken.max() - unfinished.min() <= 1


def test_every_image_of_a_class_is_equally_likely_to_come_first():
    firsts = torch.stack([next(i for i in order(seed) if LABELS[i] == 2) for seed in range(600)])
    counts = torch.bincount(firsts - 70, minlength=3)
    assert counts.sum() == 600 and (counts - 200).abs().max() < 50  # 4 standard deviations


def test_an_absent_class_is_no_obstacle():
    labels = torch.tensor([0, 0, 3, 3])
    assert sorted(labels[stratified_order(labels, seeded_generator(0))[:2]].tolist()) == [0, 3]
