"""How each family of networks is cut into blocks and stages, read from the module structure alone.

A family is a function from a network to its blocks in module order, empty where the network is of another family.
Blocks are children of an `nn.Sequential`, because that is what can be left out without touching any forward method.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeGuard

from torch import nn

from lit_prune.registry import Registry


@dataclass(frozen=True)
class Block:
    """A unit of removal.

    Attributes:
        name: Qualified name of the block, for a run of plain layers that of its convolution.
        stage: Label of the stage it belongs to; every stage keeps at least one block.
        members: Qualified names of the modules that go together, in forward order.
        protected: Why it must stay, or "".
    """

    name: str
    stage: str
    members: tuple[str, ...]
    protected: str = ""


Family = Callable[[nn.Module], Iterator[Block]]
FAMILIES: Registry[Family] = Registry("family")


def register_family(family: Family) -> Family:
    """Function decorator: `find_blocks` asks this family too, after those before it and before `sequences`."""
    return FAMILIES.add(family.__name__, family)


@register_family
def residual_stages(model: nn.Module) -> Iterator[Block]:
    """ResNets: the children of `layer1`, `layer2`, ...; one stage each."""
    for stage, sequence in model.named_children():
        if re.fullmatch(r"layer\d+", stage) and _is_sequence_of_blocks(sequence):
            yield from _children_as_blocks(stage, sequence)


@register_family
def inverted_residuals(model: nn.Module) -> Iterator[Block]:
    """MobileNets of torchvision: InvertedResiduals of `features`; a new stage at each one without a residual sum."""
    features = getattr(model, "features", None)
    if not _is_sequence(features):
        return
    stage = 0
    for name, child in features.named_children():
        if type(child).__name__ == "InvertedResidual":
            obstacle = _structural_obstacle(child)
            stage += bool(obstacle)
            yield Block(f"features.{name}", f"stage{max(stage, 1)}", (f"features.{name}",), obstacle)


@register_family
def plain_convolutions(model: nn.Module) -> Iterator[Block]:
    """VGG and its like, one `features` of leaves: a convolution with what follows it; stages between the pools."""
    features = getattr(model, "features", None)
    if not _is_sequence(features) or not all(_is_leaf(child) for child in features):
        return
    members: list[str] = []
    stage, obstacle = 1, ""
    for name, child in features.named_children():
        pools = "Pool" in type(child).__name__
        if members and (isinstance(child, nn.Conv2d) or pools):
            yield Block(members[0], f"stage{stage}", tuple(members), obstacle)
            members = []
        stage += pools
        if isinstance(child, nn.Conv2d):
            members, obstacle = [f"features.{name}"], _convolution_obstacle(child)
        elif members:
            members.append(f"features.{name}")
    if members:
        yield Block(members[0], f"stage{stage}", tuple(members), obstacle)


def sequences(model: nn.Module) -> Iterator[Block]:
    """Any network: the children of each innermost Sequential of two or more like modules; one stage each."""
    found = {
        name: module for name, module in model.named_modules() if _is_sequence_of_blocks(module) and len(module) > 1
    }
    for stage, sequence in found.items():
        if not any(other != stage and _is_inside(other, stage) for other in found):
            yield from _children_as_blocks(stage, sequence)


def _children_as_blocks(stage: str, sequence: nn.Sequential) -> Iterator[Block]:
    for name, child in sequence.named_children():
        qualified = f"{stage}.{name}" if stage else name
        yield Block(qualified, stage or "sequence", (qualified,), _structural_obstacle(child))


def _structural_obstacle(block: nn.Module) -> str:
    """Layers of its own on the shortcut, or no shortcut in a family of residual blocks: the trunk needs the block."""
    for attribute in ("downsample", "shortcut", "proj"):
        shortcut = getattr(block, attribute, None)
        if isinstance(shortcut, nn.Module) and not isinstance(shortcut, nn.Identity) and not _is_empty(shortcut):
            return f"has its own shortcut layers ({attribute})"
    for attribute in ("use_res_connect", "has_skip", "apply_residual"):
        if getattr(block, attribute, True) is False:
            return "has no residual connection"
    return ""


def _convolution_obstacle(convolution: nn.Conv2d) -> str:
    if convolution.in_channels != convolution.out_channels:
        return f"maps {convolution.in_channels} to {convolution.out_channels} channels"
    return "" if convolution.stride == (1, 1) else f"has stride {convolution.stride[0]}"


def _is_sequence(module: nn.Module | None) -> TypeGuard[nn.Sequential]:
    """Runs its children one after the other, whatever they are (a subclass may add names, not another forward)."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _is_sequence_of_blocks(module: nn.Module) -> TypeGuard[nn.Sequential]:
    if not _is_sequence(module):
        return False
    return len({type(child) for child in module}) == 1 and not any(_is_leaf(child) for child in module)


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _is_empty(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len(module) == 0


def _is_inside(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.") if outer else True
