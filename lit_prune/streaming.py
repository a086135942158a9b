"""A layer's batches on their way into its sums: shifted block by block in the cache, multiplied, settled in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_prune.moments import LayerSums, plus
from lit_prune.products import SymmetricSum, transformed

BLOCK_BYTES = 1 << 21  # a core's share of the cache; what is shifted stays there for its mean and product
LARGE_BLOCK_BYTES = 1 << 28  # on an accelerator a launch costs more than a trip to memory
LANE_SUMS = 1 << 22  # entries of the matrices of all lanes of one layer
FEWEST_ROWS = 512  # fewer samples in a product, and the sums travel through memory more often than the samples
SMALL_MAP = 4  # positions


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


def large_map(positions: int, channels: int) -> bool:
    """Whether the product of one image [n, n] is no larger than the image [n, P]."""
    return channels <= positions


class Blocks:
    """A block of memory that all layers share, and how a batch goes through it: some images at a time.

    What is multiplied comes in lanes [L, S, n], each with a product of its own. In a map with no more channels than
    positions every image is a lane, in the memory order of the values. In others the channels of many images have to
    be brought together, and a lane is what one thread works on from the shift to the product: consecutive images, as
    the threads divide them when the layer runs, so that a thread finds the outputs where it left them.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def divided(self, values: Tensor) -> Tensor:
        """The values [B, P, n] as [T, B/T, P, n]; T = 1 but for T threads of the CPU that divide the images evenly.

        It is 1 too where images are lanes, for outputs with one position, and where T matrices were too large.
        """
        images, positions, channels = values.shape
        threads = torch.get_num_threads()
        alone = not values.is_cpu or positions == 1 or large_map(positions, channels)
        count = 1 if alone or images % threads or threads * channels**2 > LANE_SUMS else threads
        return values.view(count, images // count, positions, channels)

    def size(self, values: Tensor) -> int:
        """Images of each of the T parts [T, B, P, n] in a block, at least one."""
        count, _, positions, channels = values.shape
        wanted = BLOCK_BYTES * torch.get_num_threads() // count if values.is_cpu else LARGE_BLOCK_BYTES
        most = wanted // (4 * positions * channels)
        if not large_map(positions, channels):
            return max(1, most, FEWEST_ROWS // positions)
        most, threads = max(1, min(most, LANE_SUMS // channels**2)), torch.get_num_threads()
        return most - most % threads if most > threads else most  # so that the threads have as many images each

    def shifted(self, values: Tensor, shift: Tensor) -> Tensor:
        """The values [T, B, P, n] minus the shift, in the memory order in which its mean and product are fast."""
        block = self._memory
        if (block.device, block.dtype) != (values.device, shift.dtype) or block.numel() < values.numel():
            block = self._memory = torch.empty(values.numel(), dtype=shift.dtype, device=values.device)
        count, images, positions, channels = values.shape
        flat = block[: values.numel()]
        if values.stride(3) == 1 or positions <= SMALL_MAP:  # a mean of so few neighbours is slow
            view = flat.view(values.shape)
        elif large_map(positions, channels):
            view = flat.view(count, images, channels, positions).transpose(2, 3)
        else:
            view = flat.view(count, channels, images, positions).permute(0, 2, 3, 1)
        return torch.sub(values, shift, out=view)

    def lanes(self, block: Tensor) -> Tensor:
        """The samples of a block [T, B, P, n] as lanes [L, S, n]; the threads share the positions of a lone image."""
        _, images, positions, channels = block.shape
        if not large_map(positions, channels):
            return block.flatten(1, 2)
        threads = torch.get_num_threads() if block.is_cpu else 1
        return block.view(threads, -1, channels) if images == 1 and positions % threads == 0 else block[0]


class LayerStream:
    """Adds a layer's batches to `sums`, which are complete after `flush`.

    Where an affine map is given, the values it is fed are those of the layer's input x [B, P, C], C < N, and
    Σ z zᵀ = W·(Σ x xᵀ)·Wᵀ: the quadratic form of the definition, exact, at a fraction of the cost. So for the means.

    Args:
        sums: the layer's sums.
        shift: [n], near the means of the values it will be fed; in their precision, float32 at least.
        blocks: memory to work in.
        affine: from what it is fed to the layer's output, or None where that is what it is fed.

    Attributes:
        total: [N], float64, the sum of what the last `add` returned.
    """

    def __init__(self, sums: LayerSums, shift: Tensor, blocks: Blocks, affine: AffineMap | None = None) -> None:
        self.sums, self.shift, self.affine = sums, shift, affine
        self.total = torch.zeros_like(sums.shift)
        self._blocks = blocks
        self._second, self._pooled_second = SymmetricSum(), SymmetricSum()
        self._rows: list[Tensor] = []  # pooled values whose product is pending
        self._waiting = 0  # how many those are
        self._images = self._samples = 0  # that `sums` have still to hear of
        self._single = not int(sums.samples)  # every image so far had one position: both second moments are one

    @classmethod
    def start(cls, values: Tensor, blocks: Blocks, affine: AffineMap | None = None) -> LayerStream:
        """An empty stream around the mean of its first values [B, P, n]."""
        shift = values.mean((0, 1), dtype=torch.promote_types(values.dtype, torch.float32))
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
        if self._single and values.shape[1] > 1:
            self.flush()
            self._single = False
        samples = values if places is None else _picked(values, places)
        chosen = self._through_blocks(samples, None if self._single else self._second)
        pooled = chosen if match or samples is values else self._through_blocks(values, None)
        known = outputs[:, 0] if outputs is not None and outputs.shape[1] == 1 else None
        return self._count(pooled, chosen, samples.shape[1], known)

    def _through_blocks(self, values: Tensor, products: SymmetricSum | None) -> Tensor:
        """Shifted means [B, n] of values [B, P, n]; block by block, so that what is shifted can be multiplied too."""
        parts = self._blocks.divided(values)
        count, each, _, channels = parts.shape
        pooled = values.new_empty(count, each, channels, dtype=self.shift.dtype)
        size = self._blocks.size(parts)
        for start in range(0, each, size):
            some = slice(start, start + size)
            block = self._blocks.shifted(parts[:, some], self.shift)
            torch.mean(block, 2, out=pooled[:, some])
            if products is not None:
                products.add(self._blocks.lanes(block))
        return pooled.flatten(0, 1)

    def _count(self, pooled: Tensor, sampled: Tensor, positions: int, known: Tensor | None) -> Tensor:
        """Adds what follows from a batch's means over all positions and over the samples, both [B, n]."""
        images = pooled.shape[0]
        self._rows.append(pooled)
        self._waiting += images
        if self._waiting >= FEWEST_ROWS:
            self._multiply_rows()
        exact = self._outputs(pooled) if known is None else known - self.sums.shift
        self.total = exact.sum(0)
        self.sums.pooled_first += self.total
        self.sums.first.add_(self.total if sampled is pooled else self._outputs(sampled).sum(0), alpha=positions)
        self._images += images
        self._samples += images * positions
        return exact

    def _outputs(self, differences: Tensor) -> Tensor:
        """The layer's outputs [S, N], shifted, float64, from values minus the shift [S, n]."""
        return (differences if self.affine is None else self.affine.rows(differences)).double()

    def _multiply_rows(self) -> None:
        if self._rows:
            (self._second if self._single else self._pooled_second).add(torch.cat(self._rows))
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
            if self._single:
                self.sums.pooled_second = self.sums.second
        if pooled is not None:
            self.sums.pooled_second = plus(self.sums.pooled_second, self._mapped(pooled))

    def _mapped(self, products: Tensor) -> Tensor:
        """The products [N, N] of the layer's outputs from those [n, n] of what it was fed."""
        return products if self.affine is None else transformed(self.affine.weight, products)


def _picked(values: Tensor, places: Tensor) -> Tensor:
    """The values [B, k, n] of [B, P, n] at the places [B, k] of each image, in the same memory order."""
    if values.stride(2) == 1:
        return values.gather(1, places[:, :, None].expand(-1, -1, values.shape[2]))
    return values.transpose(1, 2).gather(2, places[:, None].expand(-1, values.shape[2], -1)).transpose(1, 2)
