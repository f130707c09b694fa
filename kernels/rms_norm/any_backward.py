"""Triton kernel of RMSNorm's backward, with or without residual add: whole rows in one program, many after another.

A program walks its rows with the next ones in flight and keeps their sum of ``dout * normed`` in registers, which it
writes once: ``[P, H]``, added up by a second kernel in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.device import on_device_of
from tp_mamba.kernels.common.integers import cdiv
from tp_mamba.kernels.common.partial_sums import sum_partials
from tp_mamba.kernels.rms_norm.launch import backward_plan


@triton.jit
def _load(ptr, t, h, T, H, stride_t, stride_h):
    """A tile of rows as it is in memory, zeros outside."""
    return tl.load(ptr + t * stride_t + h * stride_h, mask=(t < T) & (h < H), other=0.0)


@triton.jit(do_not_specialize=["T", "steps"])
def _rms_norm_backward_kernel(
    dx_ptr,  # [T, H] contiguous, any float, out
    dresidual_ptr,  # the same in another dtype, out; or None
    partials_ptr,  # [P, H] float32, out: sums of dout * normed; or None
    dout_ptr,  # [T, H], any float, in
    dsum_ptr,  # [T, H], any float, in; or None
    x_ptr,  # [T, H], any float, in
    residual_ptr,  # [T, H], any float, in; or None
    weight_ptr,  # [H], any float, in; or None
    T,
    H,
    eps,
    steps,  # tiles of BLOCK_T rows per program
    # Strides along h have no type: Triton makes a constant of an untyped 1, and with it loads of 16 bytes.
    dout_stride_t: tl.int64, dout_stride_h, dsum_stride_t: tl.int64, dsum_stride_h,
    x_stride_t: tl.int64, x_stride_h, residual_stride_t: tl.int64, residual_stride_h, weight_stride_h,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    AHEAD: tl.constexpr,  # whether the next rows are requested before these are computed
):  # fmt: skip
    first_t = tl.program_id(0).to(tl.int64) * steps * BLOCK_T
    t = first_t + tl.arange(0, BLOCK_T)[:, None]
    h = tl.arange(0, BLOCK_H)[None, :].to(tl.int64)
    if AHEAD:
        x_next = _load(x_ptr, t, h, T, H, x_stride_t, x_stride_h)
        dout_next = _load(dout_ptr, t, h, T, H, dout_stride_t, dout_stride_h)
        if residual_ptr is not None:
            residual_next = _load(residual_ptr, t, h, T, H, residual_stride_t, residual_stride_h)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + h * weight_stride_h, mask=h < H, other=0.0)
    total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for _ in range(steps):
        mask = (t < T) & (h < H)
        if not AHEAD:
            x_next = _load(x_ptr, t, h, T, H, x_stride_t, x_stride_h)
            dout_next = _load(dout_ptr, t, h, T, H, dout_stride_t, dout_stride_h)
            if residual_ptr is not None:
                residual_next = _load(residual_ptr, t, h, T, H, residual_stride_t, residual_stride_h)
        x = x_next.to(tl.float32)
        dout = dout_next.to(tl.float32)
        if residual_ptr is not None:
            x += residual_next.to(tl.float32)
        if dsum_ptr is not None:  # used last: in flight during the sums over the row
            dsum = _load(dsum_ptr, t, h, T, H, dsum_stride_t, dsum_stride_h)
        u = t + BLOCK_T
        if AHEAD:
            x_next = _load(x_ptr, u, h, T, H, x_stride_t, x_stride_h)
            dout_next = _load(dout_ptr, u, h, T, H, dout_stride_t, dout_stride_h)
            if residual_ptr is not None:
                residual_next = _load(residual_ptr, u, h, T, H, residual_stride_t, residual_stride_h)
        scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / H + eps)
        normed = x * scale
        if partials_ptr is not None:
            total += dout * normed
        if weight_ptr is not None:
            dout *= weight.to(tl.float32)
        mean = tl.sum(dout * normed, axis=1, keep_dims=True) / H
        dx = scale * (dout - normed * mean)
        if dsum_ptr is not None:
            dx += dsum.to(tl.float32)
        tl.store(dx_ptr + t * H + h, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + t * H + h, dx.to(dresidual_ptr.dtype.element_ty), mask=mask)
        t = u
    if partials_ptr is not None:
        column = tl.arange(0, BLOCK_H)
        p_partials = partials_ptr + tl.program_id(0).to(tl.int64) * H + column
        tl.store(p_partials, tl.sum(total, axis=0), mask=column < H)


def launch(
    dx: torch.Tensor,
    dresidual: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dout: torch.Tensor,
    dsum: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
) -> None:
    """Same contract as ``cpu_backward.rms_norm_backward_cpu``; ``dx`` and ``dresidual`` are contiguous."""
    T, H = x.shape
    if T == 0:
        if dweight is not None:
            dweight.zero_()
        return
    plan = backward_plan(T, H)
    programs = cdiv(T, plan.BLOCK_T * plan.steps)
    partials = None if dweight is None else x.new_empty(programs, H, dtype=torch.float32)
    with on_device_of(x):
        _rms_norm_backward_kernel[(programs,)](
            dx, dresidual, partials, dout, dsum, x, residual, weight, T, H, eps, plan.steps,
            *dout.stride(), *((0, 0) if dsum is None else dsum.stride()),
            *x.stride(), *((0, 0) if residual is None else residual.stride()),
            0 if weight is None else weight.stride(0),
            BLOCK_T=plan.BLOCK_T, BLOCK_H=plan.BLOCK_H, AHEAD=plan.ahead, num_warps=plan.num_warps,
        )  # fmt: skip
    if dweight is not None and partials is not None:
        sum_partials(dweight, partials)
