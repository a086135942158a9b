"""Surgery on copies: what follows the parameters, what stays, and what is refused."""

import pytest
import torch
from torch import nn

from lit_prune.errors import InputError
from lit_prune.structure import Plan, apply_plan, cost, kept_columns, make_plan, trace_groups, transfer_tensors
from lit_prune.structure.trial import FAILS


def plan_for(model: nn.Module, images, ranks, keep: float = 0.5) -> Plan:
    return make_plan(model, ranks, images, keep=keep)


def test_the_model_is_untouched_bit_for_bit_and_the_copy_has_no_hooks(build, random_ranks) -> None:
    model, images = build("cifar_resnet20")
    model.layer1.register_forward_hook(lambda *_: pytest.fail("a trainer's hook came along"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = plan_for(model, images, random_ranks(model))
    model.train()
    small = apply_plan(model, plan, images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and small.training and len(model.layer1._forward_hooks) == 1
    small.eval()(images).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_surgery_under_inference_mode_gives_a_trainable_network(build, random_ranks) -> None:
    model, images = build("convnet")
    plan = plan_for(model, images, random_ranks(model))
    with torch.inference_mode():
        small = apply_plan(model, plan, images)
    small(images).sum().backward()
    assert not any(parameter.is_inference() for parameter in small.parameters())


def test_blocks_go_first_then_channels(build) -> None:
    model, images = build("resnet18")
    blocks = Plan(("layer1.1", "layer2.1", "layer3.1"))
    small = apply_plan(model, blocks, images)
    counted = cost(small, images)
    assert (counted.params, round(counted.macs / 1e9, 4)) == (9_631_562, 0.0229)
    assert set(small.state_dict()) < set(model.state_dict())
    both = Plan(blocks.drop_blocks, {"conv1": tuple(range(1, 64))}, {"conv1": 64})
    smaller = apply_plan(model, both, images)
    assert smaller.conv1.out_channels == 63 and smaller.layer2[0].conv1.in_channels == 63
    twice = apply_plan(small, Plan((), both.keep_channels, both.sizes), images)
    assert all(torch.equal(value, twice.state_dict()[name]) for name, value in smaller.state_dict().items())


@pytest.mark.parametrize("name", ["cifar_resnet20", "mobilenet_v2", "mixed"])
def test_transferred_tensors_are_cut_exactly_as_the_parameters(build, random_ranks, name: str) -> None:
    model, images = build(name)
    plan = plan_for(model, images, random_ranks(model))
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    moved = transfer_tensors(model, plan, images, tensors)
    small = dict(apply_plan(model, plan, images).named_parameters())
    assert set(moved) == set(small)
    for key, tensor in moved.items():
        torch.testing.assert_close(tensor, small[key].detach(), rtol=0, atol=0)


def test_transfer_leaves_out_dropped_blocks_and_keeps_dtype_and_given_names(build) -> None:
    model, images = build("resnet18")
    plan = Plan(("layer1.1",), {"conv1": tuple(range(0, 64, 2))}, {"conv1": 64})
    given = {
        "conv1.weight": torch.arange(64.0).double().view(-1, 1, 1, 1).expand(64, 3, 7, 7),
        "layer1.1.conv1.weight": torch.full((64, 64, 3, 3), torch.inf),
        "bn1.bias": torch.full((64,), torch.nan),
    }
    moved = transfer_tensors(model, plan, images, given)
    assert set(moved) == {"conv1.weight", "bn1.bias"}
    assert moved["conv1.weight"].dtype == torch.float64
    assert moved["conv1.weight"][:, 0, 0, 0].tolist() == list(range(0, 64, 2))
    with pytest.raises(InputError, match="does not exist"):
        transfer_tensors(model, plan, images, {"nothing": torch.zeros(1)})


def test_kept_columns_pick_the_teachers_columns_of_the_student(build, random_ranks) -> None:
    teacher, images = build("wide_stem")
    plans, student = [], teacher
    for seed in range(2):
        plans.append(plan_for(student, images, random_ranks(student, seed), 0.6))
        student = apply_plan(student, plans[-1], images)
    columns = kept_columns(teacher, plans, "linear", images)
    assert len(columns) == student.linear.in_features < 256
    assert torch.equal(student.linear.weight, teacher.linear.weight[:, columns])
    assert kept_columns(teacher, [], "linear", images) == list(range(256))
    with pytest.raises(InputError, match="bn1"):
        kept_columns(teacher, plans, "bn1", images)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(), "removes nothing"),
        (Plan((), {"conv1": tuple(range(16))}, {"conv1": 16}), "removes nothing"),
        (Plan((), {"conv1": (0,)}, {"conv1": 17}), "'conv1' has 16 units"),
        (Plan((), {"conv9": (0,)}, {"conv9": 16}), "no group 'conv9'"),
        (Plan((), {"linear": (0,)}, {"linear": 10}), "protected"),
        (Plan(("layer9.9",)), r"layer9\.9"),
        (Plan(("layer2.0",)), r"layer2\.0"),
    ],
)
def test_plans_that_do_not_fit_are_refused(build, plan: Plan, words: str) -> None:
    model, images = build("cifar_resnet20")
    with pytest.raises(InputError, match=words) as caught:
        apply_plan(model, plan, images)
    assert "\n" not in str(caught.value)


def test_channels_whose_width_is_fixed_in_the_forward_are_protected_with_the_reason() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(images) + torch.ones(1, 4, 1, 1, device=images.device)).mean((2, 3))

    model, images = Fixed(), torch.randn(1, 3, 4, 4)
    assert trace_groups(model, images).by_name["first"].protected == FAILS
    with pytest.raises(InputError, match="protected .*does not run"):
        apply_plan(model, Plan((), {"first": (0, 1)}, {"first": 4}), images)
