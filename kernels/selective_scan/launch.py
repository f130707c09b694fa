"""How the scan is cut into programs: a function of shapes and of the device. Results do not depend on it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from tp_mamba.kernels.common.device import DeviceProperties
from tp_mamba.kernels.common.integers import cdiv, next_power_of_2
from tp_mamba.kernels.common.state_tile import BLOCK_D, state_tile

STATE_SIZES = (4, 8, 16, 32)
"""What the kernel for a mixer takes: whole loads of four states, and at most 16 states per thread."""

STEPS = 4
"""Tokens of the kernel for any layout whose loads are in flight while the four before them are computed."""

_BY_WARPS = ((4, 16, 1), (8, 16, 3), (16, 4, None))
"""Cuts of the kernel for a mixer: states per lane, tokens per group, and the most warps per scheduler."""

_BY_WARPS_OF_32_STATES = ((8, 4, None),)


@dataclass(frozen=True)
class LaunchPlan:
    """One launch of either kernel."""

    grid: tuple[int, int]
    """Sequences, blocks of channels."""
    block_n: int
    """States of a program's tile, a power of two; for a mixer N itself."""
    block_d: int
    """Channels per program."""
    steps: int
    """Tokens whose loads are in flight together."""
    lanes: int
    """Threads that share a channel's states, in the kernel for a mixer; there are no such lanes in the other: 1."""
    num_warps: int


@functools.lru_cache(maxsize=1024)
def mixer_plan(
    sequences: int, channels: int, n: int, softplus: bool, save_every: int | None, device: DeviceProperties
) -> LaunchPlan:
    """The plan of the kernel for a mixer's layout, which is one warp per program.

    More lanes per channel are more warps, which hide each other's waits, and more instructions: so as many lanes as
    keep the warps of a scheduler few. The numbers are an H200's best for 16 states. With softplus inside, eight states
    per lane leave no registers for 16 tokens.
    """
    schedulers = device.schedulers_per_sm * device.sm_count
    lanes, steps, block_d = 1, 1, 32
    for states, tokens, most in _BY_WARPS if n <= 16 else _BY_WARPS_OF_32_STATES:
        if states > n:
            break
        lanes = n // states
        block_d = 32 // lanes
        steps = min(8, tokens) if softplus and states > 4 else tokens
        if most is None or sequences * cdiv(channels, block_d) <= most * schedulers:
            break
    return plan_of(sequences, channels, n, lanes, steps, save_every)


def plan_of(
    sequences: int, channels: int, n: int, lanes: int, steps: int, save_every: int | None = None
) -> LaunchPlan:
    """The plan of the kernel for a mixer's layout with a given cut."""
    if save_every is not None:  # the kernel looks for a state that is due once per group
        steps = math.gcd(steps, save_every)
    block_d = 32 // lanes
    return LaunchPlan((sequences, cdiv(channels, block_d)), n, block_d, steps, lanes, 1)


@functools.lru_cache(maxsize=1024)
def any_plan(sequences: int, channels: int, n: int) -> LaunchPlan:
    """The plan of the kernel for any layout."""
    block_n, num_warps = state_tile(n)
    return LaunchPlan((sequences, cdiv(channels, BLOCK_D)), block_n, BLOCK_D, STEPS, 1, num_warps)


SEGMENT = 512
"""Tokens of the parts that the backward cuts sequences into. A constant: how sums over tokens are rounded follows from
it, and should not follow from what else is in a batch."""


@dataclass(frozen=True)
class BackwardPlan:
    """One launch of the backward for a mixer's layout."""

    segments: int
    """Rows of the grid: as many segments as there can be."""
    blocks: int
    """Blocks of channels."""
    block_d: int
    """Channels per program."""
    lanes: int
    """Threads that share a channel's states."""
    steps: int
    """Tokens whose states are in registers together."""
    groups: int
    """Groups of so many from one saved state to the next."""
    part: int
    """Tokens whose products are summed over channels together."""
    stages: int
    """Groups of tokens in flight, and that which is computed."""
    segment: int
    """Tokens, a multiple of those from one saved state to the next."""
    num_warps: int
    registers: int
    """The most that a thread may have, so that several programs fit a multiprocessor."""


@functools.lru_cache(maxsize=1024)
def backward_plan(
    length: int, sequences: int, channels: int, n: int, save_every: int, packed: bool
) -> BackwardPlan:
    """The plan of the backward for a mixer's layout."""
    return backward_plan_of(length, sequences, channels, n, save_every, packed)


def backward_plan_of(
    length: int,
    sequences: int,
    channels: int,
    n: int,
    save_every: int,
    packed: bool,
    lanes: int | None = None,
    block_d: int = 32,
    steps: int = 8,
    part: int = 4,
    stages: int = 3,
    segment: int = SEGMENT,
    registers: int = 255,
) -> BackwardPlan:
    """The plan of the backward for a mixer's layout with a given cut."""
    lanes, steps = lanes or n // 4, math.gcd(steps, save_every)
    segment = cdiv(segment, save_every) * save_every
    return BackwardPlan(
        segment_rows(length, sequences, segment, packed), cdiv(channels, block_d), block_d, lanes, steps,
        save_every // steps, math.gcd(part, steps), stages, segment, max(1, lanes * block_d // 32),
        registers,
    )  # fmt: skip


def segment_rows(length: int, sequences: int, every: int, packed: bool) -> int:
    """How many segments of ``every`` tokens there can be in sequences that are ``length`` long, packed in all."""
    return length // every + sequences if packed else sequences * cdiv(length, every)


@dataclass(frozen=True)
class AnyBackwardPlan:
    """One launch of the backward for any layout."""

    grid: tuple[int, int]
    """Sequences, blocks of channels."""
    blocks: int
    """Blocks of channels per group."""
    block_n: int
    block_d: int
    steps: int
    """Tokens whose states are in memory together."""
    groups: int
    """Groups of so many from one saved state to the next."""
    num_warps: int


@functools.lru_cache(maxsize=1024)
def any_backward_plan(
    sequences: int, channels: int, n: int, groups_of_channels: int, save_every: int
) -> AnyBackwardPlan:
    """The plan of the backward for any layout. A block of channels lies within one group."""
    group_size = channels // groups_of_channels
    block_n, num_warps = state_tile(n)
    block_d = min(BLOCK_D, next_power_of_2(group_size))
    blocks, steps = cdiv(group_size, block_d), math.gcd(8, save_every)
    return AnyBackwardPlan(
        (sequences, groups_of_channels * blocks), blocks, block_n, block_d, steps, save_every // steps,
        max(1, num_warps * block_d // BLOCK_D),
    )  # fmt: skip
