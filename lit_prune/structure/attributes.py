"""Widths that a network writes down of itself, after a cut: timm's attributes, the `config` of Hugging Face."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lit_prune.running import removing
from lit_prune.structure import axes
from lit_prune.structure.tracing import one_sample, traceable

WIDTHS = ("num_features", "head_hidden_size")
FIRST, LAST, EACH = ("embedding_size", "embed_dim"), ("hidden_size",), ("hidden_sizes",)
"""Entries of a `config` that are the width of the first hidden state, of the last, of the last ones in turn."""


def follow_widths(dense: nn.Module, smaller: nn.Module, example_input: Any) -> None:
    """Sets `num_features`, `head_hidden_size`, `feature_info` or `config` to the widths that `smaller` really has.

    For networks with timm's interface (`forward_features`, `forward_head`, `feature_info`) and those of Hugging Face
    (`config`, hidden states: `hidden_size`, `hidden_sizes`, `embed_dim`, `embedding_size`; a `config` has no words for
    widths inside blocks, which differ after a cut); any other is left alone. Each width is read off a pass, on the
    axis on which the dense network has the width that it writes down. After that `reset_classifier`, a new classifier
    and feature extraction fit the smaller network. Heads that keep their own `in_features` and `num_features` follow
    too.

    Args:
        dense: before the cut.
        smaller: after it; changed in place.
        example_input: what the networks are called with, see `trace_groups`.
    """
    if hasattr(getattr(smaller, "config", None), "model_type"):
        _follow_config(dense, smaller, example_input)
    if not (callable(getattr(dense, "forward_features", None)) and hasattr(dense, "num_features")):
        return
    named = [entry["module"] for entry in _entries(dense)]
    before, after = (_outputs(network, example_input, named) for network in (dense, smaller))
    for name in WIDTHS:
        width = _moved(getattr(dense, name, None), before.get(name), after.get(name))
        if width is not None:
            setattr(smaller, name, width)
    for old, new in zip(_entries(dense), _entries(smaller), strict=True):
        width = _moved(old["num_chs"], before.get(old["module"]), after.get(old["module"]))
        new["num_chs"] = new["num_chs"] if width is None else width
    for head in (module for name, module in smaller.named_modules() if name and not axes.is_weighted(module)):
        _follow_head(head)


def _follow_config(dense: Any, smaller: Any, example_input: Any) -> None:
    before, after = (_hidden_states(network, example_input) for network in (dense, smaller))
    if not before or len(before) != len(after):
        return
    for names, state in ((FIRST, 0), (LAST, -1)):
        for name in names:
            width = _moved(getattr(dense.config, name, None), before[state], after[state])
            if width is not None:
                setattr(smaller.config, name, width)
    for name in EACH:
        widths = getattr(dense.config, name, None)
        if isinstance(widths, list | tuple) and 0 < len(widths) <= len(before):
            ends = zip(widths, before[-len(widths) :], after[-len(widths) :], strict=True)
            moved = [_moved(*end) for end in ends]
            setattr(smaller.config, name, [new or old for new, old in zip(moved, widths, strict=True)])


def _hidden_states(model: Any, example_input: Any) -> tuple[Tensor, ...]:
    """What the layers pass on for one sample, from the embedding to the last; empty where the network does not say."""
    with traceable(model):
        sample = one_sample(model, example_input)
        try:
            output = model(*sample.args, **{**sample.kwargs, "output_hidden_states": True})
        except TypeError:  # it takes no such argument
            return ()
    return tuple(getattr(output, "hidden_states", None) or ())


def _entries(model: nn.Module) -> list[dict[str, Any]]:
    """Description of the features in the form of timm; empty where there is none."""
    info = getattr(model, "feature_info", None)
    info = getattr(info, "info", info)
    known = isinstance(info, list) and all(
        isinstance(one, dict) and {"module", "num_chs"} <= one.keys() for one in info
    )
    return info if known and info is not None else []


def _outputs(model: nn.Module, example_input: Any, named: Iterable[str]) -> Mapping[str, Tensor]:
    """What the features, the head before its classifier, and the named modules give for one sample."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda module, args, output: found.update({name: output} if isinstance(output, Tensor) else {})

    with traceable(model):
        sample = one_sample(model, example_input)
        present = dict(model.named_modules())
        handles = [present[name].register_forward_hook(note(name)) for name in named if name in present]
        with removing(handles):
            found["num_features"] = model.forward_features(*sample.args, **sample.kwargs)
            if callable(getattr(model, "forward_head", None)):
                found["head_hidden_size"] = model.forward_head(found["num_features"], pre_logits=True)
    return found


def _moved(width: Any, before: Tensor | None, after: Tensor | None) -> int | None:
    """Size of `after` on the axis on which `before` has `width`; None where there is no such axis."""
    if not (isinstance(before, Tensor) and isinstance(after, Tensor) and before.ndim == after.ndim):
        return None
    order = (1, -1) if before.ndim == 4 else (-1, 1)
    axis = next((axis for axis in order if before.ndim > 1 and before.shape[axis] == width), None)
    return None if axis is None else int(after.shape[axis])


def _follow_head(head: Any) -> None:
    """A head that writes down the width of its last layer (`fc`) writes down the present one."""
    last = getattr(head, "fc", None)
    if not (
        isinstance(last, nn.Module) and axes.is_weighted(last) and isinstance(getattr(head, "num_features", 0), int)
    ):
        return
    width = axes.width(last, "in")
    if getattr(head, "in_features", None) == getattr(head, "num_features", None):
        head.in_features = width
    if hasattr(head, "num_features"):
        head.num_features = width
