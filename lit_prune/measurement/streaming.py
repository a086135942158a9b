"""A layer's batches on their way into its sums: shifted block by block in the cache, multiplied, settled in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_prune.measurement.moments import LayerSums, plus
from lit_prune.measurement.products import SymmetricSum, transformed

BLOCK_BYTES = 1 << 21  # a core's share of the cache; what is shifted stays there for its mean and product
LARGE_BLOCK_BYTES = 1 << 28  # on an accelerator a launch costs more than a trip to memory
LANE_SUMS = 1 << 22  # entries of the matrices of all lanes of one layer
FEWEST_ROWS = 512  # fewer samples in a product, and the sums travel through memory more often than the samples
FEW_POSITIONS = 4
FIRST_IMAGES = 64  # whose mean is near enough to that of all
MAPPED_CHUNK = 512  # W·M·Wᵀ may cancel four fifths of M, which then has to be as much more exact


@dataclass(frozen=True)
class AffineMap:
    """y = W·x + b, the same at every position.

    Attributes:
        weight: W [N, C].
        bias: b [N], or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    def point(self, values: Tensor) -> Tensor:
        """W·x + b of points [C], float64 [N]."""
        mapped = self.weight.double() @ values.double()
        return mapped if self.bias is None else mapped + self.bias.double()

    def rows(self, values: Tensor) -> Tensor:
        """W·z of differences z [S, C], [S, N]."""
        return values @ self.weight.T


def images_are_lanes(positions: int, channels: int) -> bool:
    """Whether the product of one image [n, n] is no larger than the image [n, P]."""
    return channels <= positions


def threads_on(values: Tensor) -> int:
    """Threads that work on the values; an accelerator needs no division of labour from here."""
    return torch.get_num_threads() if values.is_cpu else 1


class Blocks:
    """A block of memory that all layers share, and how a batch goes through it: some images at a time.

    What is multiplied comes in lanes [L, S, n], each with a product of its own. In a map with no more channels than
    positions every image is a lane, and nothing has to change its place. In others the channels of many images have to
    be brought together, and a lane is what one thread can work on from the shift to the product: consecutive images,
    as the threads divide them when the layer runs, so that a thread can find the outputs where it left them.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def divided(self, values: Tensor) -> Tensor:
        """The values [B, P, n] as parts [T, B/T, P, n]; T = 1 but where T threads divide the images evenly.

        It is 1 too where images are lanes, for outputs with one position, and where T matrices were too large.
        """
        images, positions, channels = values.shape
        threads = threads_on(values)
        alone = positions == 1 or images_are_lanes(positions, channels)
        count = 1 if alone or images % threads or threads * channels**2 > LANE_SUMS else threads
        return values.view(count, images // count, positions, channels)

    def size(self, parts: Tensor, itemsize: int) -> int:
        """Images of each of the parts [T, B, P, n] in a block, at least one; `itemsize` bytes a value."""
        count, _, positions, channels = parts.shape
        threads = threads_on(parts)
        most = (BLOCK_BYTES if parts.is_cpu else LARGE_BLOCK_BYTES) * threads // count
        most //= itemsize * positions * channels
        if not images_are_lanes(positions, channels):
            return max(1, most, FEWEST_ROWS // positions)
        most = max(1, min(most, LANE_SUMS // channels**2))
        return most // threads * threads or most  # so that the threads have as many images each

    def shifted(self, parts: Tensor, shift: Tensor) -> Tensor:
        """The parts [T, B, P, n] minus the shift, in the memory order in which their means and products are fast."""
        size = parts.numel() * shift.itemsize
        if self._memory.device != parts.device or self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8, device=parts.device)
        count, images, positions, channels = parts.shape
        flat = self._memory[:size].view(shift.dtype)
        if parts.stride(3) == 1 or positions <= FEW_POSITIONS:  # a mean of so few neighbours is slow
            view = flat.view(parts.shape)
        elif images_are_lanes(positions, channels):
            view = flat.view(count, images, channels, positions).transpose(2, 3)
        else:
            view = flat.view(count, channels, images, positions).permute(0, 2, 3, 1)
        return torch.sub(parts, shift, out=view)

    def lanes(self, block: Tensor) -> Tensor:
        """The samples of a block [T, B, P, n] as lanes [L, S, n]; the threads share the positions of a lone image."""
        _, images, positions, channels = block.shape
        if not images_are_lanes(positions, channels):
            return block.flatten(1, 2)
        threads = threads_on(block)
        return block.view(threads, -1, channels) if images == 1 and positions % threads == 0 else block[0]


class LayerStream:
    """Adds a layer's batches to `sums`, which are complete after `flush`.

    Where an affine map is given, the values it is fed are those of the layer's input x [B, P, C], C < N, and
    Σ z zᵀ = W·(Σ x xᵀ)·Wᵀ: the quadratic form of the definition, exact, at a fraction of the cost. So for the means.
    Until `flush`, the second moments and the counts of `sums` lag behind their first moments.

    Args:
        sums: the layer's sums.
        shift: [n], near the means of the values it will be fed; in their precision, float32 at least.
        blocks: memory to work in.
        affine: from what it is fed to the layer's output, in the precision of the shift, or None where that is what
            it is fed.
    """

    def __init__(self, sums: LayerSums, shift: Tensor, blocks: Blocks, affine: AffineMap | None = None) -> None:
        self.sums, self.shift, self.affine = sums, shift, affine
        self._blocks = blocks
        short = affine is not None and shift.dtype == torch.float32
        self._second = SymmetricSum(MAPPED_CHUNK) if short else SymmetricSum()
        self._pooled_second = SymmetricSum()
        self._rows: list[Tensor] = []  # pooled values whose product is pending
        self._waiting = 0  # how many those are
        self._images = self._samples = 0  # that `sums` have still to hear of
        self._one_position = not int(sums.samples)  # of every image so far: both second moments are one

    @classmethod
    def start(cls, values: Tensor, blocks: Blocks, affine: AffineMap | None = None) -> LayerStream:
        """An empty stream around the mean of its first values [B, P, n], B > 0, in the precision of W where given."""
        least = torch.float32 if affine is None else affine.weight.dtype
        shift = values[:FIRST_IMAGES].mean((0, 1), dtype=torch.promote_types(values.dtype, least))
        return cls(LayerSums.zeros(shift if affine is None else affine.point(shift)), shift, blocks, affine)

    def add(
        self, values: Tensor, places: Tensor | None = None, match: bool = False, outputs: Tensor | None = None
    ) -> Tensor:
        """Adds one batch [B, P, n] and returns its shifted outputs pooled over positions, float64 [B, N].

        Args:
            values: outputs of the layer, or inputs of its affine map.
            places: [B, k], the positions that are samples; None takes all.
            match: pool over those alone.
            outputs: [B, P, N], of the layer; those of one position need not be made anew from its inputs.
        """
        if self._one_position and values.shape[1] > 1:
            self.flush()
            self._one_position = False
        samples = values if places is None else _picked(values, places)
        chosen = self._through_blocks(samples, None if self._one_position else self._second)
        pooled = chosen if match or samples is values else self._through_blocks(values, None)
        own = outputs[:, 0] if outputs is not None and outputs.shape[1] == 1 else None
        return self._count(pooled, chosen, samples.shape[1], own)

    def _through_blocks(self, values: Tensor, products: SymmetricSum | None) -> Tensor:
        """Shifted means [B, n] of values [B, P, n]; block by block, so that what is shifted can be multiplied too."""
        parts = self._blocks.divided(values)
        count, each, _, channels = parts.shape
        pooled = values.new_empty(count, each, channels, dtype=self.shift.dtype)
        size = self._blocks.size(parts, self.shift.itemsize)
        for start in range(0, each, size):
            some = slice(start, start + size)
            block = self._blocks.shifted(parts[:, some], self.shift)
            torch.mean(block, 2, out=pooled[:, some])
            if products is not None:
                products.add(self._blocks.lanes(block))
        return pooled.flatten(0, 1)

    def _count(self, pooled: Tensor, sampled: Tensor, positions: int, own: Tensor | None) -> Tensor:
        """Adds what follows from a batch's means over all positions and over the samples, both [B, n].

        Args:
            pooled: means over all positions, shifted.
            sampled: means over the samples, shifted.
            positions: samples of an image.
            own: the layer's outputs [B, N] where they have one position.
        """
        images = pooled.shape[0]
        self._rows.append(pooled)
        self._waiting += images
        if self._waiting >= FEWEST_ROWS:
            self._multiply_rows()
        outputs = self._outputs(pooled) if own is None else own - self.sums.shift
        total = outputs.sum(0)
        self.sums.pooled_first += total
        self.sums.first.add_(total if sampled is pooled else self._outputs(sampled).sum(0), alpha=positions)
        self._images += images
        self._samples += images * positions
        return outputs

    def _outputs(self, differences: Tensor) -> Tensor:
        """The layer's outputs [S, N], shifted, float64, from values minus the shift [S, n]."""
        return (differences if self.affine is None else self.affine.rows(differences)).double()

    def _multiply_rows(self) -> None:
        if self._rows:
            rows = torch.cat(self._rows)
            products = self._second if self._one_position else self._pooled_second
            products.add(rows if self.affine is None else rows.double())
            self._rows, self._waiting = [], 0

    def flush(self) -> None:
        """Completes the sums."""
        self.sums.images += self._images
        self.sums.samples += self._samples
        self._images = self._samples = 0
        self._multiply_rows()
        joint, pooled = self._second.take(), self._pooled_second.take()
        if joint is not None:
            self.sums.second = plus(self.sums.second, self._mapped(joint))
            if self._one_position:
                self.sums.pooled_second = self.sums.second
        if pooled is not None:
            self.sums.pooled_second = plus(self.sums.pooled_second, self._mapped(pooled))

    def _mapped(self, products: Tensor) -> Tensor:
        """The products [N, N] of the layer's outputs from those [n, n] of what it was fed."""
        return products if self.affine is None else transformed(self.affine.weight.double(), products)


def _picked(values: Tensor, places: Tensor) -> Tensor:
    """The values [B, k, n] of [B, P, n] at the places [B, k] of each image, in the same memory order."""
    if values.stride(2) == 1:
        return values.gather(1, places[:, :, None].expand(-1, -1, values.shape[2]))
    return values.transpose(1, 2).gather(2, places[:, None].expand(-1, values.shape[2], -1)).transpose(1, 2)
