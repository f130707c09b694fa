"""Triton kernel of an all-reduce of x_proj's partial sums that goes on with their cut into dt, B and C, and the norms.

x_proj's product of few rows may come in slices of the inner dimension: this rank's are added up before they are sent.

Bits: the sum of :mod:`tp_mamba.kernels.all_reduce.any`, and behind it those of ``split_dt_bc``: a row lies on threads
as it does there.
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
from tp_mamba.kernels.common.dialect import tree_at
from tp_mamba.kernels.common.integers import cdiv, next_power_of_2
from tp_mamba.kernels.split_dt_bc.launch import LaunchPlan


@triton.jit
def _send_rows(
    x_ptr, first_t, T, peers, part,
    R: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, CELLS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add up the slices of BLOCK_T rows, and send them to every rank: this one too, which saves adding them twice."""
    i_t = tl.arange(0, BLOCK_T)[:, None]
    r = tl.arange(0, BLOCK_R)[None, :]
    row = tl.arange(0, 2 * BLOCK_T)[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    t, bc_t = first_t + i_t, first_t + row // 2
    dt_mask, bc_mask = (t < T) & (r < R), (bc_t < T) & (n < N)
    slice_size = T.to(tl.int64) * (R + 2 * N)
    dt = tree_at(x_ptr + t * (R + 2 * N) + r, slice_size, dt_mask, 0, SIZE, COUNT)
    p_bc = x_ptr + bc_t * (R + 2 * N) + (R + row % 2 * N + n)
    bc = tree_at(p_bc, slice_size, bc_mask, 0, SIZE, COUNT)
    send(dt, i_t * BLOCK_R + r, dt_mask, peers, part, RANK, -1, RANKS, CELLS, True)
    send(bc, BLOCK_T * BLOCK_R + row * BLOCK_N + n, bc_mask, peers, part, RANK, -1, RANKS, CELLS, True)


@triton.jit(do_not_specialize=["T"])
def _all_reduce_split_kernel(
    dt_ptr,  # [T, R] contiguous, any float, out
    bc_ptr,  # [T, 2 N] float32 contiguous, out
    x_ptr,  # [COUNT, T, R + 2 N] float32 contiguous, in
    dt_weight_ptr,  # [R] contiguous, any float, or None, in
    b_weight_ptr,  # [N], the same
    c_weight_ptr,  # [N], the same
    rounds_ptr,  # [PROGRAMS] int32, in and out
    peers_ptr,  # [RANKS] int64, in
    T,
    eps,  # None: no norms
    R: tl.constexpr,
    N: tl.constexpr,
    COUNT: tl.constexpr,  # slices of x_proj's product, to be added up
    SIZE: tl.constexpr,  # the power of two from COUNT
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * BLOCK_T
    first_t = i_p * BLOCK_T
    i_t = tl.arange(0, BLOCK_T)[:, None]
    r = tl.arange(0, BLOCK_R)[None, :]
    r_mask = r < R
    row = tl.arange(0, 2 * BLOCK_T)[:, None]
    is_c = row % 2
    n = tl.arange(0, BLOCK_N)[None, :]
    n_mask = n < N
    dt_offset = i_t * BLOCK_R + r
    bc_offset = BLOCK_T * BLOCK_R + row * BLOCK_N + n
    peers = addresses(peers_ptr, RANKS)
    if dt_weight_ptr is not None:
        dt_weight = tl.load(dt_weight_ptr + r, mask=r_mask, other=0.0).to(tl.float32)
    if b_weight_ptr is not None:
        b_weight = tl.load(b_weight_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    if c_weight_ptr is not None:
        c_weight = tl.load(c_weight_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    wait_for_kernel_ahead(PDL)

    part = tl.load(rounds_ptr + i_p)
    _send_rows(
        x_ptr, first_t, T, peers, part, R, N, COUNT, SIZE, RANK, RANKS, CELLS, BLOCK_T, BLOCK_R, BLOCK_N
    )
    if first_t + step < T:
        _send_rows(
            x_ptr, first_t + step, T, peers, part + 1, R, N, COUNT, SIZE, RANK, RANKS, CELLS, BLOCK_T, BLOCK_R, BLOCK_N
        )  # fmt: skip
    while first_t < T:
        t, bc_t = first_t + i_t, first_t + row // 2
        dt_mask, bc_mask = (t < T) & r_mask, (bc_t < T) & n_mask
        cells = cells_of(peers[RANK], part, CELLS)
        dt = sum_of_ranks(0.0, cells, dt_offset, dt_mask, tl.float32, -1, RANKS)
        bc = sum_of_ranks(0.0, cells, bc_offset, bc_mask, tl.float32, -1, RANKS)
        put_marks(cells, dt_offset, dt_mask, tl.float32, -1, RANKS)
        put_marks(cells, bc_offset, bc_mask, tl.float32, -1, RANKS)
        if first_t + 2 * step < T:
            fence(part)
            _send_rows(
                x_ptr, first_t + 2 * step, T, peers, part + 2, R, N, COUNT, SIZE,
                RANK, RANKS, CELLS, BLOCK_T, BLOCK_R, BLOCK_N,
            )  # fmt: skip
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
        part += 1
        first_t += step
    tl.store(rounds_ptr + i_p, part & (mail.WINDOW - 1))
    let_next_start(PDL)


def launch(
    dt: torch.Tensor,
    bc: torch.Tensor,
    x: torch.Tensor,
    dt_weight: torch.Tensor | None,
    b_weight: torch.Tensor | None,
    c_weight: torch.Tensor | None,
    eps: float | None,
    rounds: torch.Tensor,
    peers: torch.Tensor,
    rank: int,
    plan: LaunchPlan,
) -> None:
    """Write ``dt [T, R]`` and ``bc [T, 2 N]`` of the ranks' sum of ``x``, all of them contiguous.

    ``x`` is ``[T, R + 2 N]`` float32, or ``[slices, T, R + 2 N]`` to be added up in an aligned binary tree.
    """
    (T, R), N, size = dt.shape, bc.shape[1] // 2, len(peers)
    if T == 0:
        return
    count = x.shape[0] if x.dim() == 3 else 1
    most = room(len(rounds), size, x.dtype.itemsize, plan.num_warps)
    with on_device_of(x):
        _all_reduce_split_kernel[(min(most.programs, cdiv(T, plan.BLOCK_T)),)](
            dt, bc, x, dt_weight, b_weight, c_weight, rounds, peers, T, eps,
            R, N, count, next_power_of_2(count), rank, size, cells(size),
            BLOCK_T=plan.BLOCK_T, BLOCK_R=plan.BLOCK_R, BLOCK_N=plan.BLOCK_N, num_warps=plan.num_warps,
            maxnreg=most.registers, **early_start(x.device),
        )  # fmt: skip
