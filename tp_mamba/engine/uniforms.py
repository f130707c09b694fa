"""The random numbers of one sequence."""

from __future__ import annotations

import numpy as np


class UniformStream:
    """Uniform numbers in [0, 1) for one sequence: the ``i``-th depends on seed, index and ``i`` alone.

    Philox is counter-based, and numpy promises not to change its raw output. ``(seed, index)`` is its key.
    """

    def __init__(self, seed: int, index: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))

    def next(self) -> float:
        """The next number, a multiple of 2^-53."""
        return (self._bits.random_raw() >> 11) * 2.0**-53
