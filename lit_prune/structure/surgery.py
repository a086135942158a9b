"""Surgery: a plan applied to a network, to an optimizer's tensors, to the columns of a layer."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.models import drop_blocks
from lit_prune.structure import axes
from lit_prune.structure.attributes import follow_widths
from lit_prune.structure.groups import ChannelGraph, trace_groups
from lit_prune.structure.hooks import others_hooks
from lit_prune.structure.plan import Plan
from lit_prune.structure.record import note_cut
from lit_prune.structure.tracing import copy_network, one_sample, run, traceable


@checked
def apply_plan(model: nn.Module, plan: Plan, example_input: Any) -> nn.Module:
    """A physically smaller copy of `model`: blocks first, then channels. `model` itself is untouched.

    The copy has the hooks that are part of what the network computes, and no others (a warning names them); train/eval
    and `requires_grad` flags, device, precision and memory format are the model's. It knows its plans and what it is
    called with, so that `save_compact` needs nothing else.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> apply_plan(net, Plan(keep_channels={"0": (0, 3, 5)}, sizes={"0": 8}), torch.zeros(1, 4))[2]
    Linear(in_features=3, out_features=2, bias=True)

    Args:
        model: the network that the plan was made for, or an equal one.
        plan: what to keep.
        example_input: for tracing, see `trace_groups`.

    Raises:
        InputError: the plan removes nothing or does not fit the network; the group or block is named.
        RuntimeError: an invariant does not hold afterwards; the layer is named.
    """
    if others := others_hooks(model, changing=False):
        warnings.warn(
            f"the smaller copy does not run the hooks of {', '.join(others)}, which nothing shows "
            "to be part of the network; put them on it again if it needs them",
            stacklevel=3,  # past the check of arguments
        )
    with torch.inference_mode(False):
        smaller, graph = _opened(model, plan, example_input)
        if plan.keep_channels:
            _remove(smaller, graph, plan, example_input)
        for name in plan.added_biases:
            _add_bias(_layer(smaller, name))
        if plan.keep_channels:
            follow_widths(model, smaller, example_input)
    return note_cut(smaller, model, plan, example_input)


def replay(model: nn.Module, plans: Iterable[Plan], example_input: Any) -> nn.Module:
    """The network after all the plans, one after the other; the model itself where there is none."""
    for plan in plans:
        model = apply_plan(model, plan, example_input)
    return model


def transfer_tensors(
    model: nn.Module, plan: Plan, example_input: Any, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors that belong to parameters (momentum, averages), cut exactly as `apply_plan` cuts the parameters.

    Args:
        model: the network before the plan.
        plan: the plan.
        example_input: for tracing, see `trace_groups`.
        tensors: parameter name -> tensor of that parameter's shape, any floating dtype and device.

    Returns:
        parameter name -> cut copy; names whose parameter goes with its block are left out.

    Raises:
        InputError: an unknown parameter name or another shape than the parameter's.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, tensor in tensors.items():
        if shapes.get(name) != tensor.shape:
            known = f"is {list(shapes[name])}" if name in shapes else "does not exist"
            raise InputError(f"tensors[{name!r}] is {list(tensor.shape)}, the network's parameter {known}")
    with torch.inference_mode(False):
        smaller, graph = _opened(model, plan, example_input)
        alive = [name for name, _ in smaller.named_parameters() if name in tensors]
        for name in alive:
            owner, _, key = name.rpartition(".")
            value = tensors[name].detach().clone()
            setattr(smaller.get_submodule(owner), key, nn.Parameter(value, requires_grad=False))
        if plan.removals:
            graph.remove(smaller, plan.removals)
        parameters = dict(smaller.named_parameters())
        return {name: parameters[name].detach() for name in alive}


def kept_columns(model: nn.Module, plans: Sequence[Plan], layer: str, example_input: Any) -> list[int]:
    """Input channels (columns) of `layer` in `model` that survive all `plans`, ascending.

    Args:
        model: the network before the first plan, such as the teacher.
        plans: plans applied one after the other.
        layer: qualified name of a convolution or linear layer.
        example_input: for tracing, see `trace_groups`.

    Raises:
        InputError: there is no such layer, before or after the plans.
    """
    columns = list(range(axes.width(_layer(model, layer), "in")))
    with torch.inference_mode(False):
        for plan in plans:
            model, graph = _opened(model, plan, example_input)
            _layer(model, layer)
            if plan.removals:
                lost = set(graph.lost(plan).get((layer, "in"), ()))
                columns = [column for position, column in enumerate(columns) if position not in lost]
                graph.remove(model, plan.removals)
    return columns


def check_invariants(model: nn.Module, graph: ChannelGraph) -> None:
    """Checks that the layers of `model` still fit each other as its groups before the surgery demand.

    All producers of a group have one width (so a residual add joins equal widths: the last convolution of a
    transition block and its shortcut, every block of a stage), and each reader has the columns for it.

    Raises:
        RuntimeError: a layer does not fit; layer and group are named.
    """
    for group in graph.prunable:
        if group.of_heads:
            continue  # which lie in the same layers; a trial has shown that each is right
        whole = [m for m in group.members if len(m.positions[0]) * group.size == graph.widths.get((m.module, m.axis))]
        found = {}
        for member in whole:
            actual = axes.stored_width(axes.find(model, member.module), member.axis)
            units, rest = divmod(actual, len(member.positions[0]))
            if rest:
                raise RuntimeError(
                    f"{member.module} has {actual} {member.axis} channels, not a multiple for {group.name}"
                )
            found[f"{member.module} ({member.axis})"] = units
        if len(set(found.values())) > 1:
            first = next(iter(found))
            odd = next(name for name in found if found[name] != found[first])
            raise RuntimeError(f"group {group.name}: {odd} has {found[odd]} units, {first} has {found[first]}")


def _opened(model: nn.Module, plan: Plan, example_input: Any) -> tuple[nn.Module, ChannelGraph]:
    """A copy of `model` without the plan's blocks, and its groups, which fit the plan."""
    if plan.removes_nothing:
        raise InputError("the plan removes nothing: it drops no block and keeps every channel; lower keep")
    smaller = copy_network(model)
    if plan.drop_blocks:
        drop_blocks(smaller, plan.drop_blocks, one_sample(smaller, example_input).args[0])
    if not plan.keep_channels:
        return smaller, ChannelGraph(())
    graph = trace_groups(smaller, example_input)
    for name, size in plan.sizes.items():
        group = graph.by_name.get(name)
        if group is None:
            raise InputError(
                f"the plan does not fit: the network has no group {name!r}; apply it to the one it was made for"
            )
        if group.size != size:
            raise InputError(f"the plan does not fit: group {name!r} has {group.size} units, the plan says {size}")
    return smaller, graph


def _remove(model: nn.Module, graph: ChannelGraph, plan: Plan, example_input: Any) -> None:
    """Removes the plan's channels from `model` in place and checks that it is sound and runs."""
    if plan.removals:
        graph.remove(model, plan.removals)
        check_invariants(model, graph)
        with traceable(model):
            try:
                run(model, one_sample(model, example_input))
            except InputError as error:
                groups = ", ".join(plan.removals)
                raise RuntimeError(f"the network does not run without channels of {groups}: {error}") from error


def _add_bias(module: nn.Module) -> None:
    """Gives a layer that has none a bias of zeros; the outputs stay the same."""
    if module.bias is None:
        width = axes.width(module, "out")
        module.bias = nn.Parameter(module.weight.new_zeros(width), requires_grad=module.weight.requires_grad)


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise InputError(f"layer {name!r} is not in the network; give a convolution or linear layer") from error
    if not axes.is_weighted(module):
        raise InputError(f"layer {name!r} is a {type(module).__name__}; give a convolution or linear layer")
    return module
