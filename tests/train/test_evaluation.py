import pytest
import torch

from lit_prune.errors import InputError
from lit_prune.train.evaluation import evaluate


def test_accuracy_and_loss_of_all_images_whatever_the_batches(tiny_net):
    torch.manual_seed(0)
    images, labels = torch.randn(10, 3, 8, 8), torch.randint(0, 4, (10,))
    logits = tiny_net(images)
    parts = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    result = evaluate(tiny_net.train(), parts)
    assert result.figure == (logits.argmax(1) == labels).double().mean().item()
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits.double(), labels).item(), rel=1e-6)
    assert result.images == 10 and tiny_net.training


def test_ranks_add_as_sums(tiny_net):
    torch.manual_seed(0)
    images, labels = torch.randn(9, 3, 8, 8), torch.randint(0, 4, (9,))
    shares = []
    evaluate(tiny_net, [(images[:2], labels[:2])], lambda sums: shares.append(sums) or sums)
    both = evaluate(tiny_net, [(images[2:], labels[2:])], lambda sums: sums + shares.pop(0))
    whole = evaluate(tiny_net, [(images, labels)])
    assert (both.figure, both.images) == (whole.figure, whole.images)
    assert both.loss == pytest.approx(whole.loss, rel=1e-6)


def test_no_batches_is_an_error(tiny_net):
    with pytest.raises(InputError, match="there is no batch in it"):
        evaluate(tiny_net, [])


@pytest.mark.parametrize("task", [None, "classification"])
def test_where_one_rank_has_no_batch_every_rank_says_so_and_none_waits(tiny_net, task):
    told = []
    with pytest.raises(InputError, match="batch"):
        evaluate(tiny_net, [], lambda sums: told.append(sums) or sums, task)
    assert [sums.tolist() for sums in told] == [[1.0]]
    with pytest.raises(InputError, match="1 other ranks refused"):
        evaluate(tiny_net, [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))], lambda sums: sums + told[0], task)
