"""Triton kernel of RMSNorm, with or without residual add: whole rows in one program.

How a row is summed depends on H alone (and on its dtype and alignment, which one model never varies), so its
bits depend neither on the other rows nor on their number.
"""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.dependent_launch import early_start, let_next_start, wait_for_kernel_ahead
from tp_mamba.kernels.common.integers import cdiv, next_power_of_2


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    out_ptr,  # [rows, H] contiguous, written
    x_ptr,  # [rows, H], read
    residual_ptr,  # [rows, H] or None, read
    new_residual_ptr,  # [rows, H] contiguous or None, written
    weight_ptr,  # [H] or None, read
    rows,
    H,
    eps,
    # Those of h without a type: Triton makes a constant of an untyped 1, and with it loads of 16 bytes.
    x_stride_r: tl.int64, x_stride_h,
    residual_stride_r: tl.int64, residual_stride_h,
    weight_stride_h,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    h = tl.arange(0, BLOCK_H)[None, :].to(tl.int64)
    m = (r < rows) & (h < H)
    if weight_ptr is not None:
        b_weight = tl.load(weight_ptr + h * weight_stride_h, mask=h < H, other=0.0).to(tl.float32)
    wait_for_kernel_ahead(PDL)
    b_x = tl.load(x_ptr + r * x_stride_r + h * x_stride_h, mask=m, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        p_residual = residual_ptr + r * residual_stride_r + h * residual_stride_h
        b_x += tl.load(p_residual, mask=m, other=0.0).to(tl.float32)
    if new_residual_ptr is not None:
        tl.store(new_residual_ptr + r * H + h, b_x.to(new_residual_ptr.dtype.element_ty), mask=m)
    b_out = b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=1, keep_dims=True) / H + eps)
    if weight_ptr is not None:
        b_out *= b_weight
    tl.store(out_ptr + r * H + h, b_out.to(out_ptr.dtype.element_ty), mask=m)


def launch(
    out: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    new_residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
) -> None:
    """Write the norm of ``x`` (+ ``residual``) [rows, H] to ``out``, and that sum to ``new_residual``.

    ``out`` and ``new_residual`` are contiguous; ``residual`` and ``new_residual`` may be None.
    """
    rows, H = x.shape
    if rows == 0:
        return
    block_h = next_power_of_2(H)
    block_r = max(1, 1024 // block_h)  # the small norms of dt, B and C: several rows fill a program
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(cdiv(rows, block_r),)](
            out, x, residual, new_residual, weight, rows, H, eps,
            *x.stride(), *((0, 0) if residual is None else residual.stride()),
            0 if weight is None else weight.stride(0),
            BLOCK_R=block_r, BLOCK_H=block_h, num_warps=min(32, max(4, block_h // 512)),
            **early_start(x.device),
        )  # fmt: skip
