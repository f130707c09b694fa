"""Triton kernel of an all-reduce that goes on with residual add and RMSNorm.

Bits: the sum of :mod:`tp_mamba.kernels.all_reduce.any`, and behind it those of ``rms_norm.add_rms_norm``: a row lies on
threads as it does there, which is what the order of its squares' sum depends on.
"""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.all_reduce import mail
from tp_mamba.kernels.all_reduce.launch import room
from tp_mamba.kernels.all_reduce.layout import cells
from tp_mamba.kernels.all_reduce.mail import addresses, cells_of, fence, put_marks, send, sum_of_ranks
from tp_mamba.kernels.common.dependent_launch import early_start, let_next_start, wait_for_kernel_ahead
from tp_mamba.kernels.common.device import on_device_of
from tp_mamba.kernels.common.integers import cdiv
from tp_mamba.kernels.rms_norm.launch import launch_plan


@triton.jit
def _send_rows(
    x_ptr, first_t, h, T, H, peers, part,
    RANK: tl.constexpr, SIZE: tl.constexpr, CELLS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    i_t = tl.arange(0, BLOCK_T)[:, None]
    t = first_t + i_t
    mask = (t < T) & (h < H)
    x = tl.load(x_ptr + t * H + h, mask=mask, other=0.0)
    send(x, i_t * BLOCK_H + h, mask, peers, part, RANK, RANK, SIZE, CELLS, False)


@triton.jit(do_not_specialize=["T"])
def _all_reduce_add_rms_norm_kernel(
    out_ptr,  # [T, H] contiguous, any float, out; its dtype is that of the finished sum
    new_residual_ptr,  # [T, H] contiguous, any float, out
    x_ptr,  # [T, H] contiguous, 16 or 32 bits, in
    residual_ptr,  # [T, H], any float, in; or None
    weight_ptr,  # [H], any float, in; or None
    bias_ptr,  # [H], any float, in; or None
    rounds_ptr,  # [PROGRAMS] int32, in and out
    peers_ptr,  # [SIZE] int64, in
    T,
    H,
    eps,
    residual_stride_t: tl.int64, residual_stride_h,
    weight_stride_h,
    bias_stride_h,
    RANK: tl.constexpr, SIZE: tl.constexpr, CELLS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * BLOCK_T
    first_t = i_p * BLOCK_T
    i_t = tl.arange(0, BLOCK_T)[:, None]
    h = tl.arange(0, BLOCK_H)[None, :].to(tl.int64)
    offset = i_t * BLOCK_H + h
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    peers = addresses(peers_ptr, SIZE)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + h * weight_stride_h, mask=h < H, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + h * bias_stride_h, mask=h < H, other=0.0).to(tl.float32)
    wait_for_kernel_ahead(PDL)

    part = tl.load(rounds_ptr + i_p)
    _send_rows(x_ptr, first_t, h, T, H, peers, part, RANK, SIZE, CELLS, BLOCK_T, BLOCK_H)
    if first_t + step < T:
        _send_rows(x_ptr, first_t + step, h, T, H, peers, part + 1, RANK, SIZE, CELLS, BLOCK_T, BLOCK_H)
    while first_t < T:
        t = first_t + i_t
        mask = (t < T) & (h < H)
        own = tl.load(x_ptr + t * H + h, mask=mask, other=0.0)
        if residual_ptr is not None:
            p_residual = residual_ptr + t * residual_stride_t + h * residual_stride_h
            residual = tl.load(p_residual, mask=mask, other=0.0).to(tl.float32)
        cells = cells_of(peers[RANK], part, CELLS)
        total = sum_of_ranks(own, cells, offset, mask, DTYPE, RANK, SIZE)
        put_marks(cells, offset, mask, DTYPE, RANK, SIZE)
        if first_t + 2 * step < T:
            fence(part)
            _send_rows(
                x_ptr, first_t + 2 * step, h, T, H, peers, part + 2, RANK, SIZE, CELLS, BLOCK_T, BLOCK_H
            )
        # The sum is rounded as that of a single rank is by its product, before and after the bias.
        x = total.to(out_ptr.dtype.element_ty).to(tl.float32)
        if bias_ptr is not None:
            x = (x + bias).to(out_ptr.dtype.element_ty).to(tl.float32)
        if residual_ptr is not None:
            x += residual
        tl.store(new_residual_ptr + t * H + h, x.to(new_residual_ptr.dtype.element_ty), mask=mask)
        out = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / H + eps)
        if weight_ptr is not None:
            out *= weight
        tl.store(out_ptr + t * H + h, out.to(out_ptr.dtype.element_ty), mask=mask)
        part += 1
        first_t += step
    tl.store(rounds_ptr + i_p, part & (mail.WINDOW - 1))
    let_next_start(PDL)


def launch(
    out: torch.Tensor,
    new_residual: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rounds: torch.Tensor,
    peers: torch.Tensor,
    rank: int,
) -> None:
    """Write the norm of the ranks' sum of ``x [T, H]`` (+ ``residual``) to ``out``, and that sum to ``new_residual``.

    All but ``residual``, ``weight`` and ``bias`` are contiguous, and these three may be None.
    """
    T, H = x.shape
    if T == 0:
        return
    plan, size = launch_plan(H), len(peers)
    most = room(len(rounds), size, x.dtype.itemsize, plan.num_warps)
    with on_device_of(x):
        _all_reduce_add_rms_norm_kernel[(min(most.programs, cdiv(T, plan.BLOCK_T)),)](
            out, new_residual, x, residual, weight, bias, rounds, peers, T, H, eps,
            *((0, 0) if residual is None else residual.stride()),
            0 if weight is None else weight.stride(0), 0 if bias is None else bias.stride(0),
            RANK=rank, SIZE=size, CELLS=cells(size),
            BLOCK_T=plan.BLOCK_T, BLOCK_H=plan.BLOCK_H, num_warps=plan.num_warps, maxnreg=most.registers,
            **early_start(x.device),
        )  # fmt: skip
