import copy

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, kl_divergence

from lit_prune.errors import InputError
from lit_prune.train.distillation import Distillation, Repair, cosine_distance, divergence


def term_after(term: Distillation, net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Value of the term for a training step that calls the network once, its norms in evaluation mode."""
    for module in net.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    net(images)
    return term()


def first() -> tuple[int, int]:
    return 0, 5


def test_cosine_distance_of_equal_opposite_and_orthogonal_vectors():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert cosine_distance(a, a) == 0 and cosine_distance(a, -a) == 2 and cosine_distance(a, b) == 1
    mixed = cosine_distance(torch.cat([a, a, a]), torch.cat([a, -a, b]))
    torch.testing.assert_close(mixed, torch.tensor(1.0)), "cosines are per sample, then averaged"


def test_divergence_equals_the_library_s_kl_at_the_temperature():
    student, teacher = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).unbind()
    wanted = kl_divergence(Categorical(logits=teacher / 3), Categorical(logits=student / 3)).mean() * 9
    torch.testing.assert_close(divergence(student, teacher, 3.0), wanted)
    torch.testing.assert_close(divergence(teacher, teacher, 3.0), torch.tensor(0.0))


def test_weights_ramp_linearly_from_zero_to_the_full_value():
    ramp = [Repair(alpha=0.1, beta=0.2).weights(epoch, 5) for epoch in range(5)]
    assert ramp == [pytest.approx((0.1 * t / 4, 0.2 * t / 4)) for t in range(5)]
    assert Repair().weights(0, 1) == (0.1, 0.1), "one epoch cannot ramp"
    assert Repair(ramp=False).weights(0, 5) == (0.1, 0.1)


def test_a_student_equal_to_its_teacher_pays_nothing(tiny_net):
    teacher = copy.deepcopy(tiny_net)
    term = Distillation(Repair(ramp=False), tiny_net, teacher, first, "head")
    assert abs(term_after(term, tiny_net, torch.randn(4, 3, 8, 8)).item()) < 1e-6


def test_first_epoch_of_a_ramp_is_plain_cross_entropy(tiny_net):
    term = Distillation(Repair(), tiny_net, copy.deepcopy(tiny_net), first, "head")
    value = term_after(term, tiny_net, torch.randn(4, 3, 8, 8))
    assert value == 0 and not value.requires_grad and term.evaluations == 0


def test_gradients_reach_the_student_alone(tiny_net):
    teacher = copy.deepcopy(tiny_net)
    nn.init.normal_(teacher.head.weight)
    term = Distillation(Repair(ramp=False), tiny_net, teacher, first, "head")
    term_after(term, tiny_net, torch.randn(4, 3, 8, 8)).backward()
    assert tiny_net.stem[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_features_of_unequal_width_are_compared_at_the_kept_positions(tiny_net):
    torch.manual_seed(1)
    teacher = copy.deepcopy(tiny_net)

    class Narrow(nn.Module):  # emits the teacher's features 1, 3, 4
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, images):
            trunk = tiny_net.stem(images)
            inner = torch.relu(tiny_net.bn1(tiny_net.conv1(trunk)))
            trunk = torch.relu(trunk + tiny_net.bn2(tiny_net.conv2(inner)))
            return self.head(trunk.mean((2, 3))[:, [1, 3, 4]])

    student = Narrow()
    features_only = Repair(alpha=0.0, beta=1.0, ramp=False)
    images = torch.randn(4, 3, 8, 8)
    right = Distillation(features_only, student, teacher, first, "head", columns=[1, 3, 4])
    assert term_after(right, student, images).item() == pytest.approx(0, abs=1e-6)
    right.remove()
    wrong = Distillation(features_only, student, teacher, first, "head", columns=[0, 3, 4])
    assert term_after(wrong, student, images).item() > 1e-4


def test_remove_leaves_no_hook_behind(tiny_net):
    term = Distillation(Repair(), tiny_net, copy.deepcopy(tiny_net), first, "head")
    term.remove()
    assert not tiny_net.head._forward_pre_hooks and not tiny_net._forward_hooks
    assert not term.teacher.head._forward_pre_hooks


@pytest.mark.parametrize("bad", [{"alpha": -1.0}, {"temperature": 0.0}, {"gradient_clip": -1.0}, {"form": "l2"}])
def test_weights_out_of_range_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Repair(**bad)
