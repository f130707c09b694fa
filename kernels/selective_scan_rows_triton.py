"""The selective scan for the layout that a mixer has: channels contiguous, B and C one group, N a power of two.

One warp runs one (sequence, block of channels), a thread ``BLOCKS`` channels with all their states as scalars in
registers: no state is ever exchanged, B and C arrive four states a load, addresses are constants, and per token and
channel a thread issues five instructions a state (a decay's exponent and exponential, the input's product, the state,
the output's sum) and about thirty others. Where that makes too few warps to hide anything (few sequences),
``selective_scan_tiles_triton`` takes over.

Bits are those of ``selective_scan_triton``: the sum over states is cut and added in one order everywhere.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc"

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from tp_mamba.kernels.approx_triton import LOG2_E
from tp_mamba.kernels.ssm_token_triton import first_saved_row, jit_by_type, token_of_states


@triton.jit
def _load_rows(
    u_ptr, delta_ptr, z_ptr, i: tl.constexpr, mask,
    u_stride_t: tl.constexpr, delta_stride_t: tl.constexpr, z_stride_t: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    """``u, delta, z [1, BLOCK_D]`` of the i-th token from here, for each block; without a gate, u stands in for z."""
    rows = ()
    for k in tl.static_range(BLOCKS):
        u = tl.load(u_ptr + (i * u_stride_t + k * BLOCK_D), mask=mask[k])
        delta = tl.load(delta_ptr + (i * delta_stride_t + k * BLOCK_D), mask=mask[k])
        z = u
        if HAS_Z:
            z = tl.load(z_ptr + (i * z_stride_t + k * BLOCK_D), mask=mask[k])
        rows = rows + ((u, delta, z),)  # noqa: RUF005 - Triton has no unpacking
    return rows


@triton.jit
def _load_states(ptr, four, offset: tl.constexpr, N: tl.constexpr):
    """A token's B or C, a tuple of N tensors ``[1, BLOCK_D]`` float32; four states in each load."""
    FOUR: tl.constexpr = (
        ptr.dtype.element_ty.primitive_bitwidth // 2
    )  # bytes; the launcher has seen to alignment
    states = ()
    for m in tl.static_range(N // 4):
        x = tl.load(tl.multiple_of(ptr + offset + m * 4, FOUR) + four).to(tl.float32)
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 2, 2]))
        s0, s2 = tl.split(even)
        s1, s3 = tl.split(odd)
        states = states + (s0, s1, s2, s3)  # noqa: RUF005 - Triton has no unpacking
    return states


@triton.jit
def _tokens(
    h, a, skip, bias, rows, b, c, out_ptr, inside,
    N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """One token of every block of channels: its output is stored, the states after it are returned."""
    after = ()
    for k in tl.static_range(BLOCKS):
        u, delta, z = rows[k]
        h_k, y = token_of_states(
            h[k], a[k], skip[k], bias[k], u, delta, z, b, c, N, HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS
        )  # fmt: skip
        tl.store(out_ptr + k * BLOCK_D, y.to(out_ptr.dtype.element_ty), mask=inside[k])
        after = after + (h_k,)  # noqa: RUF005
    return after


@triton.jit
def _save_due(
    saved_ptr, left, every, h, d, inside, channels,
    TOKENS: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Before ``TOKENS`` tokens: if none is left until states are due, store them; ``(their next row, tokens left)``."""
    if left == 0:
        for k in tl.static_range(BLOCKS):
            for n in tl.static_range(N):
                tl.store(saved_ptr + (n * channels + d + k * BLOCK_D), h[k][n], mask=inside[k])
        saved_ptr += channels.to(tl.int64) * N
        left = every
    return saved_ptr, left - TOKENS


@jit_by_type
@no_type_check  # a Triton kernel's body is not Python
def selective_scan_rows_kernel(
    u_ptr,  # [B, L, D] or [T, D], any float, in
    delta_ptr,  # as u
    z_ptr,  # as u, or None
    out_ptr,  # as u, out
    A_ptr,  # [D, N]
    B_ptr,  # [B, L, N] or [T, N]
    C_ptr,  # as B
    D_ptr,  # [D] or None
    bias_ptr,  # [D] or None
    state_ptr,  # [slots, D, N] or None, in and out
    last_ptr,  # [S, D, N] float32 contiguous, or None, out
    saved_ptr,  # [rows, N, D] float32 contiguous, or None, out
    start_ptr,  # [S + 1] int, or None: dense
    slot_ptr,  # [S] int, or None: slot s for sequence s
    initial_ptr,  # [S] bool, or None: no sequence has one
    length: tl.int32,  # of every sequence of a dense batch
    channels: tl.int32,
    pad_slot_id: tl.int64,
    u_stride_s: tl.int64, delta_stride_s: tl.int64, z_stride_s: tl.int64, out_stride_s: tl.int64,
    A_stride_d: tl.int64, A_stride_n: tl.int64, B_stride_s: tl.int64, C_stride_s: tl.int64,
    D_stride: tl.int64, bias_stride: tl.int64,
    state_stride_s: tl.int64, state_stride_d: tl.int64, state_stride_n: tl.int64,
    save_every: tl.int64,  # where states are saved a multiple of STEPS: only a group's first token can be due
    # A model has one of each, whatever the batch: as constants they cost no instruction.
    u_stride_t: tl.constexpr, delta_stride_t: tl.constexpr, z_stride_t: tl.constexpr,
    out_stride_t: tl.constexpr, B_stride_t: tl.constexpr, C_stride_t: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCKS: tl.constexpr,  # of channels, which share one load of B and C
    EVEN_D: tl.constexpr,  # BLOCKS * BLOCK_D divides channels
    STEPS: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_LAST: tl.constexpr,
    HAS_SAVED: tl.constexpr,
):  # fmt: skip
    FOUR_B: tl.constexpr = B_ptr.dtype.element_ty.primitive_bitwidth // 2  # bytes of four states
    FOUR_C: tl.constexpr = C_ptr.dtype.element_ty.primitive_bitwidth // 2
    i_s = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * (BLOCKS * BLOCK_D) + tl.arange(0, BLOCK_D)[None, :]
    inside = ()
    for k in tl.static_range(BLOCKS):
        inside = inside + ((d >= 0) if EVEN_D else (d + k * BLOCK_D < channels),)  # noqa: RUF005

    if VARLEN:
        first = tl.load(start_ptr + i_s).to(tl.int64)
        steps = (tl.load(start_ptr + i_s + 1).to(tl.int64) - first).to(tl.int32)
        row = first * 0
    else:
        first = i_s * 0
        steps = length
        row = i_s
    u_ptr += row * u_stride_s + first * u_stride_t + d
    delta_ptr += row * delta_stride_s + first * delta_stride_t + d
    out_ptr += row * out_stride_s + first * out_stride_t + d
    if HAS_Z:
        z_ptr += row * z_stride_s + first * z_stride_t + d
    four = tl.full([1, BLOCK_D, 1], 0, tl.int32) + tl.arange(0, 4)[None, None, :]
    B_ptr = tl.multiple_of(B_ptr + row * B_stride_s + first * B_stride_t, FOUR_B)
    C_ptr = tl.multiple_of(C_ptr + row * C_stride_s + first * C_stride_t, FOUR_C)

    a = ()
    h = ()
    zero = tl.full([1, BLOCK_D], 0.0, tl.float32)
    keeps = HAS_STATE
    starts = False
    if HAS_STATE:
        slot = i_s
        if HAS_SLOTS:
            slot = tl.load(slot_ptr + i_s).to(tl.int64)
            keeps = slot != pad_slot_id
        if HAS_INITIAL:
            starts = keeps & (tl.load(initial_ptr + i_s) != 0)
        state_ptr += slot * state_stride_s + d * state_stride_d
    skip = ()
    bias = ()
    for k in tl.static_range(BLOCKS):
        a_k = ()
        h_k = ()
        for n in tl.static_range(N):
            p_a = A_ptr + (d + k * BLOCK_D) * A_stride_d + n * A_stride_n
            a_k = a_k + (tl.load(p_a, mask=inside[k], other=0.0).to(tl.float32) * LOG2_E,)  # noqa: RUF005
            s = zero
            if HAS_INITIAL:
                p_h = state_ptr + k * BLOCK_D * state_stride_d + n * state_stride_n
                s = tl.load(p_h, mask=inside[k] & starts, other=0.0).to(tl.float32)
            h_k = h_k + (s,)  # noqa: RUF005
        a = a + (a_k,)  # noqa: RUF005
        h = h + (h_k,)  # noqa: RUF005
        skip_k = tl.full([1, BLOCK_D], 0.0, tl.float32)
        bias_k = skip_k
        if HAS_D:
            skip_k = tl.load(D_ptr + (d + k * BLOCK_D) * D_stride, mask=inside[k], other=0.0).to(tl.float32)
        if HAS_BIAS:
            bias_k = tl.load(bias_ptr + (d + k * BLOCK_D) * bias_stride, mask=inside[k], other=0.0).to(
                tl.float32
            )
        skip = skip + (skip_k,)  # noqa: RUF005
        bias = bias + (bias_k,)  # noqa: RUF005

    if HAS_SAVED:
        saved_ptr += first_saved_row(i_s, first, length, save_every, VARLEN) * channels * N
        every = tl.minimum(save_every, steps).to(tl.int32)
        left = every * 0

    # Whole groups of STEPS tokens, the next group's rows loaded before this one's are used; then what is left.
    groups = steps // STEPS
    rows = ()
    any_group = ()
    for k in tl.static_range(BLOCKS):
        any_group = any_group + (inside[k] & (groups > 0),)  # noqa: RUF005
    for i in tl.static_range(STEPS):
        rows = rows + (  # noqa: RUF005
            _load_rows(
                u_ptr, delta_ptr, z_ptr, i, any_group, u_stride_t, delta_stride_t, z_stride_t, BLOCK_D, BLOCKS, HAS_Z
            ),
        )  # fmt: skip
    for g in range(groups):
        if HAS_SAVED:  # before the next group's loads, whose registers are still free
            saved_ptr, left = _save_due(
                saved_ptr, left, every, h, d, inside, channels, STEPS, N, BLOCK_D, BLOCKS
            )  # fmt: skip
        # The last group loads itself once more: cheaper than masks, whose loads have to be zeroed first.
        step = (g + 1 < groups).to(tl.int64) * STEPS
        u_ptr += step * u_stride_t
        delta_ptr += step * delta_stride_t
        if HAS_Z:
            z_ptr += step * z_stride_t
        rows_ahead = ()
        for i in tl.static_range(STEPS):
            rows_ahead = rows_ahead + (  # noqa: RUF005
                _load_rows(
                    u_ptr,
                    delta_ptr,
                    z_ptr,
                    i,
                    inside,
                    u_stride_t,
                    delta_stride_t,
                    z_stride_t,
                    BLOCK_D,
                    BLOCKS,
                    HAS_Z,
                ),
            )
        for i in tl.static_range(STEPS):
            b = _load_states(B_ptr, four, i * B_stride_t, N)
            c = _load_states(C_ptr, four, i * C_stride_t, N)
            h = _tokens(
                h, a, skip, bias, rows[i], b, c, out_ptr + i * out_stride_t, inside,
                N, BLOCK_D, BLOCKS, HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS,
            )  # fmt: skip
        rows = rows_ahead
        out_ptr += STEPS * out_stride_t
        B_ptr += STEPS * B_stride_t
        C_ptr += STEPS * C_stride_t
    done = (groups > 0).to(tl.int64) * STEPS
    u_ptr += done * u_stride_t
    delta_ptr += done * delta_stride_t
    if HAS_Z:
        z_ptr += done * z_stride_t
    for _ in range(steps - groups * STEPS):
        if HAS_SAVED:
            saved_ptr, left = _save_due(saved_ptr, left, every, h, d, inside, channels, 1, N, BLOCK_D, BLOCKS)
        last_rows = _load_rows(
            u_ptr, delta_ptr, z_ptr, 0, inside, u_stride_t, delta_stride_t, z_stride_t, BLOCK_D, BLOCKS, HAS_Z
        )
        b = _load_states(B_ptr, four, 0, N)
        c = _load_states(C_ptr, four, 0, N)
        h = _tokens(
            h, a, skip, bias, last_rows, b, c, out_ptr, inside,
            N, BLOCK_D, BLOCKS, HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS,
        )  # fmt: skip
        u_ptr += u_stride_t
        delta_ptr += delta_stride_t
        out_ptr += out_stride_t
        if HAS_Z:
            z_ptr += z_stride_t
        B_ptr += B_stride_t
        C_ptr += C_stride_t

    for k in tl.static_range(BLOCKS):
        for n in tl.static_range(N):
            s = h[k][n]
            if HAS_STATE:
                p_h = state_ptr + k * BLOCK_D * state_stride_d + n * state_stride_n
                tl.store(p_h, s.to(state_ptr.dtype.element_ty), mask=inside[k] & keeps)
            if HAS_LAST:
                tl.store(last_ptr + (i_s * channels + d + k * BLOCK_D) * N + n, s, mask=inside[k])
