"""Triton kernels of ``x @ weight.T`` for few rows of x: the time is that of reading ``weight`` once.

The weight's rows lie along the 16-row side of the tensor core's instruction and the rows of x along its 8-column
side, or the other way round. Tiles of both are in flight to shared memory while earlier ones are multiplied. How the
inner dimension k is cut, and why no bit depends on the cut, is told in ``launch.py``.

On Hopper the kernels start before the previous kernel has ended (``common/dependent_launch.py``).
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
from tp_mamba.kernels.common.device import device_properties
from tp_mamba.kernels.common.dialect import tree_at, tree_of
from tp_mamba.kernels.common.integers import cdiv, next_power_of_2
from tp_mamba.kernels.common.launches import Launch, launcher
from tp_mamba.kernels.common.remember import remembered
from tp_mamba.kernels.linear.launch import LaunchPlan, launch_plan, slice_count, slice_width

_SUM_BLOCK = 128

_COLUMNS_AHEAD = 256
"""Columns of a program's weight rows that are asked for before the previous kernel has ended: for in_proj 64 KB per SM,
0.3 to 0.8 us of an H200's step. With 1024 it is slower than with none."""


@triton.jit
def _fetch_ahead(weight_rows, last_k, COLUMNS: tl.constexpr):
    """Ask for COLUMNS columns of the rows that begin at ``weight_rows`` into the L2, one cache line at a time."""
    LINE: tl.constexpr = 1024 // weight_rows.dtype.scalar.element_ty.primitive_bitwidth
    for i in tl.static_range(COLUMNS // LINE):
        lines = (weight_rows + tl.minimum(i * LINE, last_k)).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _slices_at_once(
    p_weight, p_x, o_mask, m_mask, k_left, zeros,
    SLICE: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """The sum over GROUP slices, a step of each at a time; if the last one is RAGGED, of ``k_left`` columns."""
    sums = ()
    for _ in tl.static_range(GROUP):
        sums += (zeros,)
    for i in range(0, SLICE, BLOCK_K):
        new_sums = ()
        for g in tl.static_range(GROUP):
            at = g * SLICE + i
            new_sums += (_step(p_weight, p_x, o_mask, m_mask, k_left, at, sums[g], RAGGED, False),)
        sums = new_sums
    return tree_of(sums, 0, GROUP)


@triton.jit
def _slices_in_turn(
    p_weight, p_x, o_mask, m_mask, k_left, zeros,
    SLICE: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """The same with x's rows first, one slice after the other.

    ``level[i]`` holds the sum of ``2^i`` slices until as many follow.
    """
    STEPS: tl.constexpr = SLICE // BLOCK_K
    total = zeros
    level0, level1, level2 = zeros, zeros, zeros
    for i in range(GROUP * STEPS):
        total = _step(p_weight, p_x, o_mask, m_mask, k_left, i * BLOCK_K, total, RAGGED, True)
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
    p_weight, p_x, o_mask, m_mask, k_left, at, total, RAGGED: tl.constexpr, X_FIRST: tl.constexpr
):  # fmt: skip
    """``total`` plus the products of the columns that begin ``at`` columns from the tiles."""
    weight_mask = o_mask
    x_mask = m_mask
    if RAGGED:
        k_mask = k_left > at
        weight_mask = weight_mask & k_mask[None, :]
        x_mask = x_mask & k_mask[:, None]
    weight = tl.load(p_weight + at, mask=weight_mask, other=0.0)
    x = tl.load(p_x + at, mask=x_mask, other=0.0)
    return tl.dot(x.trans(), weight.trans(), total) if X_FIRST else tl.dot(weight, x, total)


@triton.jit(do_not_specialize=["M"])
def _product_kernel(
    out_ptr,  # [groups, M, OUT] contiguous, out: float32, or the result itself if there is one group
    x_ptr,  # [M, K], bfloat16 or float16, columns contiguous, in
    weight_ptr,  # [OUT, K], as x, in
    M,
    x_stride_m,
    # A model has one of each: as constants they fold into the loads.
    weight_stride_o: tl.constexpr,
    OUT: tl.constexpr, K: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr,
    IN_TURN: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first_o = tl.program_id(0).to(tl.int64) * BLOCK_OUT
    group = tl.program_id(1).to(tl.int64)
    first_k = group * (GROUP * SLICE)
    o = tl.arange(0, BLOCK_OUT).to(tl.int64)
    m = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    o_mask = (first_o + o < OUT)[:, None]
    m_mask = (m < M)[None, :]

    p_weight = weight_ptr + first_o * weight_stride_o + first_k + o[:, None] * weight_stride_o + k[None, :]
    p_x = x_ptr + first_k + m[None, :] * x_stride_m + k[:, None]
    let_next_start(PDL)
    if PDL and AHEAD > 0:
        rows = weight_ptr + tl.minimum(first_o + o, OUT - 1) * weight_stride_o + first_k
        _fetch_ahead(rows, K - 1 - first_k, AHEAD)
    wait_for_kernel_ahead(PDL)
    zeros = tl.full([BLOCK_M, BLOCK_OUT] if IN_TURN else [BLOCK_OUT, BLOCK_M], 0.0, tl.float32)
    k_left = K - first_k - k
    RAGGED: tl.constexpr = K % (GROUP * SLICE) != 0
    # Triton 3.6 makes code of it that gives wrong numbers (K 1400, on an H100); no other cut that was tried does.
    tl.static_assert(not (IN_TURN and RAGGED and BLOCK_OUT == 64 and BLOCK_K == 64))
    if IN_TURN:
        total = _slices_in_turn(p_weight, p_x, o_mask, m_mask, k_left, zeros, SLICE, GROUP, BLOCK_K, RAGGED)
    else:
        total = _slices_at_once(p_weight, p_x, o_mask, m_mask, k_left, zeros, SLICE, GROUP, BLOCK_K, RAGGED)
    if IN_TURN:
        total = total.trans()
    tl.store(
        out_ptr + (group * M + m[None, :]) * OUT + first_o + o[:, None],
        total.to(out_ptr.dtype.element_ty),
        mask=o_mask & m_mask,
    )


@triton.jit(do_not_specialize=["size"])
def _sum_kernel(
    out_ptr,  # [size] contiguous, any float, out
    sums_ptr,  # [COUNT, size] float32 contiguous, in
    size,
    COUNT: tl.constexpr, SIZE: tl.constexpr,  # SIZE: the power of two from COUNT
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_kernel_ahead(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tree_at(sums_ptr + at, size.to(tl.int64), mask, 0, SIZE, COUNT)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def launch(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, plan: LaunchPlan | None = None) -> None:
    """Write ``x @ weight.T`` to ``out [M, out]``, contiguous; x and weight have contiguous columns.

    Args:
        out, x, weight: as the op's.
        plan: how the work is cut, by default by :func:`launch_plan`. No bit of the result depends on it.
    """
    (M, k), out_size = x.shape, weight.shape[0]
    if M == 0 or out_size == 0:
        return
    groups = _groups(M, out_size, k, x.device, plan)
    if groups == 1:
        launch_product(out, x, weight, plan)
        return
    sums = torch.empty(groups, M, out_size, dtype=torch.float32, device=x.device)
    launch_product(sums, x, weight, plan)
    _launch_sum(out, sums)


@remembered
def _groups(M: int, out_size: int, k: int, device: torch.device, plan: LaunchPlan | None) -> int:
    """Partial sums per result."""
    plan = plan or launch_plan(M, out_size, k, device_properties(device))
    return cdiv(slice_count(out_size, k), plan.group)


@launcher(tensors=3)
def launch_product(
    sums: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, plan: LaunchPlan | None
) -> Launch | None:
    """Write to ``sums [groups, M, out]``, contiguous, the product over each group of ``plan.group`` slices of k.

    If there is one group, ``sums`` may be ``[M, out]`` and in the dtype of the result.
    """
    (M, k), out_size = x.shape, weight.shape[0]
    plan = plan or launch_plan(M, out_size, k, device_properties(x.device))
    width = slice_width(out_size, k)
    # The stride of a single row says nothing: it must not compile a kernel of its own.
    strides = (k if M == 1 else x.stride(0), k if out_size == 1 else weight.stride(0))
    options = {
        "BLOCK_M": plan.BLOCK_M, "BLOCK_OUT": plan.BLOCK_OUT, "BLOCK_K": plan.BLOCK_K, "IN_TURN": plan.in_turn,
        "AHEAD": _COLUMNS_AHEAD if plan.in_turn else 0, "num_warps": plan.num_warps, "num_stages": plan.num_stages,
        **early_start(x.device),
    }  # fmt: skip
    grid = (cdiv(out_size, plan.BLOCK_OUT), cdiv(k, width * plan.group), cdiv(M, plan.BLOCK_M))
    return Launch(_product_kernel, grid, (M, *strides, out_size, k, width, plan.group), options)


@launcher(tensors=2)
def _launch_sum(out: torch.Tensor, sums: torch.Tensor) -> Launch | None:
    """Write the sum of ``sums [groups, M, out]`` over its groups to ``out [M, out]``; both are contiguous."""
    size, groups = out.numel(), sums.shape[0]
    options = {"BLOCK": _SUM_BLOCK, **early_start(out.device)}
    return Launch(_sum_kernel, (cdiv(size, _SUM_BLOCK),), (size, groups, next_power_of_2(groups)), options)
