"""The extras of `analyze`: functions of what one pass leaves behind, each registered where it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import pandas as pd

from lit_prune.registry import Registry, import_files

if TYPE_CHECKING:
    from lit_prune.lab.analyze.evidence import Analysis

Frames = dict[str, pd.DataFrame]
Build = Callable[["Analysis"], Frames]
BASE = "base"
ABOVE = ("analysis", "run", "figures")  # modules of this folder that use the extras


@dataclass(frozen=True)
class Extra:
    """One extra.

    Attributes:
        build: makes its tables.
        outputs: which those are: columns for `channels` and `layers`, or a `table` of its own.
        settings: fields of the request that it depends on beside the common ones.
    """

    build: Build
    outputs: tuple[str, ...]
    settings: tuple[str, ...] = ()


EXTRAS: Registry[Extra] = Registry("extras")
EXTRAS.add(BASE, Extra(lambda analysis: {"channels": analysis.channels}, ("channels",)))


def register_extra(*outputs: str, settings: tuple[str, ...] = ()) -> Callable[[Build], Build]:
    """Function decorator: an extra of `analyze` under the function's name, see `Extra`."""

    def register(build: Build) -> Build:
        EXTRAS.add(build.__name__, Extra(build, outputs, settings), build)
        return build

    return register


def layer_by_layer(analysis: Analysis, of: Callable[[str], dict[str, dict[str, Any]]]) -> Frames:
    """The tables `channels` and `layers` of what `of` gives for each layer.

    Args:
        analysis: says which layers there are.
        of: layer -> {"channels": column -> its values, an array [N]; "layers": column -> its value}, or one of both.
    """
    rows: dict[str, list[pd.DataFrame]] = {}
    for layer in analysis.layers:
        places = {"channels": analysis.rows(layer)[["layer", "channel"]].reset_index(drop=True)}
        places["layers"] = places["channels"][["layer"]].head(1)
        for output, columns in of(layer).items():
            rows.setdefault(output, []).append(places[output].assign(**columns))
    return {output: pd.concat(parts, ignore_index=True) for output, parts in rows.items()}


@cache
def extra_names() -> tuple[str, ...]:
    """Names of all extras; the modules of this folder are imported, so that theirs are known."""
    import_files(__file__, __package__, ABOVE)
    return tuple(name for name in EXTRAS if name != BASE)
