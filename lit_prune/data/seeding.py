"""Random generators that are a pure function of what they are for."""

import zlib

import numpy as np
import torch


def seeded_generator(seed: int, *stream: int | str) -> torch.Generator:
    """CPU generator whose state depends on `seed` and `stream` alone, never on the global generator.

    Args:
        seed: The user's seed, >= 0.
        *stream: What the draws are for, such as `"shuffle", epoch`; other streams give independent draws.

    Returns:
        A fresh generator; equal arguments give equal draws on every rank, worker and device.
    """
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in stream]
    state = np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))  # manual_seed takes 63 bits
