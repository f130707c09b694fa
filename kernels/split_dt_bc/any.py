"""Triton kernel that cuts x_proj's output into dt, B and C, with or without their norms: one read, one write.

B and C of T tokens are ``2 T`` rows of N columns that lie one after another, in ``x`` as in ``bc``: one tile holds
both. x_proj's product of few rows may come in slices of the inner dimension: they are added up here, which saves a
kernel between the two.

Bits: a row is summed within one program in an order that depends on its length and on the dtype of dt, whether x comes
in slices or not (``launch.py``): neither on the other rows nor on their number.
"""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.dependent_launch import early_start, let_next_start, wait_for_kernel_ahead
from tp_mamba.kernels.common.dialect import tree_at
from tp_mamba.kernels.common.integers import cdiv, next_power_of_2
from tp_mamba.kernels.common.launches import Launch, launcher
from tp_mamba.kernels.split_dt_bc.launch import launch_plan


@triton.jit(do_not_specialize=["T"])
def _split_kernel(
    dt_ptr,  # [T, R] contiguous, any float, out
    bc_ptr,  # [T, 2 N] float32 contiguous, out
    x_ptr,  # [T, R + 2 N], any float, or [COUNT, T, R + 2 N] float32 contiguous, in
    dt_weight_ptr,  # [R] contiguous, any float, or None, in
    b_weight_ptr,  # [N], the same
    c_weight_ptr,  # [N], the same
    T,
    eps,  # None: no norms
    x_stride_t: tl.int64,
    x_stride_c,
    R: tl.constexpr,
    N: tl.constexpr,
    COUNT: tl.constexpr,  # slices of x_proj's product, to be added up
    SIZE: tl.constexpr,  # the power of two from COUNT
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    first_t = tl.program_id(0).to(tl.int64) * BLOCK_T
    t = first_t + tl.arange(0, BLOCK_T)[:, None]
    r = tl.arange(0, BLOCK_R)[None, :]
    r_mask = r < R
    dt_mask = (t < T) & r_mask
    row = tl.arange(0, 2 * BLOCK_T)[:, None]
    bc_t = first_t + row // 2
    is_c = row % 2
    n = tl.arange(0, BLOCK_N)[None, :]
    n_mask = n < N
    bc_mask = (bc_t < T) & n_mask

    if dt_weight_ptr is not None:
        dt_weight = tl.load(dt_weight_ptr + r, mask=r_mask, other=0.0).to(tl.float32)
    if b_weight_ptr is not None:
        b_weight = tl.load(b_weight_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    if c_weight_ptr is not None:
        c_weight = tl.load(c_weight_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    wait_for_kernel_ahead(PDL)

    p_dt = x_ptr + t * x_stride_t + r * x_stride_c
    p_bc = x_ptr + bc_t * x_stride_t + (R + is_c * N + n) * x_stride_c
    slice_size = T.to(tl.int64) * (R + 2 * N)
    dt = tree_at(p_dt, slice_size, dt_mask, 0, SIZE, COUNT).to(tl.float32)
    bc = tree_at(p_bc, slice_size, bc_mask, 0, SIZE, COUNT).to(tl.float32)
    if eps is not None:
        dt *= tl.rsqrt(tl.sum(dt * dt, axis=1, keep_dims=True) / R + eps)
        bc *= tl.rsqrt(tl.sum(bc * bc, axis=1, keep_dims=True) / N + eps)
        if dt_weight_ptr is not None:
            dt *= dt_weight
        if b_weight_ptr is not None:
            bc *= tl.where(is_c == 0, b_weight, 1.0)
        if c_weight_ptr is not None:
            bc *= tl.where(is_c == 1, c_weight, 1.0)
    tl.store(dt_ptr + t * R + r, dt.to(dt_ptr.dtype.element_ty), mask=dt_mask)
    tl.store(bc_ptr + (2 * first_t + row) * N + n, bc, mask=bc_mask)


@launcher(tensors=6)
def launch(
    dt: torch.Tensor,
    bc: torch.Tensor,
    x: torch.Tensor,
    dt_weight: torch.Tensor | None,
    b_weight: torch.Tensor | None,
    c_weight: torch.Tensor | None,
    eps: float | None,
) -> Launch | None:
    """Write ``dt [T, R]`` and ``bc [T, 2 N]``, both contiguous, from ``x``; weights are contiguous.

    ``x`` is ``[T, R + 2 N]``, or ``[slices, T, R + 2 N]``, contiguous, to be added up in an aligned binary tree.
    """
    (T, R), N = dt.shape, bc.shape[1] // 2
    if T == 0:
        return None
    in_slices = x.dim() == 3
    count = x.shape[0] if in_slices else 1
    plan = launch_plan(R, N, in_slices, dt.dtype)
    # The stride of a single row says nothing: it must not compile a kernel of its own.
    x_stride_t = R + 2 * N if T == 1 else x.stride(-2)
    values = (T, eps, x_stride_t, x.stride(-1), R, N, count, next_power_of_2(count))
    blocks = {"BLOCK_T": plan.BLOCK_T, "BLOCK_R": plan.BLOCK_R, "BLOCK_N": plan.BLOCK_N}
    options = {"num_warps": plan.num_warps, **early_start(x.device)}
    return Launch(_split_kernel, (cdiv(T, plan.BLOCK_T),), values, blocks | options)
