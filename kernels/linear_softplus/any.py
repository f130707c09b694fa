"""Triton kernels of ``softplus(x @ weight.T + bias)``, for any strides.

A time step rank of at most 256 makes a short product: per output there are as many cycles of softplus as of tensor
core. So the kernel for many tokens keeps 128 rows of ``weight`` in shared memory, streams tiles of ``x`` past them
with the next tile in flight, and leaves room for a second program on the SM: one multiplies while the other takes the
softplus. Few tokens, float32 and larger ranks run a plain tiled product.
"""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.approximations import softplus_of_sum
from tp_mamba.kernels.common.dependent_launch import (
    early_start,
    let_next_start,
    wait_for_kernel_ahead,
)
from tp_mamba.kernels.common.device import device_properties
from tp_mamba.kernels.common.integers import cdiv
from tp_mamba.kernels.common.launches import Launch, launcher
from tp_mamba.kernels.linear_softplus.launch import launch_plan


@triton.jit(do_not_specialize=["T", "tiles"])
def _streaming_kernel(
    out_ptr,  # [T, D] contiguous, out
    x_ptr,  # [T, R], bfloat16 or float16, in
    weight_ptr,  # [D, R], as x, in
    bias_ptr,  # [D] contiguous, any float, in; or None
    T,  # at least BLOCK_T
    tiles,
    # A model has one of each: as constants they fold into the loads and stores.
    x_stride_t: tl.constexpr, x_stride_r: tl.constexpr,
    weight_stride_d: tl.constexpr, weight_stride_r: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_kernel_ahead(PDL)
    first_t = tl.program_id(0).to(tl.int64) * tiles * BLOCK_T
    first_d = tl.program_id(1).to(tl.int64) * BLOCK_D
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    d_mask = first_d + d < D
    r_mask = r < R

    weight = tl.load(
        weight_ptr + first_d * weight_stride_d + d[:, None] * weight_stride_d + r[None, :] * weight_stride_r,
        mask=d_mask[:, None] & r_mask[None, :],
        other=0.0,
    ).trans()
    bias = tl.full([BLOCK_D], 0.0, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + first_d + d, mask=d_mask, other=0.0).to(tl.float32)

    # The last tile is moved up to end at T: the rows that it shares are written twice, with the same bits, and no
    # row needs a mask.
    last_t = (T - BLOCK_T).to(tl.int64)
    p_x = x_ptr + t[:, None] * x_stride_t + r[None, :] * x_stride_r
    p_out = out_ptr + first_d + t[:, None] * D + d[None, :]
    x = tl.load(p_x + tl.minimum(first_t, last_t) * x_stride_t, mask=r_mask[None, :], other=0.0)
    for i in tl.range(
        0, tl.minimum(tiles, (T - first_t + BLOCK_T - 1) // BLOCK_T).to(tl.int32), num_stages=1
    ):
        this_t = tl.minimum(first_t + i * BLOCK_T, last_t)
        # Into registers: a second tile of x in shared memory would leave no room for a second program.
        next_x = tl.load(
            p_x + tl.minimum(this_t + BLOCK_T, last_t) * x_stride_t, mask=r_mask[None, :], other=0.0
        )
        out = softplus_of_sum(tl.dot(x, weight), bias).to(out_ptr.dtype.element_ty)
        if D % BLOCK_D == 0:
            tl.store(p_out + this_t * D, out)
        else:
            tl.store(p_out + this_t * D, out, mask=d_mask[None, :])
        x = next_x


@triton.jit(do_not_specialize=["T"])
def _tiled_kernel(
    out_ptr,  # [T, D] contiguous, out
    x_ptr,  # [T, R], any float, in
    weight_ptr,  # [D, R], as x, in
    bias_ptr,  # [D] contiguous, any float, in; or None
    T,
    x_stride_t: tl.constexpr, x_stride_r: tl.constexpr,
    weight_stride_d: tl.constexpr, weight_stride_r: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first_t = tl.program_id(0).to(tl.int64) * BLOCK_T
    first_d = tl.program_id(1).to(tl.int64) * BLOCK_D
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    t_mask = first_t + t < T
    d_mask = first_d + d < D

    x_ptr += first_t * x_stride_t
    weight_ptr += first_d * weight_stride_d
    let_next_start(PDL)
    bias = tl.full([BLOCK_D], 0.0, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + first_d + d, mask=d_mask, other=0.0).to(tl.float32)
    p_x = x_ptr + t[:, None] * x_stride_t + r[None, :] * x_stride_r
    p_weight = weight_ptr + d[:, None] * weight_stride_d + r[None, :] * weight_stride_r
    total = tl.full([BLOCK_T, BLOCK_D], 0.0, tl.float32)
    if R <= BLOCK_R:
        r_mask = (r < R)[None, :]
        weight = tl.load(p_weight, mask=d_mask[:, None] & r_mask, other=0.0)
        wait_for_kernel_ahead(PDL)
        x = tl.load(p_x, mask=t_mask[:, None] & r_mask, other=0.0)
        total = tl.dot(x, weight.trans(), total, input_precision="ieee")
    else:
        wait_for_kernel_ahead(PDL)
        for k in range(0, R, BLOCK_R):
            r_mask = (k + r < R)[None, :]
            x = tl.load(p_x + k * x_stride_r, mask=t_mask[:, None] & r_mask, other=0.0)
            weight = tl.load(p_weight + k * weight_stride_r, mask=d_mask[:, None] & r_mask, other=0.0)
            total = tl.dot(x, weight.trans(), total, input_precision="ieee")
    out = softplus_of_sum(total, bias).to(out_ptr.dtype.element_ty)
    tl.store(
        out_ptr + first_t * D + first_d + t[:, None] * D + d[None, :],
        out,
        mask=t_mask[:, None] & d_mask[None, :],
    )


@launcher(tensors=4)
def launch(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Launch | None:
    """Write ``softplus(x @ weight.T + bias)`` to ``out [T, D]``, contiguous; arguments as the op's."""
    (T, R), D = x.shape, weight.shape[0]
    if T == 0 or D == 0:
        return None
    plan = launch_plan(T, D, R, x.dtype, device_properties(x.device))
    # The stride of a single row says nothing: it must not compile a kernel of its own.
    x_stride_t, x_stride_r = x.stride()
    sizes = (R if T == 1 else x_stride_t, x_stride_r, *weight.stride(), D, R)
    options = {
        "BLOCK_T": plan.BLOCK_T, "BLOCK_D": plan.BLOCK_D, "BLOCK_R": plan.BLOCK_R, "num_warps": plan.num_warps,
        **early_start(x.device),
    }  # fmt: skip
    grid = (cdiv(T, plan.BLOCK_T * plan.tiles), cdiv(D, plan.BLOCK_D))
    if plan.streaming:
        return Launch(_streaming_kernel, grid, (T, plan.tiles, *sizes), options)
    return Launch(_tiled_kernel, grid, (T, *sizes), options)
