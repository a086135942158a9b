"""Which units a layer can spare when its weights are solved again: backward elimination on second moments."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_prune.replace.regression import ridged

RANK = 1e-12  # share of the largest eigenvalue below which one counts as 0
WAITING = 32  # removals carried out in one product


@dataclass
class Elimination:
    """The state of one reader of a group during the elimination; units are told by their place among those held.

    The inverse is `inverse - Σ rowsᵀ solved` over the removals that wait: a layer of 512 channels and 3 x 3 kernels has
    one of 4,608 x 4,608, and to write all of it once a removal would take most of an elimination's time.

    Attributes:
        inverse: inverse of the ridged covariance of its input patches at the units' places, float64 [units·taps, same].
        weight: its flattened kernels there, transposed, outputs weighted by sensitivity, float64 [units·taps, O].
        blocks: present diagonal blocks of the inverse, float64 [units, taps, taps].
        waiting: (rows, solved) of each removal that `inverse` does not have yet, [taps, units·taps] both.
    """

    inverse: Tensor
    weight: Tensor
    blocks: Tensor
    waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def build(cls, covariance: Tensor, weight: Tensor, metric: Tensor, columns: Tensor, ridge: float) -> "Elimination":
        """From population moments.

        Args:
            covariance: of the input patches, [D, D].
            weight: [O, D].
            metric: positive semidefinite [O, O]; an error δ of the output counts δᵀ·metric·δ.
            columns: places of each unit in the patch, int64 [units, taps].
            ridge: relative to each input's own variance.
        """
        values, vectors = torch.linalg.eigh(metric)
        seen = values > RANK * values[-1]  # few images give a classifier of 1,000 outputs a metric of low rank
        root = (vectors[:, seen] * values[seen].sqrt()).T  # rootᵀ root = metric
        read = root @ weight
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged(covariance, ridge, read.square().sum(0))))
        blocks = inverse[columns[:, :, None], columns[:, None, :]]
        places = columns.flatten()
        return cls(inverse[places][:, places], read[:, places].T.contiguous(), blocks)

    def costs(self, units: Tensor) -> Tensor:
        """Rise of the error if one of `units` goes and all other weights are solved again, float64 [len(units)].

        `tr(W_j (P_jj)⁻¹ W_jᵀ)`, P the inverse and W the present solution (optimal brain surgeon, on blocks).
        """
        weight = self.weight.unflatten(0, self.blocks.shape[:2])[units]  # [n, taps, O]
        return torch.linalg.solve(self.blocks[units], weight @ weight.mT).diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, unit: int) -> None:
        """Takes the unit out and solves the other weights again."""
        units, taps = self.blocks.shape[:2]
        here = slice(unit * taps, (unit + 1) * taps)
        rows = self.inverse[here].clone()
        for before, solved in self.waiting:
            rows -= before[:, here].T @ solved
        solved = torch.linalg.solve(rows[:, here], rows)  # P_jj⁻¹ P_j:
        self.weight -= solved.T @ self.weight[here]
        self.blocks -= torch.einsum(
            "aub,auc->ubc", rows.unflatten(1, (units, taps)), solved.unflatten(1, (units, taps))
        )
        self.waiting.append((rows, solved))

    def keep(self, units: Tensor) -> None:
        """Carries the waiting removals out and forgets all units but these."""
        if self.waiting:
            rows, solved = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
            self.inverse.addmm_(rows.T, solved, alpha=-1)
        taps = self.blocks.shape[1]
        places = (units[:, None] * taps + torch.arange(taps)).flatten()
        self.inverse, self.weight = self.inverse[places][:, places], self.weight[places]
        self.blocks, self.waiting = self.blocks[units], []


def elimination_costs(readers: Sequence[Elimination], units: int) -> Tensor:
    """Error that each unit adds when it goes in greedy order (the cheapest of those left goes next), float64 [units].

    The error is Σ over readers of `E (W u - Ŵ u_K)ᵀ metric (W u - Ŵ u_K)`, Ŵ the least-squares solution on the units
    still there. Values never fall along the order, so that their ranking is the order; the last unit has the largest.

    Args:
        readers: layers that read the units; used up.
        units: how many there are.
    """
    held, left = torch.arange(units), torch.arange(units)  # units that the readers hold; places in it not yet removed
    costs = torch.zeros(units, dtype=torch.float64)
    highest = 0.0
    while len(left):
        rises = torch.stack([reader.costs(left) for reader in readers]).sum(0)
        cheapest = int(rises.argmin())
        place, left = int(left[cheapest]), torch.cat([left[:cheapest], left[cheapest + 1 :]])
        highest = max(highest * (1 + 1e-12), float(rises[cheapest]))
        costs[held[place]] = highest
        for reader in readers:
            reader.remove(place)
        if len(held) - len(left) == WAITING:
            for reader in readers:
                reader.keep(left)
            held, left = held[left], torch.arange(len(left))
    return costs
