import pytest
import torch

from lit_prune.data.sampling import EpochSampler, Shard, seeded_generator
from lit_prune.errors import InputError


def shards(count, batch_size, world_size, shuffle, epoch=0):
    samplers = [
        EpochSampler(torch.arange(count), batch_size, shuffle, shard=Shard(rank, world_size))
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return samplers


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_ranks_share_out_the_permutation_of_one_rank(world_size):
    alone = shards(96, 8 * world_size, 1, True, epoch=3)[0].order()
    parts = [sampler.order() for sampler in shards(96, 8, world_size, True, epoch=3)]
    assert torch.equal(torch.stack(parts, 1).flatten(), alone)
    assert torch.equal(alone.sort().values, torch.arange(96))


@pytest.mark.parametrize(
    ("count", "batch_size", "world_size"),
    [(100, 32, 1), (37, 4, 2), (3, 1, 2), (5, 2, 2), (7, 2, 3), (8, 4, 2), (9, 4, 4)],
)
def test_evaluation_serves_each_image_once_in_equally_many_batches_on_every_rank(count, batch_size, world_size):
    batches = [list(sampler) for sampler in shards(count, batch_size, world_size, False)]
    assert len({len(own) for own in batches}) == 1
    assert all(1 <= len(batch) <= batch_size + 1 for own in batches for batch in own)
    assert sorted(index for own in batches for batch in own for _, index in batch) == list(range(count))


def test_evaluation_on_one_rank_never_exceeds_the_batch_size():
    assert shards(100, 32, 1, False)[0].sizes == [32, 32, 32, 4]


def test_order_depends_on_seed_stream_and_epoch_and_not_on_the_global_generator():
    def order(seed=0, stream="train", epoch=0):
        sampler = EpochSampler(torch.arange(64), 8, True, seed, stream)
        sampler.set_epoch(epoch)
        return sampler.order()

    first = order()
    torch.manual_seed(99)
    assert torch.equal(first, order())
    for other in (order(seed=1), order(stream="recalibration"), order(epoch=1)):
        assert not torch.equal(first, other)


def test_seed_and_epoch_are_not_interchangeable():
    # torch's DistributedSampler adds them, so that seed 0 in epoch 1 repeats seed 1 in epoch 0
    draws = {int(torch.randint(2**40, (), generator=seeded_generator(s, "x", e))) for s in range(9) for e in range(9)}
    assert len(draws) == 81


def test_pairs_carry_the_epoch():
    sampler = shards(8, 4, 1, True, epoch=5)[0]
    assert [pair[0] for batch in sampler for pair in batch] == [5] * 8


@pytest.mark.parametrize(("shuffle", "message"), [(True, "batch_size=8 on 2 rank"), (False, "spread over 20 ranks")])
def test_too_few_images_for_the_ranks_is_refused(shuffle, message):
    with pytest.raises(InputError, match=message):
        shards(15, 8, 2 if shuffle else 20, shuffle)
