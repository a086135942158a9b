"""Blocks, stages, protection and reconstruction: the four hooks that port block pruning to a network.

Source: M2M-DC, section 3.1 and Appendix A.
"""

import difflib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.models.families import FAMILIES, Block, sequences
from lit_prune.models.residual import Skip, residual_blocks
from lit_prune.running import removing, undisturbed


def find_blocks(model: nn.Module, example_input: Tensor) -> tuple[Block, ...]:
    """Blocks of the network in forward order, the protected ones included; empty where none could be removed.

    Protection is measured: in one forward pass (the model is left as found) a block whose output has another shape
    than its input is protected, as is one that holds its own shortcut layers or has no residual connection in a
    residual family. Known families: ResNets (torchvision, timm, CIFAR), inverted residuals (torchvision MobileNets),
    plain convolutions in one `features` (VGG, AlexNet), and any Sequential of like modules (ConvNeXt, ViT, DeiT,
    EfficientNet, ...). Beside them every module that computes `x + f(x)` is a block, wherever it stands (see
    `residual`); leaving it out leaves the x.

    Args:
        model: The backbone, dense or already pruned.
        example_input: Images [N, C, H, W] that the model accepts, on its device; N = 1 suffices.
    """
    blocks = _measured(model, _all_blocks(model, example_input), example_input)
    return blocks if any(not block.protected for block in blocks) else ()


def drop_blocks(model: nn.Module, names: Iterable[str], example_input: Tensor | None = None) -> None:
    """Removes the named blocks, in place; every other module and its state_dict keys stay the very same.

    Args:
        model: The backbone to cut.
        names: Block names as in `find_blocks`.
        example_input: As in `find_blocks`. Without it only the protection that shows in the structure is enforced,
            as suits the replay of a plan that was checked when it was made.

    Raises:
        InputError: A name that is no block, a protected block, or a stage left without a block; nothing is removed.
    """
    if example_input is None:
        blocks = _candidates(model)
    else:
        blocks = _measured(model, _all_blocks(model, example_input), example_input)
    dropped = set(names)
    _check_removable(blocks, dropped)
    for block in blocks:
        if block.name in dropped:
            _delete_members(model, block)


def dropped_by_keep_configuration(blocks: Sequence[Block], kept: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """Names of the blocks that a hand-written keep configuration removes, in forward order.

    Args:
        blocks: Result of `find_blocks`.
        kept: Stage to the positions of its blocks that stay, as `{"layer1": [0], "layer2": [0, 1]}`; a stage that is
            not named keeps all. Source: paper, section 3.1, `keep_cfg`.

    Raises:
        InputError: Unknown stage, position outside the stage, protected block not kept, or a stage left empty.
    """
    stages: dict[str, list[Block]] = {}
    for block in blocks:
        stages.setdefault(block.stage, []).append(block)
    dropped: set[str] = set()
    for stage, positions in kept.items():
        if stage not in stages:
            raise InputError(f"keep configuration: stage {stage!r} is unknown: use one of {', '.join(stages)}")
        size = len(stages[stage])
        outside = [position for position in positions if not 0 <= position < size]
        if outside:
            raise InputError(f"keep configuration: {stage} has positions 0 to {size - 1}, got {outside[0]}")
        dropped |= {block.name for position, block in enumerate(stages[stage]) if position not in positions}
    _check_removable(blocks, dropped)
    return tuple(block.name for block in blocks if block.name in dropped)


def find_head(model: nn.Module) -> str:
    """Qualified name of the classifier: the last Linear in module order. InputError: The network has no Linear."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise InputError(f"{type(model).__name__} has no Linear layer, so no classifier head: use another backbone")
    return linears[-1]


def _candidates(model: nn.Module) -> tuple[Block, ...]:
    """Blocks by structure alone, of the first family that has any."""
    return next((blocks for family in (*FAMILIES.values(), sequences) if (blocks := tuple(family(model)))), ())


def _all_blocks(model: nn.Module, example_input: Tensor) -> tuple[Block, ...]:
    """Blocks by structure, and residual blocks anywhere else."""
    blocks = _candidates(model)
    with undisturbed(model):
        return blocks + tuple(residual_blocks(model, example_input, [name for b in blocks for name in b.members]))


@dataclass
class _Passage:
    """What passed through one block in the measuring forward."""

    before: list[tuple[int, ...]] = field(default_factory=list)
    after: list[tuple[int, ...]] = field(default_factory=list)
    order: float = math.inf  # not reached sorts last

    @property
    def obstacle(self) -> str:
        """Why the block cannot be left out, or ''."""
        if not self.before or not self.after:
            return "not reached by the forward pass"
        changed = next(((a, b) for a, b in zip(self.before, self.after, strict=False) if a != b), None)
        return f"changes shape {_text(changed[0])} -> {_text(changed[1])}" if changed else ""


def _measured(model: nn.Module, blocks: tuple[Block, ...], example_input: Tensor) -> tuple[Block, ...]:
    """The blocks in forward order, protected also by the shapes that one forward pass shows."""
    passages = {block.name: _Passage() for block in blocks}
    with _recording(model, blocks, passages), undisturbed(model):
        model(example_input)
    in_order = sorted(blocks, key=lambda block: passages[block.name].order)
    return tuple(replace(block, protected=passages[block.name].obstacle or block.protected) for block in in_order)


@contextmanager
def _recording(model: nn.Module, blocks: Sequence[Block], passages: dict[str, _Passage]) -> Iterator[None]:
    """Hooks on the first and last member of every block, gone on exit."""
    reached = itertools.count()

    def enter(passage: _Passage, _module: nn.Module, inputs: tuple) -> None:
        passage.order = min(passage.order, next(reached))
        passage.before.append(_shape(inputs))

    def leave(passage: _Passage):
        return lambda _module, _inputs, output: passage.after.append(_shape(output))

    handles = []
    for block in blocks:
        first, last = model.get_submodule(block.members[0]), model.get_submodule(block.members[-1])
        handles.append(first.register_forward_pre_hook(partial(enter, passages[block.name])))
        handles.append(last.register_forward_hook(leave(passages[block.name])))
    with removing(handles):
        yield


def _shape(value: Tensor | tuple) -> tuple[int, ...]:
    """Shape of the first tensor without its batch dimension."""
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return tuple(value.shape[1:]) if isinstance(value, Tensor) else ()


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _check_removable(blocks: Sequence[Block], dropped: set[str]) -> None:
    known = {block.name: block for block in blocks}
    for name in sorted(dropped - known.keys()):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the blocks are {', '.join(known) or 'none'}"
        raise InputError(f"block {name!r} does not exist: {hint}")
    for block in blocks:
        if block.name in dropped and block.protected:
            raise InputError(f"block {block.name!r} is protected ({block.protected}): keep it")
    survivors = Counter(block.stage for block in blocks if block.name not in dropped)
    for block in blocks:
        if not survivors[block.stage]:
            raise InputError(f"dropping {block.name!r} would empty stage {block.stage!r}: keep one of its blocks")


def _delete_members(model: nn.Module, block: Block) -> None:
    """Deletes by attribute, since `del sequential[i]` would renumber the children that stay.

    Outside a sequence something has to run in the block's place.
    """
    for member in block.members:
        parent, _, child = member.rpartition(".")
        holder = model.get_submodule(parent)
        if isinstance(holder, nn.Sequential):
            delattr(holder, child)
        else:
            setattr(holder, child, Skip())
