"""A Boolean function of eight bits, four of them irrelevant: the control task of mechanism replacement."""

from typing import Any

import torch

from lit_prune.data.images import ImageData
from lit_prune.data.seeding import seeded_generator
from lit_prune.data.sources import MemoryImages

POINTS, TEST_SHARE, BITS = 4096, 0.2, 8


class BooleanCircuitData(ImageData):
    """`XOR(AND(x1, x2), OR(x3, x4))` of eight independent fair bits, as images of 1x8 pixels that are 0 or 1.

    4,096 points are drawn, so the 256 inputs come about 16 times each; four fifths are for training. The draw follows
    `seed`; `root` and `download` are not used. With `mean=[0.5], std=[0.5]` the bits are -1 or 1: on those a network
    spreads the function over so many units that a random half of them can go.

    Args:
        pad: Has no meaning for bits, 0.
        flip: Likewise off.
        **options: Those of every data set.

    Source: causal mechanism reduction, appendix B.3.
    """

    CLASSES = 2
    MEAN, STD = (0.0,), (1.0,)

    def __init__(self, pad: int = 0, flip: bool = False, **options: Any) -> None:
        super().__init__(pad=pad, flip=flip, **options)
        self.image_shape = (1, 1, BITS)

    @property
    def preparation(self) -> None:
        """Bits are no image files."""
        return

    def load_split(self, split: str) -> MemoryImages:
        """Points of the split in memory."""
        bits = torch.randint(2, (POINTS, BITS), generator=seeded_generator(self.seed, "circuit"), dtype=torch.uint8)
        x = bits.bool()
        labels = ((x[:, 0] & x[:, 1]) ^ (x[:, 2] | x[:, 3])).long()
        self.classes = ("false", "true")
        held_out = int(POINTS * TEST_SHARE)
        chosen = slice(held_out, None) if split == "train" else slice(held_out)
        return MemoryImages(bits[chosen, None, None] * 255, labels[chosen])
