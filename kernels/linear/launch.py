"""How a product of few rows, ``x [M, k] @ weight [out, k].T``, is cut into programs, and where it is worth a kernel.

k is cut into slices of a width that :func:`slice_width` fixes. A slice is one chain of sums in ascending k, and the
slices are added in a binary tree whose nodes are aligned: slice ``2 i`` to slice ``2 i + 1``, then pairs likewise. A
program computes ``group`` adjacent slices, a power of two and so a subtree; a second launch adds up the groups. So
the bits of a result depend on nothing that a plan chooses.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from tp_mamba.kernels.common.device import INTERPRETED, DeviceProperties
from tp_mamba.kernels.common.dtypes import HALVES
from tp_mamba.kernels.common.integers import cdiv, next_power_of_2

MAX_ROWS = 128
"""Rows up to which a product with a narrow weight is bound by reading it; with a wide weight up to half as many."""

_MOST_BLOCK_M = 64

_NARROW = 1024
"""Weight rows up to which row tiles alone are too few to read at the memory's rate."""

_PROGRAMS_PER_SM = 2
"""Programs resident per SM when one wave does not cover all rows of the weight."""

_BYTES_IN_FLIGHT = 160 * 1024
"""Bytes in flight per SM: an H200 takes a tenth longer for a wide weight with half as many."""

_RESERVED_BYTES = 4 * 1024
"""Shared memory per SM that is left to the driver, which takes 1 KB per program."""

_MOST_BUFFERS = 7
"""Buffers per program; more have not been measured."""

_MOST_ROWS = {(1, 4096): 32, (1, 8192): 32, (2, 4096): 32, (4, 4096): 32}
"""(tiles of 32 weight rows per SM, k) -> rows of x up to which the kernel is faster; others have not been measured."""

_NARROW_PRODUCT = 512
"""Weight rows up to which cuBLAS leaves most of the GPU idle."""

_MOST_SUMS = 32
"""Partial sums that the next kernel adds up by itself."""


@dataclass(frozen=True)
class LaunchPlan:
    """A program computes ``[BLOCK_M, BLOCK_OUT]`` results over ``group`` slices, ``BLOCK_K`` columns of each per step.

    The slices are taken one step of each at a time or, with ``in_turn``, one after the other: tiles may then be
    taller, with more but smaller steps in flight.

    In turn, the rows of x lie along the 16-row side of the tensor core's instruction and those of the weight along its
    8-column side, else the other way round: bits are the same. That lets four warps share a tile without Triton taking
    Hopper's ``wgmma``, whose 64 rows would tie the tile, and with it perhaps the rounding, to the number of rows. Else
    a program has at most two warps.
    """

    BLOCK_M: int
    BLOCK_OUT: int
    BLOCK_K: int
    group: int
    num_warps: int
    num_stages: int
    in_turn: bool = False


def slice_width(out_size: int, k: int) -> int:
    """Columns per slice: a multiple of 128 that depends on the shape of the weight ``[out, k]`` alone."""
    return min(256 if out_size <= _NARROW else 1024, 128 * cdiv(k, 128))


def slice_count(out_size: int, k: int) -> int:
    """Slices of k, the last of which may be short."""
    return cdiv(k, slice_width(out_size, k))


def prefers_skinny(
    M: int, out_size: int, k: int, dtype: torch.dtype, sm_count: int = INTERPRETED.sm_count
) -> bool:
    """Whether the kernel serves ``x [M, k]`` and ``weight [out, k]`` better than cuBLAS on a GPU of ``sm_count`` SMs.

    True where an H200 has shown it (on the projections of falcon-mamba-7b, on one GPU and on one of two):

    - a long k and so few weight rows that cuBLAS leaves most of the GPU idle (x_proj), up to 128 rows with k = 4096 and
      up to 64 with k = 8192;
    - 32 weight rows per SM and k = 4096 or 8192 (out_proj), or 64 or 128 of them and k = 4096 (in_proj of one of two
      GPUs, and of one), up to 32 rows. With more rows, and for more weight rows, cuBLAS is as fast or faster.

    Rows of k that are no multiple of 16 could not be loaded 16 bytes at a time.
    """
    if dtype not in HALVES or not 1 <= M <= MAX_ROWS:
        return False
    if out_size <= _NARROW_PRODUCT:
        return k >= 2048 and k % 16 == 0 and (M <= 64 or k <= 4096)
    tiles = cdiv(out_size, 32)
    return any(
        k == width and most >= M and times * _enough_programs(sm_count) <= tiles <= times * sm_count
        for (times, width), most in _MOST_ROWS.items()
    )


def prefers_slices(
    M: int, out_size: int, k: int, dtype: torch.dtype, sm_count: int = INTERPRETED.sm_count
) -> bool:
    """Whether it pays to leave the sums over slices to the next kernel, where that one can add them."""
    narrow = out_size <= _NARROW_PRODUCT and sums_per_product(out_size, k) <= _MOST_SUMS
    return narrow and prefers_skinny(M, out_size, k, dtype, sm_count)


def sums_per_product(out_size: int, k: int) -> int:
    """Partial sums that :func:`slices_plan` gives: one per slice, from 32 slices on one for two of them."""
    return cdiv(slice_count(out_size, k), _slices_per_sum(out_size, k))


def _slices_per_sum(out_size: int, k: int) -> int:
    return min(2, max(1, slice_count(out_size, k) // 16))


@functools.lru_cache(maxsize=4096)
def slices_plan(M: int, out_size: int, k: int) -> LaunchPlan:
    """The cut of a narrow weight ``[out, k]`` whose partial sums the next kernel adds up.

    How many sums there are depends on the weight alone.
    """
    group, stages = _slices_per_sum(out_size, k), min(4, slice_width(out_size, k) // 64) + 1
    if M <= 32:  # twice as many programs, of one warp
        return LaunchPlan(_block_m(M), 16, 64, group, num_warps=1, num_stages=stages)
    return LaunchPlan(_block_m(M), 32, 64, group, num_warps=2, num_stages=stages)


@functools.lru_cache(maxsize=4096)
def launch_plan(M: int, out_size: int, k: int, device: DeviceProperties) -> LaunchPlan:
    """The cut for ``x [M, k]``, M from 1 to 128, and ``weight [out, k]``.

    M decides only by its class: 1, up to 8, 16, 32 or more. Wide weights take :func:`_tall_tiles` where those fit.
    Else programs take as many slices as leave enough programs: fewer partial sums are written then, and the chains of
    one program hide each other's latency. One program per SM is enough; two for narrow weights, whose reading takes no
    longer than a few loads, so that all of them start at once.
    """
    block_m = _block_m(M)
    narrow = out_size <= _NARROW
    slices = slice_count(out_size, k)
    if not narrow and block_m <= 32 and (M > 1 or slices <= 4):
        # (A single row of more slices is 0.4 % of an H100's step faster where no second kernel adds sums.)
        tall = _tall_tiles(max(16, block_m), out_size, slices, device)
        if tall is not None:
            return tall
    # Every row tile reads all of x: with more rows of x, taller tiles.
    block_out = 32 if narrow or block_m <= 32 else 64
    tiles = cdiv(out_size, block_out)
    group = min(8, next_power_of_2(slices), 4096 // (block_m * block_out))  # 64 registers of sums per thread
    while group > 1 and tiles * cdiv(slices, group) < _enough_programs(device.sm_count) * (
        2 if narrow else 1
    ):
        group //= 2
    programs, sms = tiles * cdiv(slices, group), device.sm_count
    resident = min(max(programs, sms), _PROGRAMS_PER_SM * sms)
    room_per_sm = device.shared_bytes_per_sm - _RESERVED_BYTES
    share, room = (size * sms // resident for size in (_BYTES_IN_FLIGHT, room_per_sm))

    def stage_bytes(block_k: int) -> int:
        return 2 * group * (block_m + block_out) * block_k

    buffers = min(share // stage_bytes(64), slice_width(out_size, k) // 64, _MOST_BUFFERS)
    # Where two long steps put as much in flight as short ones do, they need fewer instructions.
    if not narrow and buffers * stage_bytes(64) <= 2 * stage_bytes(128) <= room:
        return LaunchPlan(block_m, block_out, 128, group, num_warps=2, num_stages=3)
    return LaunchPlan(block_m, block_out, 64, group, num_warps=2, num_stages=max(2, buffers) + 1)


def _tall_tiles(block_m: int, out_size: int, slices: int, device: DeviceProperties) -> LaunchPlan | None:
    """One program per SM: 64 or 128 weight rows of a few slices, one after another; None where none fits.

    A program has as few buffers as leave no room for a second one: on an H100 a decode step takes 3 to 11 % longer when
    some SMs have two and others none, and no less time with a buffer more.
    """
    for block_out in (64, 128):
        tiles = cdiv(out_size, block_out)
        groups = device.sm_count // tiles
        if groups == 0 or slices % groups or slices // groups not in (1, 2, 4, 8):
            continue
        if tiles * groups >= _enough_programs(device.sm_count):
            stage_bytes = 2 * (block_m + block_out) * 128
            stages = device.shared_bytes_per_sm // 2 // stage_bytes + 2  # one more than buffers
            return LaunchPlan(block_m, block_out, 128, slices // groups, 4, stages, in_turn=True)
    return None


def _enough_programs(sm_count: int) -> int:
    """Ten elevenths of the SMs: so many programs read at the memory's rate."""
    return sm_count * 10 // 11


def _block_m(M: int) -> int:
    return min(_MOST_BLOCK_M, max(8, next_power_of_2(M)))
