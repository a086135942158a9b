"""Where a reduction happens: the classifier's inputs, a group of channels, or the heads of an attention."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.lab.reduce.attention import AttentionSite, NetworkState
from lit_prune.lab.reduce.head import HeadSite
from lit_prune.lab.reduce.images import Batches
from lit_prune.measurement.layers import removing
from lit_prune.replace import Interchange, Reduced, Replacement, Swaps, interchange, replace_mechanisms
from lit_prune.replace.curvature import Curvature, measure_curvature
from lit_prune.replace.heads import attention_with_heads, is_attention
from lit_prune.running import undisturbed
from lit_prune.scores import score
from lit_prune.structure import Budget, ChannelGraph, Group, Plan, trace_groups
from lit_prune.structure.ranking import group_scores
from lit_prune.task.batches import to_network
from lit_prune.train.evaluation import evaluate


@dataclass(frozen=True)
class GroupSite:
    """A group of channels inside the network; every step runs the network.

    Attributes:
        model: the original.
        group: the group.
        example: [1, C, H, W].
    """

    model: nn.Module
    group: Group
    example: Tensor
    curvature_method: str = "gauss_newton"

    @property
    def size(self) -> int:
        """Number of units."""
        return self.group.size

    def begin(self, batches: Batches) -> NetworkState:
        """The original network."""
        return NetworkState(batches, self.model, tuple(range(self.size)), {})

    def rank(self, state: NetworkState, name: str, seed: int) -> Tensor:
        """Scores by `lit_prune.score` on the network as it is now."""
        return site_scores(state.model, self.group.name, name, state.batches, seed, self.example)

    def reduce(self, state: NetworkState, kept: Sequence[int], kind: str, settings: Replacement) -> NetworkState:
        """One more `replace_mechanisms`."""
        places = tuple(place for place, unit in enumerate(state.kept) if unit in set(kept))
        plan = Plan((), {self.group.name: places}, {self.group.name: len(state.kept)})
        found = replace_mechanisms(state.model, plan, state.batches, kind, self.example, settings=settings)
        biases = tuple(dict.fromkeys((*state.added_biases, *found.plan.added_biases)))
        return NetworkState(state.batches, found.model, tuple(sorted(kept)), _said(found.report), biases)

    def test(self, batches: Batches) -> Batches:
        """The images themselves."""
        return batches

    def verify(self, state: NetworkState, test: Batches, swaps: Swaps) -> tuple[float, Interchange]:
        """Runs both networks."""
        reduced = Reduced(state.model, {}, self._plan(state))
        found = interchange(self.model, reduced, test, self.example, swaps=swaps)
        return evaluate(state.model, test).figure, found

    def network(self, state: NetworkState) -> tuple[nn.Module, Plan]:
        """The network of the state."""
        return state.model, self._plan(state)

    def curvature(self, state: NetworkState, seed: int) -> dict[str, Curvature]:
        """Curvature at each reader of the group."""
        return measure_curvature(self.model, self.group.consumers, state.batches, seed)

    def _plan(self, state: NetworkState) -> Plan:
        name = self.group.name
        return Plan((), {name: state.kept}, {name: self.size}, added_biases=state.added_biases)


Site = GroupSite | HeadSite | AttentionSite
"""A layer whose units can be scored, replaced and verified."""


def _said(report: dict[str, Any]) -> dict[str, Any]:
    """What a replacement says about its readers, one value a field (the largest error, the total of systems)."""
    layers = report["layers"]
    said: dict[str, Any] = {"kind": report["kind"], "readers": list(layers), "refused": report["refused"]}
    for key, merge in (("error", max), ("border_error", max), ("singular", sum)):
        values = [entry[key] for entry in layers.values() if key in entry]
        said |= {key: merge(values)} if values else {}
    for key in ("ridge", "curvature", "parents"):
        values = [entry[key] for entry in layers.values() if key in entry]
        said |= {key: values[0]} if values else {}
    return said


def site_scores(model: nn.Module, group: str, name: str, batches: Batches, seed: int, example: Tensor) -> Tensor:
    """Scores of the units of one group, [size]. InputError: the score says nothing about the group."""
    ranks = score(model, name, batches, seed=seed)
    values, _ = group_scores(trace_groups(model, example), ranks, Budget(only=(group,)))
    return torch.as_tensor(values[group])


def find_site(model: nn.Module, layer: str | None, example: Tensor) -> Site:
    """The site that `layer` names.

    Args:
        model: the network.
        layer: a group, the classifier, a linear layer or convolution that alone reads a group, or an attention module;
            None: the classifier's inputs.
        example: [1, C, H, W].

    Raises:
        InputError: there is no such layer (near matches are named), its units cannot be removed, or what reads them is
            not affine.
    """
    modules = dict(model.named_modules())
    last = last_affine(model, example)
    layer = last if layer is None else layer
    if layer is None:
        raise InputError("request.layer: the network does not end in a linear layer; name a group of channels")
    if is_attention(modules.get(layer)):
        attention_with_heads(model, layer)  # refuses one whose heads cannot be taken apart
        return AttentionSite(model, layer)
    graph = trace_groups(model, example)
    if layer == last:
        alone = [group for group in graph.prunable if group.consumers == (last,) and group.role != "width"]
        feeding = [group for group in alone if _reads_alone(model, group, last)]
        return HeadSite(model, last, feeding[0] if feeding else None, example)
    read = [group for group in graph.groups if layer in group.consumers]
    group = graph.by_name.get(layer) or (read[0] if len(read) == 1 else None)
    if group is None:
        raise InputError(_not_found(layer, modules, graph, last))
    if group.protected:
        raise InputError(f"request.layer={layer!r}: its units cannot be removed: {group.protected}")
    if group.role == "width":
        raise InputError(f"request.layer={layer!r}: a norm reads its units together; name a layer inside a block")
    if group.consumers == (last,) and _reads_alone(model, group, last):
        return HeadSite(model, last, group, example)
    _check_affine(model, layer, group)
    return GroupSite(model, group, example)


def last_affine(model: nn.Module, example: Tensor) -> str | None:
    """Name of the linear layer whose output is the network's output, None where there is none."""
    outputs: dict[int, str] = {}
    held: list[Tensor] = []

    def keep(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        outputs[id(output)] = name
        held.append(output)

    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(partial(keep, name)) for name, module in linear]
    with removing(handles), undisturbed(model):
        return outputs.get(id(model(to_network(example, model))))


def _reads_alone(model: nn.Module, group: Group, head: str) -> bool:
    """Whether a unit of the group is one input of the head (not a flattened map)."""
    return group.size == model.get_submodule(head).in_features


def _check_affine(model: nn.Module, layer: str, group: Group) -> None:
    if not group.consumers:
        raise InputError(f"request.layer={layer!r}: no affine layer reads its units, so nothing can be folded")
    for name in group.consumers:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear | nn.Conv2d) or getattr(module, "groups", 1) > 1:
            raise InputError(
                f"request.layer={layer!r}: its reader {name!r} ({type(module).__name__}) is not affine in one unit at "
                "a time; choose a layer that linear layers or ungrouped convolutions read"
            )


def _not_found(layer: str, modules: dict[str, nn.Module], graph: ChannelGraph, last: str | None) -> str:
    known = [*graph.by_name, *(name for name, module in modules.items() if is_attention(module)), last]
    known = list(dict.fromkeys(name for name in known if name))
    near = difflib.get_close_matches(layer, known, n=3, cutoff=0.4) or known[-4:]
    kind = f"is a {type(modules[layer]).__name__}, not a layer with units" if layer in modules else "is not there"
    return f"request.layer={layer!r} {kind}; did you mean {', '.join(near)}?"
