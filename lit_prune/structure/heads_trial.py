"""The trial that every group of an attention passes: without some units it gives what it gives with them silenced."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lit_prune.structure import axes
from lit_prune.structure.attention import MIXERS
from lit_prune.structure.attention_parts import Attention
from lit_prune.structure.coupling import Group, Member, common_scope
from lit_prune.structure.cutting import cut_layer
from lit_prune.structure.example import cloned
from lit_prune.structure.known import built, called_with
from lit_prune.structure.tracing import sketch_network

ROLE = "heads"
WIDTH = "head_width"
_CLOSE = 1e-4  # of the largest value: rounding of products that are summed over fewer heads
_Call = tuple[tuple, dict]


def protected_attention(name: str, size: int, reason: str, role: str) -> Group:
    """A group of an attention that stays, and why."""
    return Group(name, size, (), f"attention: {reason}", role=role)


class Trials:
    """Trials of the groups of one network's attentions; what one said holds for others that are built and called alike.

    That is the same program with other weights: the same modules, attributes and tensors of whole numbers, the same
    members and the same form of arguments. A trial whose silenced units changed nothing says nothing of others.
    """

    def __init__(self, model: nn.Module, calls: Mapping[str, _Call]) -> None:
        self._model, self._calls = model, calls
        self._whole: dict[str, list[Tensor]] = {}  # outputs of scopes
        self._passed: dict[Hashable, tuple[Member, ...]] = {}  # attributes, their modules named from the scope on

    def tried(self, group: Group, attention: Attention) -> Group:
        """The group with the attributes that must follow, or protected if no choice of them passes the trial."""
        scope = _scope(attention.name, group)
        if scope not in self._calls:
            return protected_attention(group.name, group.size, "no module runs that holds all of it", group.role)
        if group.size < 2:
            return protected_attention(group.name, group.size, "it has one position", group.role)
        call = self._calls[scope]
        members = tuple((m.module[len(scope) :], m.axis, m.positions) for m in group.members)
        own = (attention.name[len(scope) :], attention.heads, group.role, bool(group.consumers), members)
        form = (built(self._model.get_submodule(scope)), called_with(call), own)
        if form in self._passed:
            moved = (replace(member, module=scope + member.module) for member in self._passed[form])
            return replace(group, members=(*moved, *group.members))
        passed, silenced = _tried(self._model, group, attention, scope, call)
        if not passed.protected and not _alike(self._output(scope), silenced):
            attributes = passed.members[: len(passed.members) - len(group.members)]
            self._passed[form] = tuple(replace(member, module=member.module[len(scope) :]) for member in attributes)
        return passed

    def _output(self, scope: str) -> list[Tensor]:
        if scope not in self._whole:
            with torch.no_grad():
                self._whole[scope] = _output(self._model.get_submodule(scope), self._calls[scope])
        return self._whole[scope]


def _tried(model: nn.Module, group: Group, attention: Attention, scope: str, call: _Call) -> tuple[Group, list[Tensor]]:
    """The group after its trial, and the output with its units silenced."""
    removed = list(range(1, group.size, 2))
    whole = model.get_submodule(scope)
    with torch.no_grad():
        expected = _reference(model, whole, scope, group, attention, removed, call)
    reason = "no attribute that states the number of heads was found"
    choices = _choices if group.role == ROLE else _width_choices
    for attributes in choices(model, group, attention, scope):
        members = (*attributes, *group.members)
        try:
            with torch.no_grad():
                actual = _output(_changed(whole, scope, members, removed, cut_layer), call)
        except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
            reason = f"its forward does not run without a part of it ({str(error).splitlines()[0][:80]})"
            continue
        if _alike(actual, expected):
            return replace(group, members=members), expected
        reason = "without a part of it its output is not that with this part silenced"
    return protected_attention(group.name, group.size, reason, group.role), expected


def _reference(
    model: nn.Module,
    whole: nn.Module,
    scope: str,
    group: Group,
    attention: Attention,
    removed: Sequence[int],
    call: _Call,
) -> list[Tensor]:
    """What the module gives with the units silenced: their columns in the reader, or queries and keys, are zeros."""
    if not group.consumers:
        return _output(_changed(whole, scope, group.members, removed, _zeroed), call)
    columns = next(m.positions for m in group.members if m.axis == "in")
    with _silenced(model, attention, [column for unit in removed for column in columns[unit]]):
        return _output(whole, call)


def _choices(model: nn.Module, group: Group, attention: Attention, scope: str) -> Iterator[tuple[Member, ...]]:
    """Attributes that may have to follow: numbers of heads, with and without widths of all heads."""
    widths = {len(m.positions[0]) * group.size for m in group.members if len(m.positions[0]) > 1}
    heads, sizes = [], []
    for holder, key, value in _numbers(model, scope, attention.name):
        if value == group.size and _counts_heads(key):
            heads.append(Member(holder, f"heads:{key}", tuple((head,) for head in range(group.size))))
        elif value in widths:
            each = value // group.size
            rows = tuple(tuple(range(head * each, head * each + each)) for head in range(group.size))
            sizes.append(Member(holder, f"attribute:{key}", rows))
    inner = [member for member in sizes if _of_heads(member.axis)]
    if heads:
        alone = ((head, *inner) for head in heads)  # the values may have heads of their own
        yield from dict.fromkeys(((*heads, *inner), tuple(heads), (*heads, *sizes), *alone))


def _width_choices(model: nn.Module, group: Group, attention: Attention, scope: str) -> Iterator[tuple[Member, ...]]:
    """Attributes that may have to follow: the width of a head, and that of all its heads for values."""
    values = bool(group.consumers)
    own, across = [], []
    for holder, key, value in _numbers(model, scope, attention.name):
        if value == group.size and key.endswith(("dim", "size")) and ("value" in key) == values:
            own.append(Member(holder, f"attribute:{key}", tuple((place,) for place in range(group.size))))
        elif values and value == attention.heads * group.size and _of_heads(key):
            rows = tuple(tuple(range(place, value, group.size)) for place in range(group.size))
            across.append(Member(holder, f"attribute:{key}", rows))
    yield from dict.fromkeys(((*own, *across), tuple(own), ()))


def _counts_heads(key: str) -> bool:
    """Whether the name of a whole number may be that of the number of heads."""
    return key in ("h", "nh") or ("head" in key and not key.endswith(("dim", "size")))


def _of_heads(key: str) -> bool:
    """Whether the name of a width says that it is that of all heads, and not the embedding's."""
    return "attn" in key or "head" in key


def _numbers(model: nn.Module, scope: str, name: str) -> Iterator[tuple[str, str, int]]:
    """Module, attribute and value of the whole numbers that the attention and what is around it up to `scope` state."""
    for holder in _between(scope, name):
        for key, value in vars(model.get_submodule(holder)).items():
            if type(value) is int:
                yield holder, key, value


def _between(scope: str, name: str) -> list[str]:
    """`name` and the modules around it up to `scope`, innermost first."""
    found = [name]
    while found[-1] != scope:
        found.append(found[-1].rpartition(".")[0])
    return found


def _changed(
    whole: nn.Module, scope: str, members: Sequence[Member], removed: Sequence[int], change: Callable
) -> nn.Module:
    """A copy of the module `scope` in which what `removed` units have of each member is changed."""
    holder = nn.Module()
    holder.scope = sketch_network(whole)
    for member in members:
        inner = f"scope.{member.module[len(scope) :].lstrip('.')}".rstrip(".")
        change(holder, inner, member.axis, [place for unit in removed for place in member.positions[unit]])
    return holder.scope


def _zeroed(model: nn.Module, name: str, axis: str, positions: list[int]) -> None:
    """Zeros in these positions of a layer's outputs or of a bare parameter."""
    found = axes.find(model, name)
    tensors = [name] if isinstance(found, Tensor) else [f"{name}.{key}" for key, _ in found.named_parameters()]
    for tensor in tensors:
        owner, _, key = tensor.rpartition(".")
        values = axes.find(model, tensor)
        dim = int(axis[4:]) if axis.startswith("dim:") else 0
        silent = values.detach().index_fill(dim, torch.tensor(positions, device=values.device), 0.0)
        module = model.get_submodule(owner)
        setattr(module, key, nn.Parameter(silent) if key in module._parameters else silent)


@contextmanager
def _silenced(model: nn.Module, attention: Attention, lost: list[int]) -> Iterator[None]:
    """The layer that reads the heads sees zeros in the columns `lost`."""
    weight = axes.find(model, attention.reader)

    class Silence(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if function in MIXERS and (args[1] if len(args) > 1 else kwargs["weight"]) is weight:
                dim = args[0].dim() - 1 if function.__name__ == "linear" else 1
                index = torch.tensor(lost, device=args[0].device)
                args = (args[0].index_fill(dim, index, 0.0), *args[1:])
            return function(*args, **kwargs)

    with Silence():
        yield


def _output(module: nn.Module, call: _Call) -> list[Tensor]:
    args, kwargs = cloned(call)
    return [leaf for leaf in tree_leaves(module(*args, **kwargs)) if isinstance(leaf, Tensor)]


def _alike(actual: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether the first outputs agree; further ones (weights of each head) may have lost heads."""
    if not actual or actual[0].shape != expected[0].shape:
        return False
    difference = (actual[0] - expected[0]).abs().max()
    return bool(difference <= _CLOSE * expected[0].abs().max())


def _scope(name: str, group: Group) -> str:
    """The smallest module that holds the attention and all its members."""
    names = [name, *(m.module if m.axis in ("in", "out") else m.module.rpartition(".")[0] for m in group.members)]
    return common_scope(names)
