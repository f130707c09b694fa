"""dt_proj's product, its softplus and the state update of one token, for the layout that a mixer has.

A program takes eight rows of the batch, or twice eight, and 32 or 64 channels. Its rows of dt_proj's weight are loaded
before the previous kernel has ended. Then the states of its first eight rows are in flight while the tensor cores
multiply and the softplus is taken, for all its rows at once; the time steps never leave the SM. The next eight rows'
states are loaded as the registers of the first eight come free. A thread owns two adjacent channels of a row with all
their states as scalars, so that nothing but the time steps is exchanged between threads.

Bits are those of ``linear_softplus`` for up to 64 rows, and of ``selective_state_update``, one after the other.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: RUF005 (Triton does not parse starred elements of a tuple)

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.alignment import strides_in_words
from tp_mamba.kernels.common.approximations import LOG2_E, softplus_of_sum
from tp_mamba.kernels.common.dependent_launch import early_start, let_next_start, wait_for_kernel_ahead
from tp_mamba.kernels.common.device import device_properties
from tp_mamba.kernels.common.dialect import add, jit_by_type
from tp_mamba.kernels.common.dtypes import HALVES
from tp_mamba.kernels.common.launches import Launch, launcher
from tp_mamba.kernels.common.recurrence import token_of_states
from tp_mamba.kernels.dt_proj_state_update.launch import (
    BLOCK_B,
    BLOCK_D,
    MAX_RANK,
    PER_THREAD,
    REGISTERS,
    launch_plan,
)

STATE_SIZES = (4, 8, 16)
"""Whole loads of four states of B and C; the states of a thread's channels leave room for a second program."""


@triton.jit
def _load_states(rows_ptr, mask, N: tl.constexpr, PER_ROW: tl.constexpr, PER_THREAD: tl.constexpr):
    """B or C of each thread's row, at ``rows_ptr [threads]``: N tensors ``[rows, PER_ROW]`` of one value per row."""
    FOUR: tl.constexpr = rows_ptr.dtype.scalar.element_ty.primitive_bitwidth // 2  # in bytes
    THREADS: tl.constexpr = rows_ptr.shape[0]
    four = tl.arange(0, 4)[None, :]
    states = ()
    for m in tl.static_range(N // 4):
        p = tl.multiple_of((rows_ptr + m * 4)[:, None], [FOUR, FOUR])
        x = tl.load(p + four, mask=mask[:, None], other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(x, [THREADS, 2, 2]))
        s0, s2 = tl.split(even)
        s1, s3 = tl.split(odd)
        for s in tl.static_range(4):
            x = (s0, s1, s2, s3)[s]
            # What a thread has loaded serves all its channels.
            x = tl.broadcast_to(x[:, None], [THREADS, PER_THREAD])
            states = states + (tl.reshape(x, [THREADS * PER_THREAD // PER_ROW, PER_ROW]),)
    return states


@triton.jit
def _in_other_layout(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``x``, as a tile whose layout the compiler does not carry over to what is computed with it.

    The states would else all be moved to the threads that hold the tensor core's result. No layout is carried over a
    scan; one of a single element is no instruction.
    """
    return tl.reshape(tl.associative_scan(tl.reshape(x, [ROWS, COLUMNS, 1]), 2, add), [ROWS, COLUMNS])


@triton.jit
def _blocks_of(x, BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The one or two blocks of rows of ``x``."""
    blocks = (x,)
    if BLOCKS == 2:
        blocks = tl.split(tl.permute(tl.reshape(x, [2, ROWS, COLUMNS]), [1, 2, 0]))
    return blocks


@triton.jit
def _first_rows(x, ROWS: tl.constexpr):
    """``x [16, COLUMNS]``, or the first 8 of its rows."""
    if ROWS == 8:
        x, _ = tl.split(tl.permute(tl.reshape(x, [2, 8, x.shape[1]]), [1, 2, 0]))
    return x


@triton.jit
def _rows(ptr, offset, first_d, d, PER_THREAD: tl.constexpr):
    """Pointers ``[rows, channels]``; the launcher has checked that a thread's channels of each row are a whole word."""
    WORD: tl.constexpr = PER_THREAD * ptr.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of((ptr + offset + first_d)[:, None], [WORD, WORD]) + d[None, :]


@jit_by_type
@no_type_check  # a Triton kernel's body is not Python
def dt_proj_state_update_kernel(
    state_ptr,  # [slots, D, N], any float, in and out
    x_ptr,  # [B, D], bfloat16 or float16, in
    dt_ptr,  # [B, R], as x
    weight_ptr,  # [D, R], as x
    z_ptr,  # as x, or None
    out_ptr,  # as x, out
    A_ptr,  # [D, N]
    B_ptr,  # [B, N]
    C_ptr,  # [B, N]
    D_ptr,  # [D] contiguous, or None
    bias_ptr,  # [D] contiguous, or None
    state_batch_indices_ptr,  # [B] int, or None: slot b for row b
    batch: tl.int32,
    pad_slot_id: tl.int64,  # without slots -1, which is no row's
    state_stride_s: tl.int64,
    x_stride_b: tl.int64, dt_stride_b: tl.int64, z_stride_b: tl.int64, out_stride_b: tl.int64,
    B_stride_b: tl.int64, C_stride_b: tl.int64,
    # A model has one of each, whatever the batch: as constants they fold into the loads and stores.
    state_stride_n: tl.constexpr, A_stride_n: tl.constexpr, weight_stride_d: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCKS: tl.constexpr,  # of rows: 1 or 2
    BLOCK_D: tl.constexpr,  # divides channels
    PER_THREAD: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    first_d = tl.program_id(0).to(tl.int64) * BLOCK_D
    first_row = tl.program_id(1).to(tl.int64) * (BLOCKS * BLOCK_B)
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)

    weight = tl.load(
        tl.multiple_of(weight_ptr + first_d * weight_stride_d, 16)
        + d[:, None] * weight_stride_d
        + r[None, :],
        mask=(r < R)[None, :],
        other=0.0,
    )
    bias = tl.full([BLOCK_D], 0.0, tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first_d + d).to(tl.float32)
    skip = tl.full([1, BLOCK_D], 0.0, tl.float32)
    if HAS_D:
        skip = tl.load(D_ptr + first_d + d).to(tl.float32)[None, :]
    slots = ()
    for i in tl.static_range(BLOCKS):
        slot = first_row + i * BLOCK_B + tl.arange(0, BLOCK_B)
        if HAS_SLOTS:
            slot = tl.load(state_batch_indices_ptr + slot, mask=slot < batch, other=0).to(tl.int64)
        slots = slots + (slot,)
    wait_for_kernel_ahead(PDL)

    A_WORD: tl.constexpr = PER_THREAD * A_ptr.dtype.element_ty.primitive_bitwidth // 8
    THREADS: tl.constexpr = BLOCK_B * BLOCK_D // PER_THREAD
    a = ()
    deltas = ()
    for i in tl.static_range(BLOCKS):
        rows = first_row + i * BLOCK_B + tl.arange(0, BLOCK_B)
        row_mask, slot = rows < batch, slots[i]
        live = (row_mask & (slot != pad_slot_id))[:, None]
        mask = live & (d >= 0)[None, :]
        p_state = _rows(state_ptr, slot * state_stride_s, first_d, d, PER_THREAD)
        h = ()
        for n in tl.static_range(N):
            h = h + (tl.load(p_state + n * state_stride_n, mask=mask, other=0.0).to(tl.float32),)
        x = tl.load(_rows(x_ptr, rows * x_stride_b, first_d, d, PER_THREAD), mask=mask, other=0.0)
        z = x
        if HAS_Z:
            z = tl.load(_rows(z_ptr, rows * z_stride_b, first_d, d, PER_THREAD), mask=mask, other=0.0)
        if i == 0:
            # All on its way before the first value is used: the time steps' product comes last, behind a barrier.
            p_a = tl.multiple_of(A_ptr + first_d, A_WORD) + d[None, :] + tl.full([BLOCK_B, 1], 0, tl.int32)
            for n in tl.static_range(N):
                a = a + (tl.load(p_a + n * A_stride_n).to(tl.float32) * LOG2_E,)
            # A tile of 64 or more weight rows would let Triton take Hopper's wgmma, whose rounding need not be that of
            # mma.sync: there the rows of dt come first, at least the 16 that the instruction has.
            DT_FIRST: tl.constexpr = BLOCK_D >= 64
            ALL_ROWS: tl.constexpr = 16 if DT_FIRST else BLOCKS * BLOCK_B
            all_rows = first_row + tl.arange(0, ALL_ROWS)
            p_dt = tl.multiple_of((dt_ptr + all_rows * dt_stride_b)[:, None], [16, 16]) + r[None, :]
            dt = tl.load(p_dt, mask=(all_rows < batch)[:, None] & (r < R)[None, :], other=0.0)
            if DT_FIRST:
                product = _first_rows(tl.dot(dt, weight.trans()), BLOCKS * BLOCK_B)
            else:
                product = tl.dot(weight, dt.trans()).trans()
        # B and C come from the L2, under the softplus: sooner, they would cost registers that a second program needs.
        of_thread = first_row + i * BLOCK_B + tl.arange(0, THREADS) // (BLOCK_D // PER_THREAD)
        b = _load_states(B_ptr + of_thread * B_stride_b, of_thread < batch, N, BLOCK_D, PER_THREAD)
        # With a second block to follow, C comes after the softplus: before it, the ptxas of Triton 3.8 spills.
        if i == BLOCKS - 1:
            c = _load_states(C_ptr + of_thread * C_stride_b, of_thread < batch, N, BLOCK_D, PER_THREAD)
        if i == 0:
            delta = softplus_of_sum(product, bias).to(dt_ptr.dtype.element_ty)
            deltas = _blocks_of(delta, BLOCKS, BLOCK_B, BLOCK_D)
        if i != BLOCKS - 1:
            c = _load_states(C_ptr + of_thread * C_stride_b, of_thread < batch, N, BLOCK_D, PER_THREAD)
        delta = _in_other_layout(deltas[i], BLOCK_B, BLOCK_D)
        after, y = token_of_states(h, a, skip, skip, x, delta, z, b, c, N, HAS_D, HAS_Z, False, False)
        p_out = _rows(out_ptr, rows * out_stride_b, first_d, d, PER_THREAD)
        tl.store(
            p_out,
            tl.where(mask, y, 0.0).to(out_ptr.dtype.element_ty),
            mask=row_mask[:, None] & (d >= 0)[None, :],
        )
        for n in tl.static_range(N):
            tl.store(p_state + n * state_stride_n, after[n].to(state_ptr.dtype.element_ty), mask=mask)


@launcher(tensors=12)
def launch(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor | None,
    out: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    bias: torch.Tensor | None,
    slots: torch.Tensor | None,
    pad_slot_id: int,
) -> Launch | None:
    """Launch the kernel where it serves the call, whose arguments these are.

    It wants 16-bit activations of one dtype, whole blocks of 32 channels, N of 4, 8 or 16, R of at most 256, contiguous
    channels of everything (of state and A too) and every row at a whole word: two channels, four states, eight of dt.
    """
    (batch, channels), n, rank, dtype = x.shape, A.shape[1], dt.shape[1], x.dtype
    if dtype not in HALVES or dt.dtype != dtype or out.dtype != dtype or (z is not None and z.dtype != dtype):
        return None
    if n not in STATE_SIZES or channels % BLOCK_D or rank > MAX_RANK or batch == 0 or channels == 0:
        return None
    if (D is not None and D.stride(0) != 1) or (bias is not None and bias.stride(0) != 1):
        return None
    of_state, of_A = strides_in_words(state, PER_THREAD, -2), strides_in_words(A, PER_THREAD, -2)
    of_x, of_out = strides_in_words(x, PER_THREAD), strides_in_words(out, PER_THREAD)
    of_z = (0,) if z is None else strides_in_words(z, PER_THREAD)
    of_dt, of_weight = strides_in_words(dt, 8), strides_in_words(weight, 8)
    of_B, of_C = strides_in_words(B, 4), strides_in_words(C, 4)
    if not (of_state and of_A and of_x and of_out and of_z and of_dt and of_weight and of_B and of_C):
        return None
    plan = launch_plan(batch, channels, rank, device_properties(x.device))
    if plan is None:
        return None
    strides = (
        of_state[0], of_x[0], of_dt[0], of_z[0], of_out[0], of_B[0], of_C[0], of_state[2], of_A[1], of_weight[0]
    )  # fmt: skip
    constants = {
        "N": n, "R": rank, "BLOCK_R": plan.block_r, "BLOCK_B": BLOCK_B, "BLOCKS": plan.blocks,
        "BLOCK_D": plan.block_d, "PER_THREAD": PER_THREAD, "HAS_D": D is not None, "HAS_Z": z is not None,
        "HAS_BIAS": bias is not None, "HAS_SLOTS": slots is not None, "num_warps": plan.num_warps,
        "maxnreg": REGISTERS, "enable_fp_fusion": False, **early_start(x.device),
    }  # fmt: skip
    values = (batch, -1 if slots is None else pad_slot_id, *strides)
    return Launch(dt_proj_state_update_kernel, plan.grid, values, constants)
