"""Attention heads as mechanisms: what removing one costs, the constant in its place, and folding it away."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.layers import Batches, removing
from lit_prune.measurement.passes import differentiable
from lit_prune.replace.curvature import Part, loss_parts
from lit_prune.running import undisturbed
from lit_prune.task import Task, settle

HEAD_SCORES = ("cmr_const", "head_removal", "variance", "cmr_logit", "random")


@dataclass(frozen=True)
class HeadMoments:
    """Means over images at the input of an attention's output projection, float64 [T, C] position by position.

    Attributes:
        heads: H; the C columns are H blocks.
        mean: E a.
        square: E a².
        gradient: E g.
        product: E g·a.
        curvature: E η, Gauss-Newton.
        mixed: E η·a.
        power: E η·a².
    """

    heads: int
    mean: Tensor
    square: Tensor
    gradient: Tensor
    product: Tensor
    curvature: Tensor
    mixed: Tensor
    power: Tensor

    def _by_head(self, values: Tensor) -> Tensor:
        """[..., C] summed to [H]."""
        return values.reshape(-1, self.heads, values.shape[-1] // self.heads).sum((0, 2))

    def removal_scores(self) -> Tensor:
        """Rise of the loss when a head's output becomes 0: `Σ (½ E ηa² - E ga)`, [H], nats (equation 26)."""
        return self._by_head(0.5 * self.power - self.product)

    def foldable_constants(self, objective: str = "loss") -> Tensor:
        """One constant a dimension for all positions, [C]: what can be folded into the projection's bias.

        "loss": the average of C* over positions, weighted with their curvature: of all constants that are equal at all
        positions it has the least risk. "distortion": the mean of the values.
        """
        if objective == "distortion":
            return self.mean.mean(0)
        curvature = self.curvature.sum(0)
        curved = curvature > 1e-12 * curvature.max()
        wanted = (self.mixed - self.gradient).sum(0)
        return torch.where(curved, wanted / torch.where(curved, curvature, 1), self.mean.mean(0))

    def risk(self, constants: Tensor) -> Tensor:
        """Rise of the loss when each head takes its `constants`, [C] or [T, C]; [H], nats (equation 25)."""
        first = constants * self.gradient - self.product
        return self._by_head(first + 0.5 * (constants**2 * self.curvature - 2 * constants * self.mixed + self.power))

    def variance(self) -> Tensor:
        """Squared distance of a head's output from its mean over images and positions, summed, [H]."""
        return self._by_head(self.square - 2 * self.mean * self.mean.mean(0) + self.mean.mean(0).square())

    def distortion(self, weight: Tensor) -> Tensor:
        """The same at the projection's output: variance of each dimension times ‖W[:, i]‖², [H]."""
        spread = self.square - 2 * self.mean * self.mean.mean(0) + self.mean.mean(0).square()
        return self._by_head(spread * weight.detach().double().cpu().square().sum(0))


def attention_with_heads(model: nn.Module, name: str) -> Any:
    """The attention module `name`, which must have `qkv`, `proj`, `num_heads` and `head_dim`, as timm's has.

    Raises:
        InputError: there is none, or it has norms or gates across heads.
    """
    module = dict(model.named_modules()).get(name)
    if module is None or not is_attention(module):
        some = [key for key, value in model.named_modules() if is_attention(value)]
        raise InputError(f"layer={name!r} is no attention with qkv and proj; there are: {', '.join(some) or 'none'}")
    if getattr(module, "value_dim", module.head_dim) != module.head_dim:
        raise InputError(f"layer={name!r}: its values are {module.value_dim} wide and its queries {module.head_dim}")
    if not isinstance(getattr(module, "norm", nn.Identity()), nn.Identity) or getattr(module, "gate", None) is not None:
        raise InputError(f"layer={name!r}: a norm or gate across heads lies before the projection; heads are coupled")
    return module


def is_attention(module: nn.Module | None) -> bool:
    """Whether heads can be taken from the module."""
    return all(hasattr(module, name) for name in ("qkv", "proj", "num_heads", "head_dim"))


def measure_heads(
    model: nn.Module, name: str, batches: Batches, seed: int = 0, task: Task | str | None = None
) -> HeadMoments:
    """Moments, gradients and curvature of the heads of the attention `name`.

    Args:
        model: any network; left as found.
        name: its attention module.
        batches: with targets.
        seed: of what is drawn.
        task: what a batch and an output mean; None recognises it.

    Raises:
        InputError: no such attention, or no images.
    """
    attention = attention_with_heads(model, name)
    task, batches = settle(task, model, batches)
    found: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    totals: list[Tensor] = []
    count = 0
    hook = attention.proj.register_forward_pre_hook(lambda module, args: found.__setitem__("values", args[0]))
    inputs = model.register_forward_pre_hook(differentiable, with_kwargs=True)
    with removing([hook, inputs]), undisturbed(model, gradients=True):
        for piece in (piece for batch in batches for piece in task.pieces(batch)):
            piece = task.to(piece, model)
            part = _batch_moments(found, loss_parts(task, task.run(model, piece), piece, generator))
            totals = [old + new for old, new in zip(totals, part, strict=True)] if totals else part
            count += task.size(piece)
    if not count:
        raise InputError("batches: there is no batch in it; give at least one")
    return HeadMoments(attention.num_heads, *(total / count for total in totals))


def _batch_moments(found: dict[str, Tensor], parts: list[Part]) -> list[Tensor]:
    values = found["values"]
    a = values.detach().double()
    gradient, curvature = torch.zeros_like(a), torch.zeros_like(a)
    for part in parts:
        g = torch.autograd.grad(part.values.sum(), values, retain_graph=True)[0].double()
        if part.is_loss:
            gradient = g
        else:
            curvature += part.weights.double()[:, None, None] * g.square()
    products = (a, a * a, gradient, gradient * a, curvature, curvature * a, curvature * a * a)
    return [product.sum(0).cpu() for product in products]


def remove_heads(model: nn.Module, name: str, removed: Sequence[int], constants: Tensor | None = None) -> nn.Module:
    """A copy of `model` whose attention `name` lacks some heads: queries, keys, values, attention and projection.

    Args:
        model: the network.
        name: its attention module.
        removed: heads that go.
        constants: [C], put in the place of the removed heads' outputs through the projection's bias; None: zero.

    Raises:
        InputError: no head would stay, or a head that is not there.

    Source: causal mechanism reduction, proposition 10.
    """
    smaller = copy.deepcopy(model)
    attention = attention_with_heads(smaller, name)
    heads, wide = attention.num_heads, attention.head_dim
    kept = [head for head in range(heads) if head not in set(removed)]
    if not kept or not set(removed) <= set(range(heads)):
        raise InputError(f"layer={name!r}: heads {sorted(removed)} of {heads} cannot go; at least one must stay")
    columns, lost = (head_columns(some, wide) for some in (kept, sorted(removed)))
    rows = torch.cat([columns + part * heads * wide for part in range(3)])
    with torch.no_grad():
        if constants is not None:
            shift = attention.proj.weight.double()[:, lost] @ constants[lost].to(attention.proj.weight.device)
            if attention.proj.bias is None:
                attention.proj.bias = nn.Parameter(attention.proj.weight.new_zeros(len(attention.proj.weight)))
            attention.proj.bias.copy_((attention.proj.bias.double() + shift).to(attention.proj.bias.dtype))
        _keep(attention.qkv, rows, 0)
        _keep(attention.proj, columns, 1)
    attention.num_heads = len(kept)
    attention.attn_dim = len(kept) * wide
    return smaller


def head_columns(heads: Sequence[int], wide: int) -> Tensor:
    """Columns of the projection that belong to `heads`, int64, head by head."""
    return (torch.tensor(list(heads), dtype=torch.int64)[:, None] * wide + torch.arange(wide)).flatten()


def _keep(module: nn.Linear, positions: Tensor, dim: int) -> None:
    flag = module.weight.requires_grad
    module.weight = nn.Parameter(module.weight.index_select(dim, positions.to(module.weight.device)), flag)
    if dim == 0:
        module.out_features = len(positions)
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias[positions.to(module.bias.device)], flag)
    else:
        module.in_features = len(positions)
