"""How RMSNorm is cut into programs: whole rows, and how a row is summed depends on its length alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tp_mamba.kernels.common.integers import cdiv, next_power_of_2


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


MOST_PROGRAMS = 256
"""Programs of a backward, each with a row of partial sums of its own: some two per SM of an H100."""


@dataclass(frozen=True)
class BackwardPlan(LaunchPlan):
    """A program takes ``steps`` times ``BLOCK_T`` rows, one after another."""

    steps: int
    ahead: bool
    """Whether the next rows are in flight while these are computed: as long as registers hold both."""


@functools.lru_cache(maxsize=4096)
def backward_plan(T: int, H: int) -> BackwardPlan:
    """The plan of the backward for ``T`` rows of ``H`` columns."""
    plan = launch_plan(H)
    steps = cdiv(T, plan.BLOCK_T * MOST_PROGRAMS)
    warps = min(32, max(4, plan.BLOCK_H // 256))
    return BackwardPlan(plan.BLOCK_T, plan.BLOCK_H, warps, steps, ahead=plan.BLOCK_H <= 4096)
