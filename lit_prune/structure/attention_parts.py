"""What an attention has for each of its heads and for each position within them, by name."""

from dataclasses import dataclass

from lit_prune.structure.attention_slices import Slices


@dataclass(frozen=True)
class Inner:
    """A width of the heads: position by position, the same in every head.

    Attributes:
        size: positions in a head.
        slices: what serves one position alone, in all heads.
        columns: position by position, the input channels of the layer that reads the heads; none for queries and keys.
    """

    size: int
    slices: tuple[Slices, ...] = ()
    columns: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        name: qualified name of the module in whose forward it happens.
        heads: their number.
        reader: name of the weight of the layer that reads the heads.
        columns: head by head, the input channels of that layer.
        slices: what serves one head alone, without the reader.
        reason: "" or why heads cannot be taken from it.
        values: the width of the values.
        pairs: the width of queries and keys.
    """

    name: str
    heads: int
    reader: str = ""
    columns: tuple[tuple[int, ...], ...] = ()
    slices: tuple[Slices, ...] = ()
    reason: str = ""
    values: Inner = Inner(0)
    pairs: Inner = Inner(0)
