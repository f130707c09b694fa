"""How the fused step is cut into programs: a function of shapes and of the device. Results do not depend on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tp_mamba.kernels.common.device import DeviceProperties
from tp_mamba.kernels.common.integers import cdiv, next_power_of_2

BLOCK_B = 8
"""Rows of the batch: the columns of the tensor core's tile."""

BLOCK_D = 32
"""Channels: of one row and state, one line of memory."""

PER_THREAD = 2
"""Adjacent channels of a row that a thread owns, with all their states."""

MAX_RANK = 256
"""The largest R: a program multiplies its part of dt_proj's weight in one product."""

REGISTERS = 128
"""Per thread: 16 warps then share an SM, whose loads in flight are 64 KB of states."""

_FEW_ROWS = 2
"""Up to here most warps have nothing to do: half as many programs, of 64 channels, are faster if that still leaves
about one per SM."""

_MANY_OUTPUTS = 1985
"""Rows times channels per SM from which a program takes two blocks of rows, one after the other: all programs are then
resident at once, and each reads its rows of the weight, and A, for twice as many rows. Four blocks spill, and are
slower."""

_MAX_PROGRAMS = 65535
"""Along the grid's second axis."""


@dataclass(frozen=True)
class LaunchPlan:
    """One launch of the kernel."""

    grid: tuple[int, int]
    """Blocks of channels, blocks of rows."""
    blocks: int
    """Blocks of eight rows that a program takes, one after the other."""
    block_d: int
    """Channels per program."""
    block_r: int
    """The power of two from R, and no less than the depth of the tensor core's instruction."""
    num_warps: int


@functools.lru_cache(maxsize=1024)
def launch_plan(batch: int, channels: int, rank: int, device: DeviceProperties) -> LaunchPlan | None:
    """The plan for ``batch`` rows; None where there are more blocks of rows than a grid has room for."""
    blocks = 2 if batch > BLOCK_B and batch * channels >= _MANY_OUTPUTS * device.sm_count else 1
    block_d, wide = BLOCK_D, 2 * BLOCK_D
    if batch <= _FEW_ROWS and channels % wide == 0 and 11 * (channels // wide) >= 10 * device.sm_count:
        block_d = wide
    return plan_of(batch, channels, rank, blocks, block_d)


def plan_of(batch: int, channels: int, rank: int, blocks: int, block_d: int) -> LaunchPlan | None:
    """The plan of a given cut."""
    row_programs = cdiv(batch, blocks * BLOCK_B)
    if row_programs > _MAX_PROGRAMS:
        return None
    return LaunchPlan(
        grid=(channels // block_d, row_programs),
        blocks=blocks,
        block_d=block_d,
        block_r=max(16, next_power_of_2(rank)),
        num_warps=BLOCK_B * block_d // PER_THREAD // 32,
    )
