"""How the convolution is cut into programs. No bit of a result depends on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tp_mamba.kernels.common.device import DeviceProperties
from tp_mamba.kernels.common.integers import cdiv, next_power_of_2

PER_THREAD = 4
"""Channels per thread: 8 bytes of a 16-bit dtype per load. A single row of 8192 channels is then 16 programs of the
step kernel; twice as many channels per thread would leave half of those SMs idle and save nothing, since memory is what
is waited for."""

_SHORT_RUN, _LONG_RUN = 2, 4
"""Groups of BLOCK_T tokens per body program. Each reads K - 1 inputs before its own, and waits for its first group."""

_FEW_PROGRAMS = 2048
"""Programs of some four waves. With fewer, runs are long; with more, others compute while one waits, and short runs are
up to 2 % faster."""


@dataclass(frozen=True)
class LaunchPlan:
    """A program takes ``BLOCK_D`` channels of ``BLOCK_B`` rows, or of a run of tokens in groups of ``BLOCK_T``."""

    BLOCK_B: int
    """Rows of the batch per program of the step kernel; 1 of the other, whose programs take one sequence each."""
    BLOCK_T: int
    """Tokens per group."""
    BLOCK_D: int
    run_tokens: int
    """Tokens per body program, a multiple of BLOCK_T."""
    num_warps: int = 4


STEP = LaunchPlan(BLOCK_B=1, BLOCK_T=1, BLOCK_D=4 * 32 * PER_THREAD, run_tokens=0)
"""The plan for one token per row, in a mixer's layout.

Weights and bias come from the L2 for every program, 10 bytes per channel where a row's inputs are 8; even so an H200
takes 2 to 5 % longer with two rows per program, and more with four."""


@functools.lru_cache(maxsize=4096)
def sequences_plan(tokens: int, channels: int, has_bodies: bool, by_rows: bool) -> LaunchPlan:
    """The plan for sequences of ``tokens`` in all.

    Args:
        tokens: of all sequences.
        channels: D.
        has_bodies: whether a sequence may have more than its first K - 1 tokens. If not, a launch waits for memory,
            not for bandwidth, and wants more programs.
        by_rows: channels are contiguous: a thread then walks along the tokens of its channels. Otherwise neighbouring
            threads take neighbouring tokens.
    """
    # 512 channels are 8 bytes of bfloat16 per thread.
    block_t, block_d = (64, 32) if not by_rows else (8, 512) if has_bodies else (8, 128)
    block_d = min(block_d, next_power_of_2(channels))
    run = tokens_per_run(tokens, cdiv(channels, block_d), block_t, by_rows)
    return LaunchPlan(BLOCK_B=1, BLOCK_T=block_t, BLOCK_D=block_d, run_tokens=run)


def tokens_per_run(tokens: int, blocks_d: int, block_t: int, by_rows: bool) -> int:
    """How many of ``tokens`` a body program takes, for ``blocks_d`` blocks of channels."""
    if not by_rows:
        return block_t
    longest = block_t * _LONG_RUN
    few = cdiv(tokens, longest) * blocks_d <= _FEW_PROGRAMS
    return longest if few else block_t * _SHORT_RUN


@functools.lru_cache(maxsize=4096)
def backward_plan(
    batch: int, channels: int, length: int, states: bool, device: DeviceProperties
) -> LaunchPlan:
    """The plan of the backward in a mixer's layout: one wave of programs, runs of at least 64 tokens.

    ``states``: there are initial or final states, which take registers: a thread then has half as many channels. A run
    computes K - 1 tokens of the next one anew and writes K + 1 sums per channel: long runs cost little of either.
    """
    block_d, group = min(256 if states else 512, next_power_of_2(channels)), 8
    resident = 3 * device.sm_count  # programs of 168 registers per thread
    runs = max(1, resident // max(1, batch * cdiv(channels, block_d)))
    run = max(64, group * cdiv(cdiv(length, runs), group))
    return LaunchPlan(BLOCK_B=1, BLOCK_T=group, BLOCK_D=block_d, run_tokens=run)


def backward_tiles(length: int) -> LaunchPlan:
    """The plan of the backward for any layout: of 8 channels, tokens that are neighbours in memory."""
    return LaunchPlan(BLOCK_B=1, BLOCK_T=64, BLOCK_D=8, run_tokens=256 if length > 4096 else 64)
