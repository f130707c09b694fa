"""The tile of states that a program of the kernels for any layout holds: the same for the scan and the update."""

from __future__ import annotations

from tp_mamba.kernels.common.integers import next_power_of_2

BLOCK_D = 32
"""Channels per program: one per lane, so that a thread owns all the states it sums."""


def state_tile(n: int) -> tuple[int, int]:
    """``BLOCK_N`` and the number of warps for state size ``n``: 16 states per thread; more would spill."""
    block_n = max(4, next_power_of_2(n))
    return block_n, max(1, block_n // 16)
