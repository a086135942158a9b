"""A Boolean function of four of eight bits: the control task of mechanism replacement."""

from typing import Any

import torch

from lit_prune.data.images import ImageData
from lit_prune.data.sampling import seeded_generator
from lit_prune.data.sources import MemoryImages
from lit_prune.errors import InputError

POINTS, TEST_SHARE, RELEVANT = 4096, 0.2, 4


class BooleanCircuitData(ImageData):
    """`XOR(AND(x1, x2), OR(x3, x4))` of independent fair bits, eight of them, as images of 1x8 pixels that are 0 or 1.

    4,096 points are drawn, so the 256 inputs come about 16 times each; four fifths are for training. The draw follows
    `seed`; `root` and `download` are not used. With `mean=[0.5], std=[0.5]` the bits are -1 or 1: on those a network
    spreads the function over so many units that a random half of them can go.

    Args:
        pad: Has no meaning for bits, 0.
        flip: Likewise off.
        inputs: Number of bits, at least the four that matter; the paper has 8.
        label_noise: Share of the training labels that are turned round, in [0, 0.5); the paper names none.
        **options: Those of every data set.

    Raises:
        InputError: One of the two is out of range.

    Source: causal mechanism reduction, appendix B.3.
    """

    CLASSES = 2
    MEAN, STD = (0.0,), (1.0,)

    def __init__(
        self, pad: int = 0, flip: bool = False, inputs: int = 8, label_noise: float = 0.0, **options: Any
    ) -> None:
        super().__init__(pad=pad, flip=flip, **options)
        if inputs < RELEVANT:
            raise InputError(f"inputs={inputs} is too small; the circuit reads {RELEVANT} bits")
        if not 0 <= label_noise < 0.5:
            raise InputError(f"label_noise={label_noise} must lie in [0, 0.5)")
        self.label_noise = label_noise
        self.image_shape = (1, 1, inputs)

    @property
    def preparation(self) -> None:
        """Bits are no image files."""
        return

    def load_split(self, split: str) -> MemoryImages:
        """Points of the split in memory."""
        shape = (POINTS, self.image_shape[2])
        bits = torch.randint(2, shape, generator=seeded_generator(self.seed, "circuit"), dtype=torch.uint8)
        x = bits.bool()
        labels = ((x[:, 0] & x[:, 1]) ^ (x[:, 2] | x[:, 3])).long()
        self.classes = ("false", "true")
        held_out = int(POINTS * TEST_SHARE)
        chosen = slice(held_out, None) if split == "train" else slice(held_out)
        if split == "train":
            draws = torch.rand(POINTS, generator=seeded_generator(self.seed, "label noise"))
            labels = torch.where(draws < self.label_noise, 1 - labels, labels)
        return MemoryImages(bits[chosen, None, None] * 255, labels[chosen])
