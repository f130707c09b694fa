"""Triton kernel of RMSNorm, with or without residual add: one kernel for every layout, whole rows in one program.

Bits: how a row is summed depends on H (and on dtypes and alignment, which one model never varies), so a row's bits
depend neither on the other rows nor on their number.
"""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.dependent_launch import early_start, let_next_start, wait_for_kernel_ahead
from tp_mamba.kernels.common.integers import cdiv
from tp_mamba.kernels.common.launches import Launch, launcher
from tp_mamba.kernels.rms_norm.launch import launch_plan


@triton.jit(do_not_specialize=["T"])
def _rms_norm_kernel(
    out_ptr,  # [T, H] contiguous, any float, out
    x_ptr,  # [T, H], any float, in
    residual_ptr,  # [T, H], any float, in; or None
    new_residual_ptr,  # [T, H] contiguous, any float, out; or None
    weight_ptr,  # [H], any float, in; or None
    T,
    H,
    eps,
    # Strides along h have no type: Triton makes a constant of an untyped 1, and with it loads of 16 bytes.
    x_stride_t: tl.int64, x_stride_h,
    residual_stride_t: tl.int64, residual_stride_h,
    weight_stride_h,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    h = tl.arange(0, BLOCK_H)[None, :].to(tl.int64)
    mask = (t < T) & (h < H)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + h * weight_stride_h, mask=h < H, other=0.0).to(tl.float32)
    wait_for_kernel_ahead(PDL)
    x = tl.load(x_ptr + t * x_stride_t + h * x_stride_h, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        p_residual = residual_ptr + t * residual_stride_t + h * residual_stride_h
        x += tl.load(p_residual, mask=mask, other=0.0).to(tl.float32)
    if new_residual_ptr is not None:
        tl.store(new_residual_ptr + t * H + h, x.to(new_residual_ptr.dtype.element_ty), mask=mask)
    out = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / H + eps)
    if weight_ptr is not None:
        out *= weight
    tl.store(out_ptr + t * H + h, out.to(out_ptr.dtype.element_ty), mask=mask)


@launcher(tensors=5)
def launch(
    out: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    new_residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
) -> Launch | None:
    """Write the norm of ``x`` (+ ``residual``) ``[T, H]`` to ``out``, and that sum to ``new_residual``.

    ``out`` and ``new_residual`` are contiguous; ``residual`` and ``new_residual`` may be None.
    """
    T, H = x.shape
    if T == 0:
        return None
    plan = launch_plan(H)
    strides = (
        *x.stride(),
        *((0, 0) if residual is None else residual.stride()),
        0 if weight is None else weight.stride(0),
    )
    constants = {"BLOCK_T": plan.BLOCK_T, "BLOCK_H": plan.BLOCK_H, **early_start(x.device)}
    grid = (cdiv(T, plan.BLOCK_T),)
    return Launch(_rms_norm_kernel, grid, (T, H, eps, *strides), constants | {"num_warps": plan.num_warps})
