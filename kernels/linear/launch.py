"""How a product of few rows is cut into programs.

K is cut into slices of a width that :func:`slice_width` fixes. A slice is one chain of sums in ascending k, and the
slices are added in a binary tree whose nodes are aligned: slice ``2 i`` to slice ``2 i + 1``, then pairs likewise. A
program computes ``group`` adjacent slices, a power of two and so a subtree; a second launch adds up the groups. So
the bits of a result do not depend on anything that :func:`skinny_launch` chooses.
"""

from __future__ import annotations

from typing import NamedTuple

from tp_mamba.kernels.common.integers import cdiv, next_power_of_2

MAX_ROWS = 128
"""Up to here a product with a narrow weight is bound by reading it; one with a wide weight up to half of this."""

_MOST_BLOCK_M = 64

_NARROW = 1024
"""Of up to this many weight rows, row tiles alone are too few to read at the rate of the memory."""

_MULTIPROCESSORS = 132
_ENOUGH_PROGRAMS = 120
"""Nine tenths of an H200's multiprocessors."""

_PROGRAMS_AT_ONCE = 2
"""Of a multiprocessor, for weights of more rows than all multiprocessors take in one round."""

_BYTES_IN_FLIGHT = 160 * 1024
"""What a multiprocessor may have on its way: an H200 takes a tenth longer for a wide weight with half of this."""

_SHARED_BYTES = 224 * 1024
"""What it has room for."""

_MULTIPROCESSOR_BYTES = 228 * 1024
"""The same with what the driver takes of it for each program."""

_MOST_BUFFERS = 7
"""Of a program; more have not been measured."""


class SkinnyLaunch(NamedTuple):
    """A program computes ``[BLOCK_M, BLOCK_N]`` results over ``group`` slices of K, ``BLOCK_K`` columns of each a step.

    The slices are taken a step of each at a time, or, ``in_turn``, one after the other: tiles may then be taller, and
    more but smaller steps are on their way.

    In turn, the rows of x lie along the 16-row side of the tensor core's instruction and those of the weight along its
    8-column side, else the other way round: bits are the same. That lets four warps share a tile without Triton taking
    the Hopper instruction of 64 rows, where another number of rows, and so another tile, might be rounded differently.
    Else a program has at most two.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    group: int
    num_warps: int
    num_stages: int
    in_turn: bool = False


def slice_width(N: int, K: int) -> int:
    """Columns of a slice: a multiple of 128 that depends on the shape of the weight ``[N, K]`` alone."""
    return min(256 if N <= _NARROW else 1024, 128 * cdiv(K, 128))


def slice_count(N: int, K: int) -> int:
    """Slices of K, the last of which may be short."""
    return cdiv(K, slice_width(N, K))


def fills_gpu(N: int, times: int) -> bool:
    """Whether tiles of 32 of N weight rows are ``times`` programs a multiprocessor, or nearly so."""
    return _ENOUGH_PROGRAMS * times <= cdiv(N, 32) <= _MULTIPROCESSORS * times


def slices_launch(M: int, N: int, K: int) -> SkinnyLaunch:
    """The cut of a narrow weight ``[N, K]`` whose partial sums the next kernel adds up.

    How many sums there are depends on the weight alone: one a slice, or from 32 slices on one for two of them.
    """
    group, stages = min(2, max(1, slice_count(N, K) // 16)), min(4, slice_width(N, K) // 64) + 1
    if M <= 32:  # twice as many programs, of one warp
        return SkinnyLaunch(_block_m(M), 16, 64, group, num_warps=1, num_stages=stages)
    return SkinnyLaunch(_block_m(M), 32, 64, group, num_warps=2, num_stages=stages)


def skinny_launch(M: int, N: int, K: int) -> SkinnyLaunch:
    """The cut for ``x [M, K]``, M from 1 to 128, and ``weight [N, K]``.

    Of M only the class decides: 1, up to 8, 16, 32 or more. Wide weights take :func:`_tall_tiles` where those fit.
    Else programs take as many slices as leave enough programs: fewer partial sums are written then, and the chains of
    one program hide each other's latency. One a multiprocessor is enough; two for narrow weights, whose reading takes
    no longer than a few loads, so that all of them start at once.
    """
    block_m = _block_m(M)
    narrow = N <= _NARROW
    slices = slice_count(N, K)
    if not narrow and block_m <= 32 and (M > 1 or slices <= 4):
        # (A single row of more slices is 0.4 % of an H100's step faster where no second kernel adds sums.)
        tall = _tall_tiles(max(16, block_m), N, slices)
        if tall is not None:
            return tall
    # Every row tile reads all of x: with more rows of x, taller tiles.
    block_n = 32 if narrow or block_m <= 32 else 64
    tiles = cdiv(N, block_n)
    group = min(8, next_power_of_2(slices), 4096 // (block_m * block_n))  # 64 registers of sums a thread
    while group > 1 and tiles * cdiv(slices, group) < _ENOUGH_PROGRAMS * (2 if narrow else 1):
        group //= 2
    programs = tiles * cdiv(slices, group)
    at_once = min(max(programs, _MULTIPROCESSORS), _PROGRAMS_AT_ONCE * _MULTIPROCESSORS)
    share, room = (size * _MULTIPROCESSORS // at_once for size in (_BYTES_IN_FLIGHT, _SHARED_BYTES))

    def stage_bytes(block_k: int) -> int:
        return 2 * group * (block_m + block_n) * block_k

    buffers = min(share // stage_bytes(64), slice_width(N, K) // 64, _MOST_BUFFERS)
    # Where two long steps put as much on its way as short ones do, they need fewer instructions.
    if not narrow and buffers * stage_bytes(64) <= 2 * stage_bytes(128) <= room:
        return SkinnyLaunch(block_m, block_n, 128, group, num_warps=2, num_stages=3)
    return SkinnyLaunch(block_m, block_n, 64, group, num_warps=2, num_stages=max(2, buffers) + 1)


def _tall_tiles(block_m: int, N: int, slices: int) -> SkinnyLaunch | None:
    """One program a multiprocessor: 64 or 128 weight rows of a few slices, one after another; None where none fits.

    A program has as few buffers as leave no room for a second one: on an H100 a decode step takes 3 to 11 % longer when
    some multiprocessors have two and others none, and no less time with a buffer more.
    """
    for block_n in (64, 128):
        tiles = cdiv(N, block_n)
        groups = _MULTIPROCESSORS // tiles
        if groups == 0 or slices % groups or slices // groups not in (1, 2, 4, 8):
            continue
        if tiles * groups >= _ENOUGH_PROGRAMS:
            stage_bytes = 2 * (block_m + block_n) * 128
            stages = _MULTIPROCESSOR_BYTES // 2 // stage_bytes + 2  # one more than buffers
            return SkinnyLaunch(
                block_m,
                block_n,
                128,
                slices // groups,
                num_warps=4,
                num_stages=stages,
                in_turn=True,
            )
    return None


def _block_m(M: int) -> int:
    return min(_MOST_BLOCK_M, max(8, next_power_of_2(M)))
