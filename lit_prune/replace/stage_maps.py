"""What the stages of two networks give for the same samples, compared through a linear map of the channels."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_prune.replace.regression import ridged
from lit_prune.replace.step_units import TINY
from lit_prune.running import removing

Run = Callable[[nn.Module], object]
RIDGE = 1e-3  # of each channel's own variance
ROWS = 1 << 14  # positions that a map is solved from, about
ENOUGH = 4  # positions a channel that it takes


@contextmanager
def hearing(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, what the named modules gave in the last pass is in the dictionary."""
    maps: dict[str, Tensor] = {}

    def hear(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        return lambda module, args, output: maps.update({name: output})

    with removing([model.get_submodule(name).register_forward_hook(hear(name)) for name in names]):
        yield maps


@dataclass(frozen=True)
class Stage:
    """The map from the channels of the reduced network's stage to those of the original's: `c W + b`, least squares.

    Attributes:
        weight: [C of the reduced network, C of the original].
        bias: [C of the original].
        scale: one over the variance of what the original gives, all channels together.
    """

    weight: Tensor
    bias: Tensor
    scale: float

    @classmethod
    def solve(cls, found: Tensor, wanted: Tensor) -> "Stage":
        """From maps [B, C, H, W] of both for the same samples."""
        every = max(1, found[:, 0].numel() // ROWS)
        u, z = (values.movedim(1, -1).flatten(0, -2)[::every].double() for values in (found, wanted))
        u_mean, z_mean = u.mean(0), z.mean(0)
        u, z = u - u_mean, z - z_mean
        weight = torch.linalg.solve(ridged(u.T @ u / len(u), RIDGE), u.T @ z / len(u))
        scale = 1 / max(float(z.square().sum(1).mean()), TINY)
        return cls(weight.to(wanted), (z_mean - u_mean @ weight).to(wanted), scale)

    def loss(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Squared difference over the variance, mean over samples and positions."""
        mapped = torch.einsum("bchw,cd->bdhw", found, self.weight) + self.bias.view(-1, 1, 1)
        return self.scale * (mapped - wanted).square().sum(1).mean()


def find_stages(original: nn.Module, reduced: nn.Module, run: Run) -> dict[str, Stage]:
    """Of each height and width of maps the last module that gives such ones in both networks, and its `Stage`.

    Stages are left out whose positions are fewer than four times their channels. Empty where no module gives maps
    [B, C, H, W], as in a network of linear layers.

    Args:
        original: the network before surgery.
        reduced: the one after, with modules of the same names; both in evaluation mode.
        run: runs a network on some samples.
    """
    sizes, others = (_sizes(model, run) for model in (original, reduced))
    last = {size: name for name, size in sizes.items() if others.get(name) == size}
    names = list(last.values())
    with hearing(original, names) as wanted, hearing(reduced, names) as found, torch.no_grad():
        run(original)
        run(reduced)
        determined = [name for name in names if found[name][:, 0].numel() >= ENOUGH * found[name].shape[1]]
        return {name: Stage.solve(found[name], wanted[name]) for name in determined}


def _sizes(model: nn.Module, run: Run) -> dict[str, tuple[int, int, int]]:
    """Samples, height and width of what modules give that run once and give maps, in the order they end in."""
    sizes: dict[str, tuple[int, int, int]] = {}
    calls: dict[str, int] = {}

    def note(name: str) -> Callable[[nn.Module, tuple, object], None]:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(output, Tensor) and output.ndim == 4:
                sizes[name] = (len(output), *output.shape[2:])

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    with removing(handles), torch.no_grad():
        run(model)
    return {name: size for name, size in sizes.items() if calls[name] == 1}
