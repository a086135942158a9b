"""How much a network's answers differ from sample to sample: what a distortion is a share of."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Spread:
    """Power sums of answers [B, D], float64; batch by batch.

    Attributes:
        count: samples.
        moments: sums over samples of each value and of its square, [D] both; None before the first batch, and where
            the number of values differs among batches, as of images of several sizes.
        total: the same sums over all values, and how many there are.
    """

    count: int = 0
    moments: tuple[Tensor, Tensor] | None = None
    total: tuple[float, float, int] = (0.0, 0.0, 0)

    def add(self, values: Tensor) -> None:
        """Adds a batch."""
        first, second, number = self.total
        self.total = first + float(values.sum()), second + float(values.square().sum()), number + values.numel()
        sums = values.sum(0), values.square().sum(0)
        if not self.count:
            self.moments = sums
        elif self.moments is not None:
            fits = self.moments[0].shape == sums[0].shape
            self.moments = (self.moments[0] + sums[0], self.moments[1] + sums[1]) if fits else None
        self.count += len(values)

    def variance(self) -> float:
        """Mean over samples of `Σ_d (a_d - mean_d)²`; with several D, of the distance to the mean of all values."""
        if self.moments is None:
            first, second, number = self.total
            return (second - first**2 / number) / self.count
        first_moments, second_moments = self.moments
        return float((second_moments - first_moments.square() / self.count).sum()) / self.count
