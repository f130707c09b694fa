"""How the one-step state update is cut into programs: a function of shapes alone. Results do not depend on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tp_mamba.kernels.common.integers import cdiv
from tp_mamba.kernels.common.state_tile import BLOCK_D, state_tile

PER_THREAD = 4
"""Channels of a thread in the kernel for a mixer: 16 bytes of float32 per access. Two, with twice as many threads, take
4 to 7 % longer."""

_WARPS = 4
"""Per program of the kernel for a mixer. Two are as fast; one is not: a GPU starts some 0.7 programs per nanosecond,
however small they are."""


@dataclass(frozen=True)
class LaunchPlan:
    """One launch of either kernel."""

    grid: tuple[int, ...]
    """For a mixer: rows times blocks of channels. For any layout: rows, blocks of channels, heads."""
    block_n: int
    """States of a program's tile, a power of two; for a mixer N itself."""
    block_d: int
    """Channels per program."""
    num_warps: int


@functools.lru_cache(maxsize=1024)
def mixer_plan(batch: int, channels: int, n: int) -> LaunchPlan:
    """The plan of the kernel for a mixer's layout: four channels and four states per thread."""
    block_d = PER_THREAD * 32 * _WARPS * 4 // n
    return LaunchPlan((batch * cdiv(channels, block_d),), n, block_d, _WARPS)


@functools.lru_cache(maxsize=1024)
def any_plan(batch: int, heads: int, channels: int, n: int) -> LaunchPlan:
    """The plan of the kernel for any layout: ``channels`` per head."""
    block_n, num_warps = state_tile(n)
    return LaunchPlan((batch, cdiv(channels, BLOCK_D), heads), block_n, BLOCK_D, num_warps)
