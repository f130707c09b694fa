"""Triton kernels of ``x @ weight.T`` for few rows of x: the time is that of reading ``weight`` once.

The weight's rows lie along the 16-row side of the tensor core's instruction and the rows of x along its 8-column
side, or the other way round. Tiles of both are on their way to shared memory while earlier ones are multiplied. How K
is cut, and why no bit depends on the cut, is told in ``skinny_linear_launch``.

On Hopper the kernels start before the kernel ahead of them has ended (``dependent_launch_triton``).
"""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.dependent_launch import (
    early_start,
    let_next_start,
    wait_for_kernel_ahead,
)
from tp_mamba.kernels.common.dialect import tree_at, tree_of
from tp_mamba.kernels.common.integers import cdiv, next_power_of_2
from tp_mamba.kernels.linear.launch import SkinnyLaunch, skinny_launch, slice_count, slice_width

_SUM_BLOCK = 128

_COLUMNS_AHEAD = 256
"""Of a program's weight rows, asked for before the kernel ahead has ended: for what a multiprocessor holds of in_proj
64 KB, 0.3 to 0.8 us of an H200's step. With 1024 it is slower than with none."""


@triton.jit
def _fetch_ahead(weight_rows, last_k, COLUMNS: tl.constexpr):
    """Ask for the first columns of the weight's rows at ``weight_rows`` into the L2, a line of memory each time."""
    LINE: tl.constexpr = 1024 // weight_rows.dtype.scalar.element_ty.primitive_bitwidth
    for i in tl.static_range(COLUMNS // LINE):
        lines = (weight_rows + tl.minimum(i * LINE, last_k)).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _slices_at_once(
    weight_tile, x_tile, n_mask, m_mask, k_left, zeros,
    SLICE: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """The sum over GROUP slices, a step of each at a time; of ``k_left`` columns where the last slice is RAGGED."""
    sums = ()
    for _ in tl.static_range(GROUP):
        sums += (zeros,)
    for i in range(0, SLICE, BLOCK_K):
        new_sums = ()
        for g in tl.static_range(GROUP):
            at = g * SLICE + i
            new_sums += (_step(weight_tile, x_tile, n_mask, m_mask, k_left, at, sums[g], RAGGED, False),)
        sums = new_sums
    return tree_of(sums, 0, GROUP)


@triton.jit
def _slices_in_turn(
    weight_tile, x_tile, n_mask, m_mask, k_left, zeros,
    SLICE: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """The same with x's rows first, one slice after the other.

    ``level[i]`` holds the sum of ``2^i`` slices until as many follow.
    """
    STEPS: tl.constexpr = SLICE // BLOCK_K
    total = zeros
    level0, level1, level2 = zeros, zeros, zeros
    for i in range(GROUP * STEPS):
        total = _step(weight_tile, x_tile, n_mask, m_mask, k_left, i * BLOCK_K, total, RAGGED, True)
        # The last slice is added behind the loop.
        g = i // STEPS
        ended = (i % STEPS == STEPS - 1) & (g < GROUP - 1)
        if GROUP > 4:
            level2 = tl.where(ended & (g == 3), level1 + (level0 + total), level2)
        if GROUP > 2:
            level1 = tl.where(ended & (g % 4 == 1), level0 + total, level1)
        if GROUP > 1:
            level0 = tl.where(ended & (g % 2 == 0), total, level0)
            total = tl.where(ended, 0.0, total)
    if GROUP > 1:
        total = level0 + total
    if GROUP > 2:
        total = level1 + total
    if GROUP > 4:
        total = level2 + total
    return total


@triton.jit
def _step(
    weight_tile, x_tile, n_mask, m_mask, k_left, at, total, RAGGED: tl.constexpr, X_FIRST: tl.constexpr
):  # fmt: skip
    """``total`` and the products of the columns that lie ``at`` columns from the tiles."""
    weight_mask = n_mask
    x_mask = m_mask
    if RAGGED:
        k_mask = k_left > at
        weight_mask = weight_mask & k_mask[None, :]
        x_mask = x_mask & k_mask[:, None]
    weight = tl.load(weight_tile + at, mask=weight_mask, other=0.0)
    x = tl.load(x_tile + at, mask=x_mask, other=0.0)
    return tl.dot(x.trans(), weight.trans(), total) if X_FIRST else tl.dot(weight, x, total)


@triton.jit(do_not_specialize=["M"])
def _product_kernel(
    out_ptr,  # [groups, M, N] contiguous, written: float32, or the result itself if there is one group
    x_ptr,  # [M, K], bfloat16 or float16, columns contiguous
    weight_ptr,  # [N, K], as x
    M,
    x_stride_m,
    # A model has one of each: as constants they fold into the loads.
    weight_stride_n: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    IN_TURN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    first_n = tl.program_id(0).to(tl.int64) * BLOCK_N
    group = tl.program_id(1).to(tl.int64)
    first_k = group * (GROUP * SLICE)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    m = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    n_mask = (first_n + n < N)[:, None]
    m_mask = (m < M)[None, :]

    weight_tile = weight_ptr + first_n * weight_stride_n + first_k + n[:, None] * weight_stride_n + k[None, :]
    x_tile = x_ptr + first_k + m[None, :] * x_stride_m + k[:, None]
    let_next_start(PDL)
    if PDL and AHEAD > 0:
        rows = weight_ptr + tl.minimum(first_n + n, N - 1) * weight_stride_n + first_k
        _fetch_ahead(rows, K - 1 - first_k, AHEAD)
    wait_for_kernel_ahead(PDL)
    zeros = tl.full([BLOCK_M, BLOCK_N] if IN_TURN else [BLOCK_N, BLOCK_M], 0.0, tl.float32)
    k_left = K - first_k - k
    RAGGED: tl.constexpr = K % (GROUP * SLICE) != 0
    # Triton 3.6 makes code of it that gives wrong numbers (K 1400, on an H100); no other cut that was tried does.
    tl.static_assert(not (IN_TURN and RAGGED and BLOCK_N == 64 and BLOCK_K == 64))
    if IN_TURN:
        total = _slices_in_turn(
            weight_tile, x_tile, n_mask, m_mask, k_left, zeros, SLICE, GROUP, BLOCK_K, RAGGED
        )
    else:
        total = _slices_at_once(
            weight_tile, x_tile, n_mask, m_mask, k_left, zeros, SLICE, GROUP, BLOCK_K, RAGGED
        )
    if IN_TURN:
        total = total.trans()
    tl.store(
        out_ptr + (group * M + m[None, :]) * N + first_n + n[:, None],
        total.to(out_ptr.dtype.element_ty),
        mask=n_mask & m_mask,
    )


@triton.jit(do_not_specialize=["size"])
def _sum_kernel(
    out_ptr,  # [size] contiguous, any float, written
    sums_ptr,  # [COUNT, size] float32 contiguous
    size,
    COUNT: tl.constexpr, SIZE: tl.constexpr,  # SIZE: the power of two from COUNT
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_kernel_ahead(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tree_at(sums_ptr + at, size.to(tl.int64), mask, 0, SIZE, COUNT)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def launch(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    cut: SkinnyLaunch | None = None,
) -> None:
    """Write ``x @ weight.T`` to ``out [M, N]``, contiguous; x and weight have contiguous columns.

    Args:
        out, x, weight: as the op's.
        cut: how the work is cut, by default as :func:`skinny_launch` says. No bit of the result depends on it.
    """
    (M, K), N = x.shape, weight.shape[0]
    if out.numel() == 0:
        return
    cut = skinny_launch(M, N, K) if cut is None else cut
    groups = cdiv(slice_count(N, K), cut.group)
    if groups == 1:
        launch_product(out[None], x, weight, cut)
        return
    sums = x.new_empty(groups, M, N, dtype=torch.float32)
    launch_product(sums, x, weight, cut)
    with torch.cuda.device_of(x):
        _sum_kernel[(cdiv(M * N, _SUM_BLOCK),)](
            out,
            sums,
            M * N,
            groups,
            next_power_of_2(groups),
            BLOCK=_SUM_BLOCK,
            **early_start(x.device),
        )


def launch_product(sums: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, cut: SkinnyLaunch) -> None:
    """Write to ``sums [groups, M, N]``, contiguous, the product over each group of ``cut.group`` slices of K."""
    groups, M, N = sums.shape
    K, width = x.shape[1], slice_width(N, x.shape[1])
    with torch.cuda.device_of(x):
        _product_kernel[(cdiv(N, cut.BLOCK_N), groups, cdiv(M, cut.BLOCK_M))](
            sums, x, weight, M,
            # The stride of a single row says nothing: it must not compile a kernel of its own.
            K if M == 1 else x.stride(0), K if N == 1 else weight.stride(0), N, K, width, cut.group,
            BLOCK_M=cut.BLOCK_M, BLOCK_N=cut.BLOCK_N, BLOCK_K=cut.BLOCK_K,
            IN_TURN=cut.in_turn, AHEAD=_COLUMNS_AHEAD if cut.in_turn else 0,
            num_warps=cut.num_warps, num_stages=cut.num_stages, **early_start(x.device),
        )  # fmt: skip
