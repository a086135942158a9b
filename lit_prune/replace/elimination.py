"""Which units a layer can spare when its weights are solved again: backward elimination on second moments."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_prune.replace.regression import ridged

RANK = 1e-12  # share of the largest eigenvalue below which one counts as 0


@dataclass
class Elimination:
    """The state of one reader of a group during the elimination.

    Attributes:
        inverse: inverse of the ridged covariance of its input patches, float64 [D, D]; changed by the elimination.
        weight: its flattened kernels, rows weighted by sensitivity, float64 [O, D]; changed by the elimination.
        columns: for each unit its places in the patch, int64 [units, taps].
    """

    inverse: Tensor
    weight: Tensor
    columns: Tensor

    @classmethod
    def build(cls, covariance: Tensor, weight: Tensor, metric: Tensor, columns: Tensor, ridge: float) -> "Elimination":
        """From population moments.

        Args:
            covariance: of the input patches, [D, D].
            weight: [O, D].
            metric: positive semidefinite [O, O]; an error δ of the output counts δᵀ·metric·δ.
            columns: [units, taps].
            ridge: relative to each input's own variance.
        """
        values, vectors = torch.linalg.eigh(metric)
        seen = values > RANK * values[-1]  # few images give a classifier of 1,000 outputs a metric of low rank
        root = (vectors[:, seen] * values[seen].sqrt()).T  # rootᵀ root = metric
        return cls(torch.cholesky_inverse(torch.linalg.cholesky(ridged(covariance, ridge))), root @ weight, columns)

    def costs(self, units: Tensor) -> Tensor:
        """Rise of the error if one of `units` goes and all other weights are solved again, float64 [len(units)].

        `tr(W_j (P_jj)⁻¹ W_jᵀ)`, P the inverse and W the present solution (optimal brain surgeon, on blocks).
        """
        columns = self.columns[units]  # [n, taps]
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]  # [n, taps, taps]
        weight = self.weight[:, columns].movedim(1, 0)  # [n, O, taps]
        solved = torch.linalg.solve(blocks, weight.transpose(1, 2))  # [n, taps, O]
        return (weight.transpose(1, 2) * solved).sum((1, 2))

    def remove(self, unit: int) -> None:
        """Takes the unit out and solves the other weights again."""
        columns = self.columns[unit]
        rows = self.inverse[columns]  # [taps, D]
        solved = torch.linalg.solve(rows[:, columns], rows)  # P_jj⁻¹ P_j:
        self.weight -= self.weight[:, columns] @ solved
        self.inverse -= rows.T @ solved


def elimination_costs(readers: Sequence[Elimination], units: int) -> Tensor:
    """Error that each unit adds when it goes in greedy order (the cheapest of those left goes next), float64 [units].

    The error is Σ over readers of `E (W u - Ŵ u_K)ᵀ metric (W u - Ŵ u_K)`, Ŵ the least-squares solution on the units
    still there. Values never fall along the order, so that their ranking is the order; the last unit has the largest.

    Args:
        readers: layers that read the units; used up.
        units: how many there are.
    """
    left = torch.arange(units)
    costs = torch.zeros(units, dtype=torch.float64)
    highest = 0.0
    while len(left) > 1:
        rises = torch.stack([reader.costs(left) for reader in readers]).sum(0)
        place = int(rises.argmin())
        unit = int(left[place])
        highest = max(highest * (1 + 1e-12), float(rises[place]))
        costs[unit] = highest
        for reader in readers:
            reader.remove(unit)
        left = torch.cat([left[:place], left[place + 1 :]])
    costs[left] = max(highest * (1 + 1e-12), float(sum(reader.costs(left) for reader in readers)))
    return costs
