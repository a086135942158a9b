import pytest
import torch

from lit_prune.data import BooleanCircuitData
from lit_prune.errors import InputError


def test_labels_are_the_circuit_of_the_first_four_bits_and_the_draw_follows_the_seed():
    data = BooleanCircuitData(seed=3, calibration_size=2000, eval_batch_size=4096)
    data.setup()
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (819, 1, 1, 8) and set(images.unique().tolist()) == {0.0, 1.0}
    x = (images.flatten(1) > 0).int()
    assert torch.equal(labels, ((x[:, 0] & x[:, 1]) ^ (x[:, 2] | x[:, 3])).long())
    train, _ = next(iter(data.calibration_dataloader()))
    assert len(train) == 2000 and ((train.mean((0, 1, 2)) - 0.5).abs() < 0.05).all()
    signs = BooleanCircuitData(seed=3, mean=[0.5], std=[0.5])
    signs.setup()
    assert set(next(iter(signs.test_dataloader()))[0].unique().tolist()) == {-1.0, 1.0}
    other = BooleanCircuitData(seed=4)
    other.setup()
    assert not torch.equal(next(iter(other.test_dataloader()))[1][:100], labels[:100])


def test_more_bits_change_nothing_that_matters_and_noise_turns_training_labels_alone():
    data = BooleanCircuitData(inputs=12, label_noise=0.2, calibration_size=3277, eval_batch_size=4096)
    data.setup()
    for loader, low, high in ((data.test_dataloader(), 0, 0), (data.calibration_dataloader(), 0.17, 0.23)):
        images, labels = next(iter(loader))
        x = (images.flatten(1) > 0).int()
        wrong = (labels != ((x[:, 0] & x[:, 1]) ^ (x[:, 2] | x[:, 3])).long()).float().mean()
        assert x.shape[1] == 12 and low <= wrong <= high
    for options, words in (({"inputs": 3}, "inputs=3"), ({"label_noise": 0.5}, "label_noise=0.5")):
        with pytest.raises(InputError, match=words):
            BooleanCircuitData(**options)
