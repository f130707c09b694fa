"""How ``softplus(x @ weight.T + bias)`` is cut into programs.

What decides is the class of a call: up to 64 tokens it is bound by reading ``weight``, and small tiles let every SM
read; up to 2^21 outputs a program that keeps its rows of ``weight`` would see too few tiles for them to pay; beyond,
it does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from tp_mamba.kernels.common.device import DeviceProperties
from tp_mamba.kernels.common.integers import cdiv, next_power_of_2

FEW_TOKENS = 64
"""Tokens up to which a tile's rows are fewer than the 64 of Hopper's ``wgmma``."""

FEW_OUTPUTS = 1 << 21
"""Outputs up to which programs do not keep their rows of ``weight``."""


@dataclass(frozen=True)
class LaunchPlan:
    """A program computes ``tiles`` tiles ``[BLOCK_T, BLOCK_D]``, ``BLOCK_R`` products at a time.

    ``tiles`` is an argument at run time; all else is compiled in.
    """

    streaming: bool
    """Whether a program keeps its rows of ``weight`` in shared memory while tiles of x pass."""
    BLOCK_T: int
    BLOCK_D: int
    BLOCK_R: int
    num_warps: int
    tiles: int = 1


@functools.lru_cache(maxsize=4096)
def launch_plan(T: int, D: int, R: int, dtype: torch.dtype, device: DeviceProperties) -> LaunchPlan:
    """The plan for ``T`` tokens, ``D`` channels and rank ``R``. Within a class, ``T`` decides ``tiles`` alone."""
    whole = max(16, next_power_of_2(R))
    if dtype == torch.float32:  # no tensor core without TF32
        return LaunchPlan(False, 16, 32, 32, 4) if T <= FEW_TOKENS else LaunchPlan(False, 64, 64, 32, 4)
    if T <= FEW_TOKENS:
        return LaunchPlan(False, 16 if T <= 16 else 32, 32 if D >= 4096 else 16, min(whole, 512), 4)
    if whole > 256:  # the rows of weight leave no room for a second program
        return LaunchPlan(False, 128, 128, 64, 8)
    if T * D <= FEW_OUTPUTS:
        return LaunchPlan(False, 64, 32, whole, 4)
    block_t, block_d = 64, 128  # T > 64: there is at least one whole tile
    tiles, columns = cdiv(T, block_t), cdiv(D, block_d)
    runs = max(1, 2 * device.sm_count // columns)  # two programs per SM, all in one wave
    return LaunchPlan(True, block_t, block_d, whole, 4, cdiv(tiles, runs))


@functools.lru_cache(maxsize=4096)
def backward_plan(R: int, dtype: torch.dtype) -> LaunchPlan:
    """The plan of the backward's tiles, of which each program takes one."""
    if dtype == torch.float32:  # no tensor core without TF32
        return LaunchPlan(False, 64, 64, 32, 4)
    block_r = min(64, max(16, next_power_of_2(R)))
    return LaunchPlan(False, 64, 128, block_r, 4)  # small enough for three programs per SM
