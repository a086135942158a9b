"""KSG estimator of a channel's information about a continuous task variable, the second estimator beside g(ρ)."""

from __future__ import annotations

import torch
from sklearn.feature_selection import mutual_info_regression
from torch import Tensor

from lit_prune.errors import InputError

NEIGHBOURS = 3


def ksg_information(
    target: Tensor, values: Tensor, *, neighbours: int = NEIGHBOURS, seed: int = 0, jobs: int | None = None
) -> Tensor:
    """I(T;Y_i) of every channel by nearest neighbours, nats, float64 [N]; NaN for a constant channel or T.

    I = ψ(n) + ψ(k) - ⟨ψ(n_T + 1) + ψ(n_Y + 1)⟩, the first estimator of the source, on variables scaled to unit
    variance with seeded noise of 1e-10 that breaks ties. Nearly unbiased at independence, but half of the independent
    channels come out negative and scikit-learn clips them at 0, so their mean is above 0 (0.006 nats for n = 2000). No
    Gaussian assumption; ranks of weak channels are noisy. 5000 samples take some 40 ms a channel.

    Args:
        target: T [n].
        values: pooled outputs [n, N].
        neighbours: k, default 3.
        seed: of the tie-breaking noise.
        jobs: processes to spread the channels over, None for one.

    Raises:
        InputError: shapes that do not fit, too few samples, NaN.

    Source: Kraskov, Stögbauer and Grassberger 2004, Eq. 8, as in scikit-learn's `mutual_info_regression`.
    """
    if values.ndim != 2 or target.shape != values.shape[:1]:
        raise InputError(f"target, values: shapes {tuple(target.shape)}, {tuple(values.shape)}; give [n] and [n, N]")
    if len(target) <= neighbours:
        raise InputError(f"values: {len(target)} samples for {neighbours} neighbours; give more than that")
    if not bool(target.isfinite().all() & values.isfinite().all()):
        raise InputError("target, values: NaN or infinite; mend the network or the data")
    target, values = target.double().cpu(), values.double().cpu()
    varying = (values != values[0]).any(0) & (target != target[0]).any()
    information = torch.full_like(values[0], torch.nan)
    if varying.any():
        found = mutual_info_regression(
            values[:, varying].numpy(), target.numpy(), n_neighbors=neighbours, random_state=seed, n_jobs=jobs
        )
        information[varying] = torch.from_numpy(found).double()  # whole numbers where all are clipped at 0
    return information
