"""Interchange interventions: does the reduced network answer as the original does when kept units are swapped?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_prune.arguments import checked
from lit_prune.errors import InputError
from lit_prune.measurement.layers import Batches, removing
from lit_prune.replace.carrier import carrier_columns
from lit_prune.replace.certificate import Certificate, certify
from lit_prune.replace.flow import find_readers, observe
from lit_prune.replace.pairs import Pool, Swaps, draw_pairs, gather_images
from lit_prune.replace.patches import channel_dim
from lit_prune.replace.replacement import Reduced
from lit_prune.running import undisturbed
from lit_prune.structure import Plan, apply_plan, trace_groups
from lit_prune.task import Classification, Task, settle
from lit_prune.task.batches import to_network
from lit_prune.task.outputs import softmax_divergence


@dataclass(frozen=True)
class Interchange:
    """Agreement of two networks under the same interventions.

    Divergence and certificate are defined for logits [R, K] of a classification alone; NaN and None elsewhere.

    Attributes:
        layer: the layer whose input channels were swapped.
        low: predictions of the original network, float32 [R, ...].
        high: predictions of the reduced network.
        task: what the prediction is, and what it means to agree.
    """

    layer: str
    low: Tensor
    high: Tensor
    task: Task = field(default_factory=Classification)

    @property
    def agreement(self) -> Tensor:
        """How far both answer alike, float64 [R]: `Task.agreement`, for classes whether the top ones are equal."""
        return self.task.agreement(self.low, self.high)

    @property
    def divergence(self) -> Tensor:
        """KL(low ‖ high) of the softmax outputs in nats, float64 [R]."""
        if not isinstance(self.task, Classification):
            return torch.full((len(self.low),), torch.nan, dtype=torch.float64)
        return softmax_divergence(self.low.double(), self.high.double())

    @property
    def iia(self) -> float:
        """Interchange intervention accuracy, the mean agreement."""
        return float(self.agreement.mean())

    @property
    def kl(self) -> float:
        """Mean KL(low ‖ high) in nats."""
        return float(self.divergence.mean())

    @property
    def certificate(self) -> Certificate | None:
        """Lower bounds on `iia`."""
        return certify(self.low, self.high) if isinstance(self.task, Classification) else None

    def report(self) -> dict[str, Any]:
        """Plain values: layer, pairs, iia, kl and the fields of the certificate."""
        found = {"layer": self.layer, "pairs": len(self.low), "iia": self.iia, "kl": self.kl}
        certificate = self.certificate
        return found | {"certificate": None if certificate is None else asdict(certificate)}


DEFAULT_SWAPS = Swaps()


@checked
def interchange(
    low: nn.Module,
    reduced: Reduced,
    batches: Batches,
    example_input: Any = None,
    layer: str | None = None,
    *,
    swaps: Swaps = DEFAULT_SWAPS,
    task: Task | str | None = None,
) -> Interchange:
    """Runs both networks on pairs of images with the same kept units taken from the source image.

    The units are the input channels of one layer. In the original network the channels that the plan removes keep the
    base image's own values; the reduced network has none of them. Each network takes the swapped values from its own
    run on the source. Networks are left as found.

    >>> from lit_prune.replace import replace_mechanisms
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> net[2].weight.data[:, 4:] = 0  # nothing is lost with the last four
    >>> plan, batches = Plan(keep_channels={"0": (0, 1, 2, 3)}, sizes={"0": 8}), [torch.randn(32, 4)]
    >>> round(interchange(net, replace_mechanisms(net, plan, batches), batches).iia, 6)
    1.0

    Args:
        low: the original network.
        reduced: what `replace_mechanisms` made of it.
        batches: the pairs are drawn from them; targets are not read.
        example_input: what the network is called with, for tracing; None takes the first batch.
        layer: convolution or linear layer; None: the last one that loses input channels.
        swaps: how many pairs, which probability, which seed.
        task: what a batch and an output mean; None recognises it.

    Raises:
        InputError: fewer than two images, or a layer that is unknown or runs more than once.

    Source: causal mechanism reduction, section 5.3 (state map: projection on kept units).
    """
    task, batches = settle(task, low, batches)
    images = gather_images(batches, swaps.images, task)
    if example_input is None:
        example_input = images.take([0])
    layer, *kept = _interface(low, reduced, example_input, layer)
    columns = [[[column] for column in side] for side in kept]
    return swap_units((low, reduced.model), layer, columns, images, swaps)


def swap_units(
    networks: Sequence[nn.Module], layer: str, units: Sequence[Sequence[Sequence[int]]], images: Pool, swaps: Swaps
) -> Interchange:
    """Interchange of units that are one or several input channels of `layer` each.

    Args:
        networks: the original and the reduced one; left as found.
        layer: where the units are read, the same name in both.
        units: for each network the columns of each kept unit, in the same order of units.
        images: the pairs are drawn from them.
        swaps: how many pairs, which probability, which seed.

    Raises:
        InputError: a network answers with NaN.
    """
    everything = draw_pairs(len(images), len(units[0]), swaps)
    results: tuple[list[Tensor], list[Tensor]] = ([], [])
    with undisturbed(networks[0]), undisturbed(networks[1]):
        for base, source, mask in zip(*(part.split(swaps.batch_size) for part in everything), strict=True):
            for network, columns, found in zip(networks, units, results, strict=True):
                found.append(_swapped(network, layer, columns, images, (base, source), mask))
    low, high = (torch.cat(found) for found in results)
    _check_answers(low, "original", layer)
    _check_answers(high, "reduced", layer)
    return Interchange(layer, low, high, images.task)


def _check_answers(answers: Tensor, network: str, layer: str) -> None:
    """Refuses predictions that are not finite: no agreement is defined on them.

    Raises:
        InputError: network and layer are named.
    """
    if answers.is_floating_point() and not torch.isfinite(answers).all():
        wrong = int((~torch.isfinite(answers)).flatten(1).any(1).sum()) if answers.dim() > 1 else len(answers)
        raise InputError(
            f"interchange at layer {layer!r}: the {network} network answers {wrong} of {len(answers)} pairs with NaN "
            "or infinity; take a network whose outputs are finite"
        )


def paired_bootstrap(
    one: Sequence[float] | Tensor, other: Sequence[float] | Tensor, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `one - other` over paired units (seeds, or swaps), with its 95 % percentile interval.

    Args:
        one: a value a unit.
        other: the value of the same unit under the other method.
        resamples: bootstrap samples.
        seed: of the samples.

    Returns:
        (mean, lower, upper).

    Raises:
        InputError: the two differ in length, or are empty.
    """
    first, second = (np.asarray(v.cpu() if isinstance(v, Tensor) else v, dtype=float) for v in (one, other))
    if first.shape != second.shape or not len(first):
        raise InputError(f"paired_bootstrap needs equally many values, got {len(first)} and {len(second)}")
    difference = first - second
    drawn = np.random.default_rng(seed).integers(len(difference), size=(resamples, len(difference)))
    lower, upper = np.quantile(difference[drawn].mean(1), (0.025, 0.975))
    return float(difference.mean()), float(lower), float(upper)


def _interface(
    low: nn.Module, reduced: Reduced, example_input: Any, layer: str | None
) -> tuple[str, list[int], list[int]]:
    """The layer, and its kept input channels as they are numbered in the original and in the reduced network."""
    plan = reduced.plan
    dense = apply_plan(low, Plan(plan.drop_blocks), example_input) if plan.drop_blocks else low
    graph = trace_groups(dense, example_input)
    readers = find_readers(dense, reduced.plan, graph, observe(dense, example_input))
    usable = {name: reader for name, reader in readers.items() if not reader.obstacle}
    if layer is None:
        layer = next((name for name in reversed(usable) if usable[name].removed), None)
    if layer not in usable:
        why = readers[layer].obstacle if layer in readers else "no such layer loses input channels"
        raise InputError(f"layer={layer!r} cannot be swapped: {why}; some layers: {', '.join(list(usable)[-4:])}")
    constant = carrier_columns(graph, reduced.carriers, usable[layer])
    pairs = [(old, new) for new, old in enumerate(usable[layer].kept) if old not in constant]
    return layer, [old for old, _ in pairs], [new for _, new in pairs]


def _swapped(
    model: nn.Module,
    layer: str,
    units: Sequence[Sequence[int]],
    images: Pool,
    pair: tuple[Tensor, Tensor],
    mask: Tensor,
) -> Tensor:
    """Predictions for the base images, the channels of masked `units` taken from the source images, on the CPU."""
    module = model.get_submodule(layer)
    columns = [column for unit in units for column in unit]
    wide = mask.repeat_interleave(torch.tensor([len(unit) for unit in units]), dim=1)
    taken: list[Tensor] = []

    def hook(module: nn.Module, args: tuple) -> tuple | None:
        if not taken:
            taken.append(args[0].clone())
            return None
        dim = channel_dim(module) % args[0].dim()
        chosen = torch.zeros(len(mask), args[0].shape[dim], dtype=torch.bool)
        chosen[:, columns] = wide
        shape = [1] * args[0].dim()
        shape[0], shape[dim] = chosen.shape
        return (torch.where(chosen.to(args[0].device).view(shape), taken[0], args[0]), *args[1:])

    with removing([module.register_forward_pre_hook(hook)]):
        _called(model, images, pair[1])
        return images.task.compared(_called(model, images, pair[0])).cpu()


def _called(model: nn.Module, images: Pool, chosen: Tensor) -> Any:
    """What the model answers to the chosen samples."""
    example = images.take(chosen)
    args, kwargs = to_network((example.args, example.kwargs), model)
    return model(*args, **kwargs)
