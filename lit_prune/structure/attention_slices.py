"""Which values of a parameter serve one unit alone (a head, or a position within heads): gradients with exact codes."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_STEP, _HALF_STEP = 32, 16  # units told apart by one code, from 2^0 on; in half precision 2^15 is the largest power
_SHARED, _UNSEEN = -2, -1


@dataclass(frozen=True)
class Slices:
    """What belongs to each head in one tensor: `dim` and, head by head, the places along it."""

    name: str
    dim: int
    positions: tuple[tuple[int, ...], ...]


def owners_of(
    named: Sequence[tuple[str, Tensor]], roots: Sequence[tuple[Tensor, int, Tensor]], units: int
) -> Iterator[tuple[str, Tensor]]:
    """Parameter by parameter that `roots` depend on, the unit that each of its values serves, int32 of its shape.

    Args:
        named: parameters.
        roots: tensor, the dimension along which it has units, and the unit of each place along that.
        units: their number.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [0.5 + torch.rand(root.shape, generator=generator).to(root) for root, _, _ in roots]

    def coded(code: Callable[[Tensor], Tensor]) -> list[Tensor]:
        found = []
        for (root, dim, unit), weight in zip(roots, weights, strict=True):
            shape = [1] * root.dim()
            shape[dim] = -1
            found.append(weight * (1 << code(unit)).view(shape).to(root))
        return found

    tensors, parameters = [root for root, _, _ in roots], [p for _, p in named]
    step = _HALF_STEP if roots[0][0].dtype == torch.float16 else _STEP
    codes = [torch.zeros_like, lambda unit: unit % step, lambda unit: unit // step]
    found = [
        torch.autograd.grad(tensors, parameters, coded(code), retain_graph=True, allow_unused=True)
        for code in (codes if units > step else codes[:2])
    ]
    for (name, _), plain, *others in zip(named, *found, strict=True):
        if plain is not None:
            yield name, sum(step**place * _exponents(plain, values, step) for place, values in enumerate(others))


def _exponents(plain: Tensor, coded: Tensor, step: int) -> Tensor:
    """The k < step for which `coded = 2^k · plain`, very negative where that holds for no such k or both are 0.

    A power of two changes the exponent alone, which the upper bits of a floating-point number hold.
    """
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.itemsize]
    fraction = round(-math.log2(torch.finfo(plain.dtype).eps))  # bits
    steps = coded.contiguous().view(whole) - plain.contiguous().view(whole)
    power = steps >> fraction
    exact = (power << fraction == steps) & (power >= 0) & (power < step)
    found = power.to(torch.int32).masked_fill_(~exact, _SHARED * 10**4)
    return found.masked_fill_(plain == 0, _UNSEEN * 10**4)


def slices_of(name: str, owner: Tensor, heads: int, partly: bool = False) -> Slices | None:
    """The slices of one parameter that serve one head each; None if there is no axis that parts it by heads.

    `partly`: other places along the axis may serve something else.
    """
    for dim in range(owner.dim()):
        rows = owner.movedim(dim, 0).flatten(1) if owner.dim() > 1 else owner[:, None]
        highest = rows.amax(1)
        known = torch.where(_unseen(rows), highest[:, None], rows)
        served = highest >= 0
        if bool((known == highest[:, None])[served].all()) and (partly or bool(served.all())):
            places = tuple(tuple((highest == head).nonzero().flatten().tolist()) for head in range(heads))
            if len({len(row) for row in places}) == 1 and places[0]:
                return Slices(name, dim, places)
    return None


def _unseen(owner: Tensor) -> Tensor:
    """Where no gradient came: the value matters to no output, or to none on this image."""
    return (owner < 0) & (owner > _SHARED * 10**4)


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
