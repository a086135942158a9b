"""Attention as it is written out in many repositories, whose forward takes the width of a head from that of the input.

`B, N, C = x.shape` and `reshape(B, N, 3, self.num_heads, C // self.num_heads)`, as in DeiT, DINO, MAE and nanoGPT: no
head can go without another forward. A layer of a class of one's own is taken for such an attention where it holds
linear projections and dropouts alone, states its number of heads, and gives in both modes what the forward below gives.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_prune.structure.by_heads import join_heads, split_heads, split_projection
from lit_prune.structure.tracing import copy_network

HEADS = ("num_heads", "n_heads", "n_head", "heads", "nhead", "num_attention_heads", "h", "nh")
PLACES = 5
_FORMS: dict[Any, "Form | None"] = {}
_CLASSES: dict[type, type] = {}


@dataclass(frozen=True)
class Form:
    """What such an attention is made of.

    Attributes:
        heads: attribute that states their number.
        projections: names of the layers that give queries, keys and values: one for all, or three.
        dropout: name of the dropout of the weights, or "".
        after: names of the children that the joined heads go through, in order; the first holds the reader.
        reader: name of the linear layer that reads the heads.
        scale: that the products are multiplied with.
        causal: whether a place sees those before it alone.
        with_weights: whether the weights are given too.
    """

    heads: str
    projections: tuple[str, ...]
    dropout: str
    after: tuple[str, ...]
    reader: str
    scale: float
    causal: bool = False
    with_weights: bool = False


class OpenCopied(nn.Module):
    """The forward of every class that is taken for such an attention."""

    attention_form: Form

    @staticmethod
    def opened_attributes(module: nn.Module) -> dict[str, Any]:
        """What changes when a layer is opened: it states its form and the widths of a head."""
        form = form_of(module)
        assert form is not None, "it has been found"
        width = module.get_submodule(form.reader).in_features // getattr(module, form.heads)
        return {"head_dim": width, "value_dim": width, "attention_form": form}

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens [B, L, C] to tokens [B, L, C'], with the weights [B, heads, L, L] where the layer gave them."""
        return attend(self, self.attention_form, x)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """The class is made anew from the one that it was opened from."""
        return _empty, (type(self).__mro__[2],), dict(vars(self))


def attend(module: nn.Module, form: Form, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """What a layer of a form gives; queries and keys may be of any width, and values of another."""
    parts = [module.get_submodule(name)(x) for name in form.projections]
    inner = module.get_submodule(form.reader).in_features
    q, k, v = (
        split_heads(part, getattr(module, form.heads))
        for part in (parts if len(parts) == 3 else split_projection(parts[0], inner))
    )
    if form.with_weights or (form.dropout and module.training):
        weights = _weights(module, form, q, k)
        output = join_heads(weights @ v)
    else:
        output = join_heads(F.scaled_dot_product_attention(q, k, v, is_causal=form.causal, scale=form.scale))
    for name in form.after:
        output = module.get_submodule(name)(output)
    return (output, weights) if form.with_weights else output


def _weights(module: nn.Module, form: Form, q: Tensor, k: Tensor) -> Tensor:
    """How much of each value is taken, [B, heads, L, L]."""
    weights = (q @ k.transpose(-2, -1)) * form.scale
    if form.causal:
        ahead = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).triu(1)
        weights = weights.masked_fill(ahead, -torch.inf)
    weights = weights.softmax(-1)
    return module.get_submodule(form.dropout)(weights) if form.dropout else weights


def open_class(module: nn.Module) -> type | None:
    """The class that such an attention becomes; None for any other module."""
    if form_of(module) is None:
        return None
    return _opened(type(module))


def form_of(module: nn.Module) -> Form | None:
    """The form of a layer, which gives what `attend` gives; None for any other module."""
    heads = next((name for name in HEADS if type(vars(module).get(name)) is int), None)
    if heads is None or isinstance(module, OpenCopied):
        return None
    inner = list(module.named_modules())[1:]
    plain = all(type(part) in (nn.Linear, nn.Dropout, nn.Identity, nn.Softmax, nn.Sequential) for _, part in inner)
    linears = [(name, part) for name, part in inner if type(part) is nn.Linear]
    if not plain or len(linears) not in (2, 4):
        return None
    if len(inspect.signature(type(module).forward).parameters) != 2 or list(module.named_parameters(recurse=False)):
        return None
    built = tuple((name, type(part), getattr(part, "p", None), _sizes(part)) for name, part in inner)
    numbers = {k: v for k, v in vars(module).items() if type(v) in (int, float, bool, str)} | {"training": None}
    key = (type(module), built, tuple(sorted(numbers.items(), key=str)))
    if key not in _FORMS:
        _FORMS[key] = next((form for form in _candidates(module, heads, linears) if _is(module, form)), None)
    return _FORMS[key]


def _sizes(part: nn.Module) -> tuple[int, ...] | None:
    return (part.in_features, part.out_features) if isinstance(part, nn.Linear) else None


def _candidates(module: nn.Module, heads: str, linears: list[tuple[str, nn.Linear]]) -> list[Form]:
    """The forms that a layer may be of, by the names and order of its children."""
    *first, (reader, last) = linears
    if len(first) == 3:
        first = sorted(first, key=lambda pair: "qkv".find(_letter(pair[0])))
    children, start = [name for name, _ in module.named_children()], reader.partition(".")[0]
    drops = [name for name, part in module.named_children() if isinstance(part, nn.Dropout)]
    number, inner = getattr(module, heads), last.in_features
    widths = [layer.out_features for _, layer in first]
    if not number or inner % number or sum(widths) != 3 * inner:
        return []
    dropout = next((name for name in drops if "att" in name or children.index(name) < children.index(start)), "")
    after = (start, *(name for name in drops if name != dropout))
    scales = [(inner // number) ** -0.5, *(v for v in (vars(module).get("scale"),) if isinstance(v, float))]
    projections = tuple(name for name, _ in first)
    return [
        Form(heads, projections, dropout, after, reader, scale, causal, gives)
        for scale in dict.fromkeys(scales)
        for causal in (False, True)
        for gives in (False, True)
    ]


def _letter(name: str) -> str:
    """q, k or v, from names such as `to_q`, `k_proj`, `value`."""
    return next((word[0] for word in name.lower().replace(".", "_").split("_") if word[:1] in ("q", "k", "v")), "q")


def _is(module: nn.Module, form: Form) -> bool:
    """Whether a layer gives what the form says, in both modes."""
    layer = copy_network(module).to("cpu", torch.float64)
    tokens = torch.Generator().manual_seed(0)
    width = layer.get_submodule(form.projections[0]).in_features
    x = torch.randn(2, PLACES, width, dtype=torch.float64, generator=tokens)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for training in (False, True):
            layer.train(training)
            try:
                torch.manual_seed(0)
                own = layer(x)
                torch.manual_seed(0)
                other = attend(layer, form, x)
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError):
                return False
            pairs = [(own, other)] if isinstance(own, Tensor) else list(zip(own, other, strict=False))
            if isinstance(own, Tensor) != isinstance(other, Tensor) or not all(map(_same, *zip(*pairs, strict=True))):
                return False
    return True


def _same(one: Any, other: Any) -> bool:
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and one.shape == other.shape and torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def _opened(kind: type) -> type:
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Open{kind.__name__}", (OpenCopied, kind), {"__module__": __name__})
    return _CLASSES[kind]


def _empty(kind: type[nn.Module]) -> nn.Module:
    """A layer of the class that `kind` is opened to; pickle puts its state in."""
    return object.__new__(_opened(kind))
