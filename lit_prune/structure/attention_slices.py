"""Which values of a parameter serve one unit alone (a head, or a position within heads): gradients with exact codes."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

_STEP, _HALF_STEP = 64, 8  # units told apart by a code, from 2^0 on; in half precision larger gradients overflow
_SHARED, _UNSEEN = -2, -1


@dataclass(frozen=True)
class Slices:
    """What belongs to each head in one tensor: `dim` and, head by head, the places along it."""

    name: str
    dim: int
    positions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Part:
    """A parameter, and the tensor that says what it serves: itself, or what its rows write along dimension `dim`."""

    name: str
    tensor: Tensor
    dim: int | None = None


def owners_of(
    named: Sequence[Part], roots: Sequence[tuple[Tensor, int, Tensor]], units: int
) -> Iterator[tuple[str, Tensor]]:
    """Parameter by parameter that `roots` depend on, the unit that each of its values serves.

    int32 of its shape, or [rows, 1] where all of a row serves the same.

    Args:
        named: parameters.
        roots: tensor, the dimension along which it has units, and the unit of each place along that.
        units: their number.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [0.5 + torch.rand(root.shape, generator=generator).to(root) for root, _, _ in roots]
    step = _HALF_STEP if roots[0][0].dtype == torch.float16 else _STEP
    powers = torch.tensor([2.0**power for power in range(step)])

    def coded(code: Callable[[Tensor], Tensor]) -> list[Tensor]:
        found = []
        for (root, dim, unit), weight in zip(roots, weights, strict=True):
            shape = [1] * root.dim()
            shape[dim] = -1
            found.append(weight * powers[code(unit)].view(shape).to(root))
        return found

    tensors, parts = [root for root, _, _ in roots], [part.tensor for part in named]
    places = next(count for count in range(1, 64) if step**count >= units)
    codes: list[Callable[[Tensor], Tensor]] = [torch.zeros_like, *(partial(_digit, step, p) for p in range(places))]
    found = [torch.autograd.grad(tensors, parts, coded(code), retain_graph=True, allow_unused=True) for code in codes]
    for part, plain, *others in zip(named, *found, strict=True):
        if plain is not None:
            owner = _owners(plain, others, step)
            yield part.name, owner if part.dim is None else _rows(owner, part.dim)


def _digit(base: int, place: int, unit: Tensor) -> Tensor:
    """A digit of numbers, from the lowest place on."""
    return unit // base**place % base


def _owners(plain: Tensor, coded: Sequence[Tensor], step: int) -> Tensor:
    """The `sum(step^i · k_i)` for which `coded[i] = 2^k_i · plain`, all k < step; `_SHARED` where there is none.

    `_UNSEEN` where all are 0. A power of two changes the exponent alone, which the upper bits of a floating-point
    number hold.
    """
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.itemsize]
    fraction = round(-math.log2(torch.finfo(plain.dtype).eps))  # bits
    owner = torch.zeros_like(plain, dtype=torch.int32)
    shared = torch.zeros_like(plain, dtype=torch.bool)
    for place, values in enumerate(coded):
        steps = values.contiguous().view(whole) - plain.contiguous().view(whole)
        power = steps >> fraction
        shared |= (steps.bitwise_and_((1 << fraction) - 1) != 0) | (power < 0) | (power >= step)
        owner.add_(power, alpha=step**place)
    return owner.masked_fill_(shared, _SHARED).masked_fill_(plain == 0, _UNSEEN)


def _along(owner: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The highest unit that each place along a dimension serves, and whether it serves nothing else."""
    rows = owner.movedim(dim, 0).flatten(1) if owner.dim() > 1 else owner[:, None]
    highest = rows.amax(1)
    return highest, ((rows == highest[:, None]) | (rows == _UNSEEN)).all(1)


def _rows(owner: Tensor, dim: int) -> Tensor:
    """The unit that each place along a dimension serves alone, [places, 1]."""
    highest, alone = _along(owner, dim)
    return highest.masked_fill(~alone, _SHARED)[:, None]


def slices_of(name: str, owner: Tensor, heads: int, partly: bool = False) -> Slices | None:
    """The slices of one parameter that serve one head each; None if there is no axis that parts it by heads.

    `partly`: other places along the axis may serve something else.
    """
    for dim in range(owner.dim()):
        highest, alone = _along(owner, dim)
        served = highest >= 0
        if bool(alone[served].all()) and (partly or bool(served.all())):
            places = tuple(tuple((highest == head).nonzero().flatten().tolist()) for head in range(heads))
            if len({len(row) for row in places}) == 1 and places[0]:
                return Slices(name, dim, places)
    return None


def likewise(
    model: nn.Module, slices: dict[str, Slices], owners: dict[str, Tensor], partly: bool = False
) -> dict[str, Slices]:
    """Vectors that lie beside a tensor with units along its first axis, of the same length, in the same module.

    The bias of the keys has no gradient but rounding, since softmax does not see it, and a buffer never has one.
    `partly`, where some of them may serve something else: parameters alone, some of whose values were seen there.
    """
    found = {}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors.items():
        beside = [s for s in slices.values() if s.name.rpartition(".")[0] == name.rpartition(".")[0] and not s.dim]
        if name in slices or tensor.dim() != 1 or not tensor.is_floating_point():
            continue
        for other in beside:
            hits, seen = _hits(owners.get(name), other.positions)
            right = 2 * hits >= max(seen, int(partly))  # the rest is rounding
            if right and len(tensors[other.name]) == len(tensor):
                found[name] = Slices(name, 0, other.positions)
    return found


def _hits(owner: Tensor | None, places: tuple[tuple[int, ...], ...]) -> tuple[int, int]:
    """How many values of a vector serve the unit that has their place, and how many serve any."""
    if owner is None:
        return 0, 0
    return sum(int((owner[list(row)] == unit).sum()) for unit, row in enumerate(places)), int((owner >= 0).sum())
