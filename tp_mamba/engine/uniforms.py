"""The random numbers of one sequence."""

from __future__ import annotations

import numpy as np


class UniformStream:
    """Uniform numbers in [0, 1) for one sequence: the ``i``-th depends on seed, index, sample and ``i`` alone.

    Philox is counter-based, and numpy promises not to change its raw output. ``(seed, index)`` is its key, and the
    highest of the four words of its counter tells the samples of one prompt apart.
    """

    def __init__(self, seed: int, index: int, sample: int = 0) -> None:
        key, counter = (np.array(words, dtype=np.uint64) for words in ([seed, index], [0, 0, 0, sample]))
        self._bits = np.random.Philox(key=key, counter=counter)

    def next(self) -> float:
        """The next number, a multiple of 2^-53."""
        return (self._bits.random_raw() >> 11) * 2.0**-53
