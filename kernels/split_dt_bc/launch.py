"""How the rows of x_proj's output are dealt to programs.

Bits: the order in which a row's squares are summed is that of its layout over threads (how many adjacent columns each
thread has, and how many threads share a row), which Triton derives from the size of a program's tile and its number of
warps. A plan for slices is therefore a smaller program with the same layout of a row: :func:`row_layouts` says it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from tp_mamba.kernels.common.integers import next_power_of_2

MOST_SUMS = 1024
"""Programs of a backward that has sums over tokens to write, a row each: enough to hide one another's latency."""


@dataclass(frozen=True)
class LaunchPlan:
    """A program takes ``BLOCK_T`` tokens: as many rows of dt and twice as many of B and C, columns padded to blocks."""

    BLOCK_T: int
    BLOCK_R: int
    BLOCK_N: int
    num_warps: int


@functools.cache
def launch_plan(R: int, N: int, in_slices: bool, dt_dtype: torch.dtype) -> LaunchPlan:
    """The plan for rows of ``R + 2 N`` columns, whole or in slices that are added up first."""
    block_r, block_n = next_power_of_2(R), next_power_of_2(N)
    # Four rows, or more of short ones.
    block_t = max(4, 2048 // next_power_of_2(block_r + 2 * block_n))
    plan = LaunchPlan(block_t, block_r, block_n, min(32, max(4, block_r // 512)))
    # Columns off the whole words are laid out otherwise than row_layouts says: the same plan has the same bits.
    if not in_slices or (R + 2 * N) % 16 or R % 8 or N % 8:
        return plan
    # Slices come with few rows, each of them many loads: as few rows per program as the layout allows.
    layouts = row_layouts(plan, dt_dtype)
    for rows_log2 in range(plan.BLOCK_T.bit_length()):
        for warps_log2 in range(plan.num_warps.bit_length()):
            smaller = LaunchPlan(1 << rows_log2, block_r, block_n, 1 << warps_log2)
            if row_layouts(smaller, dt_dtype) == layouts:
                return smaller
    return plan


def row_layouts(plan: LaunchPlan, dt_dtype: torch.dtype) -> tuple[tuple[int, int], tuple[int, int]]:
    """(adjacent columns of a thread, threads of a row) of dt, and of B and C, as Triton lays them out.

    A thread takes whole words of 16 bytes of what is stored (float32 for B and C), but no more columns than leave
    something to do for every thread.
    """
    threads = 32 * plan.num_warps

    def layout(rows: int, columns: int, itemsize: int) -> tuple[int, int]:
        adjacent = min(max(1, rows * columns // threads), 16 // itemsize)
        return adjacent, min(max(1, columns // adjacent), threads)

    return layout(plan.BLOCK_T, plan.BLOCK_R, dt_dtype.itemsize), layout(2 * plan.BLOCK_T, plan.BLOCK_N, 4)
