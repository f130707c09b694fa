"""The one-step state update for the layout that a mixer has: channels contiguous, B and C one group.

A thread owns ``PER_THREAD`` adjacent channels with all their states as scalars in registers: nothing is exchanged,
every state is read and written once, in whole words of as many channels, and B and C arrive four states a load. A
program takes a few batch rows one after another, so that A, as large as a row's state, is read once for all of them.
Only the state waits for the row's slot, and the next row's slot is on its way meanwhile.

Bits are those of ``selective_state_update_triton``: the sum over states is cut and added in one order everywhere.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: RUF005 (Triton does not parse starred elements of a tuple)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from tp_mamba.kernels.approx_triton import LOG2_E
from tp_mamba.kernels.ssm_token_triton import jit_by_type, token_of_states

STATE_SIZES = (4, 8, 16, 32)
"""Whole loads of four states of B and C; the states of a channel fit in one thread."""


@triton.jit
def _load_states(ptr, N: tl.constexpr, BLOCK_D: tl.constexpr, PER_THREAD: tl.constexpr):
    """A row's B or C: N tensors ``[BLOCK_D]`` float32, each of one value; four states in a load."""
    FOUR: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 2  # bytes; the launcher has seen to alignment
    THREADS: tl.constexpr = BLOCK_D // PER_THREAD
    four = tl.full([THREADS, 1], 0, tl.int32) + tl.arange(0, 4)[None, :]
    states = ()
    for m in tl.static_range(N // 4):
        x = tl.load(tl.multiple_of(ptr + m * 4, FOUR) + four).to(tl.float32)
        even, odd = tl.split(tl.reshape(x, [THREADS, 2, 2]))
        s0, s2 = tl.split(even)
        s1, s3 = tl.split(odd)
        for s in tl.static_range(4):
            x = (s0, s1, s2, s3)[s]
            # What a thread has loaded serves all its channels.
            states = states + (tl.reshape(tl.broadcast_to(x[:, None], [THREADS, PER_THREAD]), [BLOCK_D]),)
    return states


@jit_by_type
@no_type_check  # a Triton kernel's body is not Python
def state_update_rows_kernel(
    state_ptr,  # [slots, D, N], in and out
    x_ptr,  # [B, D], any float, in
    dt_ptr,  # as x
    z_ptr,  # as x, or None
    out_ptr,  # as x, out
    A_ptr,  # [D, N]
    B_ptr,  # [B, N]
    C_ptr,  # [B, N]
    D_ptr,  # [D] contiguous, or None
    bias_ptr,  # [D] contiguous, or None
    slot_ptr,  # [B] int, or None: slot b for row b
    batch: tl.int32,
    rows: tl.int32,  # a program
    channel_words: tl.int32,  # channels / PER_THREAD
    pad_slot_id: tl.int64,
    state_stride_s: tl.int64,
    x_stride_b: tl.int64, dt_stride_b: tl.int64, z_stride_b: tl.int64, out_stride_b: tl.int64,
    B_stride_b: tl.int64, C_stride_b: tl.int64,
    # A model has one of each, whatever the batch: as constants they fold into the loads and stores.
    state_stride_n: tl.constexpr, A_stride_n: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PER_THREAD: tl.constexpr,
    EVEN_D: tl.constexpr,  # BLOCK_D divides channels
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    # That a thread's channels are all inside or all outside shows in the product.
    inside = (d >= 0) if EVEN_D else (d < channel_words.to(tl.int64) * PER_THREAD)
    first = tl.program_id(1) * rows
    last = tl.minimum(first + rows, batch) - 1

    a = ()
    for n in tl.static_range(N):
        p_a = A_ptr + n * A_stride_n
        p_a = tl.multiple_of(p_a, PER_THREAD * (A_ptr.dtype.element_ty.primitive_bitwidth // 8)) + d
        a = a + (tl.load(p_a, mask=inside).to(tl.float32) * LOG2_E,)
    skip = tl.full([BLOCK_D], 0.0, tl.float32)
    bias = skip
    if HAS_D:
        skip = tl.load(D_ptr + d, mask=inside).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=inside).to(tl.float32)
    slot_ahead = first.to(tl.int64)
    if HAS_SLOTS:
        slot_ahead = tl.load(slot_ptr + first).to(tl.int64)

    for r in range(first, last + 1):
        slot = slot_ahead
        live = True
        if HAS_SLOTS:
            live = slot != pad_slot_id
        p_state = tl.multiple_of(state_ptr + slot * state_stride_s, PER_THREAD * 4) + d
        h = ()
        for n in tl.static_range(N):
            h = h + (tl.load(p_state + n * state_stride_n, mask=inside & live).to(tl.float32),)
        row = r.to(tl.int64)
        x = tl.load(tl.multiple_of(x_ptr + row * x_stride_b, PER_THREAD * 2) + d, mask=inside)
        dt = tl.load(tl.multiple_of(dt_ptr + row * dt_stride_b, PER_THREAD * 2) + d, mask=inside)
        z = x
        if HAS_Z:
            z = tl.load(tl.multiple_of(z_ptr + row * z_stride_b, PER_THREAD * 2) + d, mask=inside)
        b = _load_states(B_ptr + row * B_stride_b, N, BLOCK_D, PER_THREAD)
        c = _load_states(C_ptr + row * C_stride_b, N, BLOCK_D, PER_THREAD)
        if HAS_SLOTS:
            slot_ahead = tl.load(slot_ptr + tl.minimum(r + 1, last)).to(tl.int64)
        else:
            slot_ahead = row + 1
        h, y = token_of_states(h, a, skip, bias, x, dt, z, b, c, N, HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS)
        y = tl.where(live, y, 0.0)
        p_out = tl.multiple_of(out_ptr + row * out_stride_b, PER_THREAD * 2) + d
        tl.store(p_out, y.to(out_ptr.dtype.element_ty), mask=inside)
        for n in tl.static_range(N):
            tl.store(p_state + n * state_stride_n, h[n].to(state_ptr.dtype.element_ty), mask=inside & live)
