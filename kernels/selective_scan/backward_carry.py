"""The first pass of the scan's backward over sequences of several segments: what each hands to the one before it.

Every segment but the first of a sequence is walked backwards as if nothing came behind it, to what the state before it
then gets. The recurrence is linear: what it gets from behind is that times the segment's decay, which is one
exponential of the sum of its time steps. So all segments can then be walked at once.

A thread has one channel, or a few, and N / LANES states of each. The rows of the next STEPS tokens are in registers
while those before them are computed.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: RUF005 (Triton does not parse starred elements of a tuple)

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from tp_mamba.kernels.common.approximations import LOG2_E, ex2, sigmoid, softplus
from tp_mamba.kernels.common.dialect import jit_by_type
from tp_mamba.kernels.selective_scan.backward_tokens import states_of
from tp_mamba.kernels.selective_scan.segments import segment_of


@triton.jit
def _rows_of(ptr, at, stride, mask, steps, STEPS: tl.constexpr):
    """STEPS tokens' rows from token ``at`` on, as they are in memory; zeros before and behind the sequence."""
    rows = ()
    for s in tl.static_range(STEPS):
        there = (at + s >= 0) & (at + s < steps)
        rows = rows + (tl.load(ptr + (at + s) * stride, mask=mask & there, other=0.0),)
    return rows


@jit_by_type
@no_type_check  # a Triton kernel's body is not Python
def carry_kernel(
    g_ptr,  # [B, L, D] or [T, D], any float, in: the gradient of the output
    delta_ptr,  # as g
    z_ptr,  # as g, or None
    A_ptr,  # [N, D] contiguous
    C_ptr,  # [B, L, N] or [T, N]
    bias_ptr,  # [D] or None
    start_ptr,  # [S + 1] int, or None: dense
    carry_ptr,  # [segments, N + 1, D] float32 contiguous, out: what the state before a segment gets, the sum of steps
    length: tl.int32,
    sequences: tl.int32,
    channels: tl.int32,
    g_stride_s: tl.int64, delta_stride_s: tl.int64, z_stride_s: tl.int64, C_stride_s: tl.int64,
    bias_stride: tl.int64,
    g_stride_t: tl.constexpr, delta_stride_t: tl.constexpr, z_stride_t: tl.constexpr, C_stride_t: tl.constexpr,
    N: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    SEGMENT: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    PER_LANE: tl.constexpr = N // LANES
    blocks = (channels + BLOCK_D - 1) // BLOCK_D
    i_row = (tl.program_id(0) // blocks).to(tl.int64)
    i_d = (tl.program_id(0) % blocks).to(tl.int64)
    i_s, first, steps, first_row = segment_of(start_ptr, i_row, sequences, length, SEGMENT, VARLEN)
    begin = (i_row - first_row) * SEGMENT
    if begin > 0:
        lane = tl.arange(0, LANES)[:, None]
        d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        across = lane * 0 + d
        mask = across < channels
        row = first * 0 if VARLEN else i_s
        p_g = g_ptr + row * g_stride_s + first * g_stride_t + across
        p_delta = delta_ptr + row * delta_stride_s + first * delta_stride_t + across
        if HAS_Z:
            p_z = z_ptr + row * z_stride_s + first * z_stride_t + across
        p_C = C_ptr + row * C_stride_s + first * C_stride_t + 4 * (lane + d * 0)
        a = ()
        carry = ()
        for i in tl.static_range(PER_LANE):
            n = 4 * LANES * (i // 4) + 4 * lane + i % 4
            a_i = tl.load(A_ptr + (n * channels + d), mask=mask, other=0.0).to(tl.float32)
            a = a + (a_i * LOG2_E,)
            carry = carry + (tl.full([LANES, BLOCK_D], 0.0, tl.float32),)
        total = tl.full([LANES, BLOCK_D], 0.0, tl.float32)
        bias = total
        if HAS_BIAS:
            bias = tl.load(bias_ptr + across * bias_stride, mask=mask, other=0.0).to(tl.float32)
        groups = (tl.maximum(tl.minimum(begin + SEGMENT, steps) - begin, 0) + STEPS - 1) // STEPS
        at = begin + (groups - 1) * STEPS
        raw_steps = _rows_of(p_delta, at, delta_stride_t, mask, steps, STEPS)
        gs = _rows_of(p_g, at, g_stride_t, mask, steps, STEPS)
        zs = gs
        if HAS_Z:
            zs = _rows_of(p_z, at, z_stride_t, mask, steps, STEPS)
        for i_back_group in range(groups):
            at = begin + (groups - 1 - i_back_group) * STEPS
            next_steps = _rows_of(p_delta, at - STEPS, delta_stride_t, mask, steps, STEPS)
            next_gs = _rows_of(p_g, at - STEPS, g_stride_t, mask, steps, STEPS)
            next_zs = next_gs
            if HAS_Z:
                next_zs = _rows_of(p_z, at - STEPS, z_stride_t, mask, steps, STEPS)
            for s in tl.static_range(STEPS - 1, -1, -1):
                delta = raw_steps[s].to(tl.float32)
                if HAS_BIAS:
                    delta = delta + bias
                if SOFTPLUS:
                    delta = softplus(delta)
                if HAS_BIAS or SOFTPLUS:
                    delta = tl.where(at + s < steps, delta, 0.0)  # a step of no length: the decay is one
                g = gs[s].to(tl.float32)
                if HAS_Z:
                    z = zs[s].to(tl.float32)
                    g = g * (z * sigmoid(z))
                c = states_of(p_C, tl.minimum(at + s, steps - 1), C_stride_t, LANES, PER_LANE)
                before = ()
                for i in tl.static_range(PER_LANE):
                    before = before + (tl.fma(c[i], g, carry[i]) * ex2(a[i] * delta),)
                carry = before
                total += delta
            raw_steps = next_steps
            gs = next_gs
            zs = next_zs
        p_carry = carry_ptr + i_row * (N + 1) * channels + across
        for i in tl.static_range(PER_LANE):
            n = 4 * LANES * (i // 4) + 4 * lane + i % 4
            tl.store(p_carry + n * channels, carry[i], mask=mask)
        tl.store(p_carry + N * channels, total, mask=mask)


@jit_by_type
@no_type_check  # a Triton kernel's body is not Python
def hand_on_kernel(
    A_ptr,  # [N, D] contiguous
    final_ptr,  # [S, D, N] or None, in: the gradient of the final states
    start_ptr,  # [S + 1] int, or None: dense
    carry_ptr,  # [segments, N + 1, D] float32 contiguous: in, what carry_kernel wrote; out, what the state before a
    # segment gets from all that is behind
    length: tl.int32,
    sequences: tl.int32,
    channels: tl.int32,
    final_stride_s: tl.int64, final_stride_d: tl.int64, final_stride_n: tl.int64,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_FINAL: tl.constexpr,
):  # fmt: skip
    i_s = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(2)
    mask = d < channels
    if VARLEN:
        first = tl.load(start_ptr + i_s).to(tl.int64)
        steps = tl.load(start_ptr + i_s + 1).to(tl.int64) - first
        first_row = first // SEGMENT + i_s
    else:
        steps = i_s * 0 + length
        first_row = i_s * ((length - 1) // SEGMENT + 1)
    segments = (steps + SEGMENT - 1) // SEGMENT
    a = tl.load(A_ptr + n * channels + d, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    carry = tl.full([BLOCK], 0.0, tl.float32)
    if HAS_FINAL:
        p_final = final_ptr + i_s * final_stride_s + d * final_stride_d + n * final_stride_n
        carry = tl.load(p_final, mask=mask, other=0.0).to(tl.float32)
    for i_behind in range(segments - 1):
        p_segment = carry_ptr + (first_row + segments - 1 - i_behind) * (N + 1) * channels + d
        total = tl.load(p_segment + N * channels, mask=mask, other=0.0)
        own = tl.load(p_segment + n * channels, mask=mask, other=0.0)
        carry = tl.fma(ex2(a * total), carry, own)
        tl.store(p_segment + n * channels, carry, mask=mask)
