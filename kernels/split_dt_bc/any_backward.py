"""Triton kernel of the split's backward: the gradients of dt, of B and of C become that of x_proj's output.

As in the forward, B and C of T tokens are ``2 T`` rows of N columns. A program walks its tokens and keeps the sums for
the norms' weights in registers, which it writes once: ``[P, R + 2 N]``, added up by a second kernel in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.device import on_device_of
from tp_mamba.kernels.common.integers import cdiv
from tp_mamba.kernels.common.partial_sums import sum_partials
from tp_mamba.kernels.linear.cpu import add_slices_cpu
from tp_mamba.kernels.split_dt_bc.launch import MOST_SUMS, launch_plan


@triton.jit(do_not_specialize=["T", "steps"])
def _split_backward_kernel(
    dx_ptr,  # [T, R + 2 N] contiguous, any float, out
    partials_ptr,  # [P, R + 2 N] float32, out; or None
    ddt_ptr,  # [T, R], any float, in
    dbc_ptr,  # [T, 2 N], any float, in
    x_ptr,  # [T, R + 2 N], any float, in; or None
    dt_weight_ptr,  # [R] contiguous, any float, or None, in
    b_weight_ptr,  # [N], the same
    c_weight_ptr,  # [N], the same
    T,
    eps,  # None: no norms
    steps,  # tiles of BLOCK_T tokens per program
    ddt_stride_t: tl.int64, ddt_stride_r, dbc_stride_t: tl.int64, dbc_stride_n, x_stride_t: tl.int64, x_stride_c,
    R: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, BLOCK_R)[None, :]
    row = tl.arange(0, 2 * BLOCK_T)[:, None]
    is_c = row % 2
    n = tl.arange(0, BLOCK_N)[None, :]
    if dt_weight_ptr is not None:
        dt_weight = tl.load(dt_weight_ptr + r, mask=r < R, other=0.0).to(tl.float32)
    if b_weight_ptr is not None:
        b_weight = tl.load(b_weight_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if c_weight_ptr is not None:
        c_weight = tl.load(c_weight_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    dt_total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    bc_total = tl.zeros((2 * BLOCK_T, BLOCK_N), tl.float32)
    for step in range(steps):
        first_t = (tl.program_id(0).to(tl.int64) * steps + step) * BLOCK_T
        t = first_t + tl.arange(0, BLOCK_T)[:, None]
        bc_t = first_t + row // 2
        dt_mask = (t < T) & (r < R)
        bc_mask = (bc_t < T) & (n < N)
        bc_column = is_c * N + n
        ddt = tl.load(ddt_ptr + t * ddt_stride_t + r * ddt_stride_r, mask=dt_mask, other=0.0).to(tl.float32)
        p_dbc = dbc_ptr + bc_t * dbc_stride_t + bc_column * dbc_stride_n
        dbc = tl.load(p_dbc, mask=bc_mask, other=0.0).to(tl.float32)
        if eps is not None:
            p_dt = x_ptr + t * x_stride_t + r * x_stride_c
            p_bc = x_ptr + bc_t * x_stride_t + (R + bc_column) * x_stride_c
            dt = tl.load(p_dt, mask=dt_mask, other=0.0).to(tl.float32)
            bc = tl.load(p_bc, mask=bc_mask, other=0.0).to(tl.float32)
            dt_scale = tl.rsqrt(tl.sum(dt * dt, axis=1, keep_dims=True) / R + eps)
            bc_scale = tl.rsqrt(tl.sum(bc * bc, axis=1, keep_dims=True) / N + eps)
            dt *= dt_scale
            bc *= bc_scale
            if partials_ptr is not None:
                dt_total += ddt * dt
                bc_total += dbc * bc
            if dt_weight_ptr is not None:
                ddt *= dt_weight
            if b_weight_ptr is not None:
                dbc *= tl.where(is_c == 0, b_weight, 1.0)
            if c_weight_ptr is not None:
                dbc *= tl.where(is_c == 1, c_weight, 1.0)
            ddt = dt_scale * (ddt - dt * (tl.sum(ddt * dt, axis=1, keep_dims=True) / R))
            dbc = bc_scale * (dbc - bc * (tl.sum(dbc * bc, axis=1, keep_dims=True) / N))
        p_dx = dx_ptr + t * (R + 2 * N) + r
        tl.store(p_dx, ddt.to(dx_ptr.dtype.element_ty), mask=dt_mask)
        p_dx_bc = dx_ptr + bc_t * (R + 2 * N) + (R + bc_column)
        tl.store(p_dx_bc, dbc.to(dx_ptr.dtype.element_ty), mask=bc_mask)
    if partials_ptr is not None:
        p_partials = partials_ptr + tl.program_id(0).to(tl.int64) * (R + 2 * N)
        columns_r = tl.arange(0, BLOCK_R)
        columns_n = tl.arange(0, BLOCK_N)
        tl.store(p_partials + columns_r, tl.sum(dt_total, axis=0), mask=columns_r < R)
        of_b = tl.sum(tl.where(is_c == 0, bc_total, 0.0), axis=0)
        of_c = tl.sum(tl.where(is_c == 1, bc_total, 0.0), axis=0)
        tl.store(p_partials + R + columns_n, of_b, mask=columns_n < N)
        tl.store(p_partials + R + N + columns_n, of_c, mask=columns_n < N)


def launch(
    dx: torch.Tensor,
    ddt_weight: torch.Tensor,
    db_weight: torch.Tensor,
    dc_weight: torch.Tensor,
    ddt: torch.Tensor,
    dbc: torch.Tensor,
    x: torch.Tensor | None,
    dt_weight: torch.Tensor | None,
    b_weight: torch.Tensor | None,
    c_weight: torch.Tensor | None,
    eps: float | None,
) -> None:
    """Same contract as ``cpu_backward.split_dt_bc_backward_cpu``; weights are contiguous."""
    (T, R), N = ddt.shape, dbc.shape[1] // 2
    if x is not None and x.dim() == 3:
        x = add_slices_cpu(x)
    weights, dweights = (dt_weight, b_weight, c_weight), (ddt_weight, db_weight, dc_weight)
    plan = launch_plan(R, N, False, ddt.dtype)
    weighted = any(weight is not None for weight in weights)
    steps = cdiv(max(T, 1), plan.BLOCK_T * MOST_SUMS) if weighted else 1
    programs = cdiv(T, plan.BLOCK_T * steps)
    partials = dx.new_empty(programs, R + 2 * N, dtype=torch.float32) if weighted else None
    if T:
        with on_device_of(dx):
            _split_backward_kernel[(programs,)](
                dx, partials, ddt, dbc, x, *weights, T, eps, steps,
                *ddt.stride(), *dbc.stride(), *((0, 0) if x is None else x.stride()), R, N,
                BLOCK_T=plan.BLOCK_T, BLOCK_R=plan.BLOCK_R, BLOCK_N=plan.BLOCK_N, num_warps=plan.num_warps,
            )  # fmt: skip
    if partials is not None:
        of_weights = partials.split([R, N, N], 1)
        for dweight, weight, columns in zip(dweights, weights, of_weights, strict=True):
            if weight is not None:
                sum_partials(dweight, columns)
