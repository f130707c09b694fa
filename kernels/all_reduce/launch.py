"""How an all-reduce is dealt to programs, and which way a message goes.

All of it follows from shapes, dtypes and what the ranks have agreed on: program p of one rank talks to program p of
the others, so a rank that cut a message otherwise would wait for ever.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from tp_mamba.kernels.all_reduce.layout import CELL_BYTES
from tp_mamba.kernels.common.integers import cdiv
from tp_mamba.kernels.rms_norm.launch import launch_plan as norm_plan
from tp_mamba.kernels.split_dt_bc.launch import LaunchPlan as SplitPlan
from tp_mamba.kernels.split_dt_bc.launch import launch_plan as split_plan_of

SMALL_BLOCK_BYTES = 4096
"""A small message is spread over many programs: a thread then has few accesses, one after the other, to make."""

LARGE_BLOCK_BYTES = 8192
"""A large one is cut into fewer and larger blocks, each a full access of every thread or two."""

ONE_WAY_BYTES = 1 << 20
"""Messages of this many bytes, times 2 / (n - 2), go one way over n ranks, larger ones two.

One way a rank sends (n - 1) times the message, two ways 2 (n - 1) / n times, but the second costs a latency of some
3 us more and the norm behind it a kernel. With two ranks both send the same. Derived, from 370 GB/s; not measured.
"""


@dataclass(frozen=True)
class Room:
    """What a kernel may take of a GPU, so that all its programs are there at once, and those of another group too."""

    programs: int
    registers: int
    """Of a thread; an SM has 65536."""


@functools.cache
def room(programs: int, size: int, itemsize: int, num_warps: int) -> Room:
    """The room of a kernel in an exchange of so many programs over ``size`` ranks, for terms of ``itemsize`` bytes."""
    # Twice as many small programs hide one another's latencies, where what they hold fits into half the registers.
    two_per_sm = size == 2 and (num_warps <= 4 or (num_warps == 8 and itemsize == 2))
    if size == 2 and not two_per_sm:
        programs = max(1, programs // 2)
    return Room(programs, min(255, 65536 // (32 * num_warps * (4 if two_per_sm else 2))))


@dataclass(frozen=True)
class PlainPlan:
    """``programs`` take blocks of ``BLOCK_E`` elements in turn; two ways they take n of them at a time."""

    BLOCK_E: int
    num_warps: int
    programs: int
    registers: int
    two_ways: bool


def goes_one_way(nbytes: int, size: int) -> bool:
    """Whether a message of so many bytes goes one way over ``size`` ranks."""
    return size == 2 or nbytes * (size - 2) <= 2 * ONE_WAY_BYTES


@functools.lru_cache(maxsize=4096)
def plain_plan(
    elements: int, dtype: torch.dtype, out_dtype: torch.dtype, size: int, programs: int
) -> PlainPlan:
    """The plan of a plain sum over ``size`` ranks, in an exchange of so many programs."""
    itemsize = max(dtype.itemsize, out_dtype.itemsize)
    two_ways = not goes_one_way(elements * dtype.itemsize, size)
    # Two ways a program has, beside its own block, those of all other ranks in hand.
    large, step = LARGE_BLOCK_BYTES // itemsize, size if two_ways else 1
    small = SMALL_BLOCK_BYTES // itemsize
    block, num_warps = (small, 4) if not two_ways and elements <= programs * small else (large, 8)
    most = room(programs, size, itemsize, num_warps)
    return PlainPlan(
        block, num_warps, min(most.programs, cdiv(elements, step * block)), most.registers, two_ways
    )


def norm_goes_one_way(T: int, H: int, dtype: torch.dtype, size: int) -> bool:
    """Whether a sum of ``[T, H]`` is normed by the kernel that receives it: whole rows fit, and go one way."""
    plan = norm_plan(H)
    return plan.BLOCK_T * plan.BLOCK_H * dtype.itemsize <= CELL_BYTES and goes_one_way(
        T * H * dtype.itemsize, size
    )


def split_plan(T: int, R: int, N: int, dt_dtype: torch.dtype, size: int, programs: int) -> SplitPlan | None:
    """The plan of a sum of ``[T, R + 2 N]`` in float32 that is split by the kernel that receives it; None if it is not.

    The bits are those of split_dt_bc, whichever of its two plans this is: few tokens are dealt to more programs.
    """
    small = split_plan_of(R, N, True, dt_dtype)
    plan = small if programs * small.BLOCK_T >= T else split_plan_of(R, N, False, dt_dtype)
    block = plan.BLOCK_T * (plan.BLOCK_R + 2 * plan.BLOCK_N)
    fits = 4 * block <= CELL_BYTES and goes_one_way(4 * T * (R + 2 * N), size)
    return plan if fits else None
