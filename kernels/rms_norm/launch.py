"""How RMSNorm is cut into programs: whole rows, and how a row is summed depends on its length alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tp_mamba.kernels.common.integers import next_power_of_2


@dataclass(frozen=True)
class LaunchPlan:
    """A program normalises ``BLOCK_T`` whole rows of up to ``BLOCK_H`` columns."""

    BLOCK_T: int
    BLOCK_H: int
    num_warps: int


@functools.cache
def launch_plan(H: int) -> LaunchPlan:
    """The plan for rows of ``H`` columns, however many."""
    block_h = next_power_of_2(H)
    # Rows as short as dt, B and C: several of them fill a program.
    return LaunchPlan(max(1, 1024 // block_h), block_h, min(32, max(4, block_h // 512)))
