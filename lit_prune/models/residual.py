"""Residual blocks of any network, found by following what a module hands through unchanged."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lit_prune.models.families import Block
from lit_prune.running import removing

_ADDITIONS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
_TRANSPARENT = (
    *(F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.hardtanh, F.dropout),
    *(Tensor.contiguous, Tensor.clone, Tensor.to, Tensor.type_as),
)


class Skip(nn.Module):
    """What stays of a residual block without its branch: the first argument comes out."""

    def forward(self, values: Tensor, *args: object, **kwargs: object) -> Tensor:
        """`values` itself."""
        return values


@dataclass
class _Frame:
    """One running call of a module.

    Attributes:
        name: qualified name of the module.
        entered: its first argument, a copy.
        derived: tensors that depend on it, by identity; they are held, so that none is used again.
        carried: those of them that equal it when every branch added to it is 0.
        added: whether something has been added to it.
    """

    name: str
    entered: Tensor
    derived: dict[int, Tensor] = field(default_factory=dict)
    carried: set[int] = field(default_factory=set)
    added: bool = False


def residual_blocks(model: nn.Module, example_input: Tensor, taken: Sequence[str] = ()) -> Iterator[Block]:
    """The smallest modules that compute `x + f(x)`, or `relu(x + f(x))` of an x that the ReLU does not change.

    Args:
        model: the network in evaluation mode.
        example_input: images [N, C, H, W].
        taken: names of modules that are blocks already; neither they nor what lies in or around them is one.
    """
    watch = _Watch()
    with torch.no_grad(), _watching(model, watch):
        model(example_input)
    good = [name for name in watch.residual if name not in watch.other and name]
    for name in good:
        inner = any(other.startswith(f"{name}.") for other in good)
        if not inner and not any(_overlap(name, other) for other in taken):
            yield Block(name, name.rpartition(".")[0] or "network", (name,))


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


@contextmanager
def _watching(model: nn.Module, watch: "_Watch") -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if next(module.children(), None) is not None:
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: watch.enter(name, args)))
            handles.append(module.register_forward_hook(lambda _, args, output: watch.leave(output)))
    with removing(handles), watch:
        yield


class _Watch(TorchFunctionMode):
    """Follows the first argument of every module that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[_Frame | None] = []
        self.residual: dict[str, None] = {}
        self.other: set[str] = set()

    def enter(self, name: str, args: tuple) -> None:
        """A module begins."""
        frame = None
        if args and isinstance(args[0], Tensor):
            frame = _Frame(name, args[0].clone(), {id(args[0]): args[0]}, {id(args[0])})
        else:
            self.other.add(name)
        self.frames.append(frame)

    def leave(self, output: object) -> None:
        """A module ends."""
        frame = self.frames.pop()
        if frame is not None:
            through = isinstance(output, Tensor) and id(output) in frame.carried and frame.added
            self.residual.update({frame.name: None} if through else {})
            self.other.update(set() if through else {frame.name})

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Runs the function."""
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        for frame in filter(None, self.frames):
            if any(id(tensor) in frame.derived for tensor in read):
                through = self._through(frame, function, args, kwargs, read)
                frame.derived.update({id(tensor): tensor for tensor in written})
                frame.carried -= {id(tensor) for tensor in written}
                frame.carried |= {id(tensor) for tensor in written} if through else set()
        return output

    def _through(self, frame: _Frame, function, args: tuple, kwargs: dict, read: list[Tensor]) -> bool:
        """Whether the argument of the module passes this function unchanged."""
        passing = [tensor for tensor in read if id(tensor) in frame.carried]
        if len(passing) != 1:
            return False
        if function in _ADDITIONS and len(read) == 2 and not kwargs:
            other = read[1] if read[0] is passing[0] else read[0]
            branch = id(other) in frame.derived and other.shape == passing[0].shape
            frame.added |= branch
            return branch
        if function in _TRANSPARENT and len(read) == 1 and read[0] is args[0] and not frame.entered.is_meta:
            return torch.equal(function(frame.entered.clone(), *args[1:], **kwargs), frame.entered)
        return False
