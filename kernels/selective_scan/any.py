"""The selective scan for any layout: any strides, groups, state sizes that are no power of two or above 32.

One program runs one (sequence, block of channels) from its first token to its last with the state in registers.
Sequence lengths are read on the device, so one launch serves any mix of lengths and the host never waits.

The arithmetic and its order are those of ``mixer.py``, so a token's bits depend on its inputs and the state before it,
not on the kernel, the launch, the batch or the cut that led to it.
"""

from __future__ import annotations

from typing import Any, no_type_check

import triton
import triton.language as tl

from tp_mamba.kernels.common.approximations import LOG2_E
from tp_mamba.kernels.common.dialect import jit_by_type
from tp_mamba.kernels.common.launches import Launch, launcher
from tp_mamba.kernels.common.recurrence import ssm_token
from tp_mamba.kernels.selective_scan.launch import any_plan
from tp_mamba.kernels.selective_scan.mixer import first_saved_row
from tp_mamba.kernels.selective_scan.operands import call_of, flags_of, strides_of


@triton.jit
def _load_rows(
    u_ptr, delta_ptr, z_ptr, token, u_stride_t, delta_stride_t, z_stride_t, mask, HAS_Z: tl.constexpr
):  # fmt: skip
    """``u, delta, z [BLOCK_D]`` of one token, zeros outside ``mask``; without a gate, u stands in for z."""
    u = tl.load(u_ptr + token * u_stride_t, mask=mask, other=0.0)
    delta = tl.load(delta_ptr + token * delta_stride_t, mask=mask, other=0.0)
    z = u
    if HAS_Z:
        z = tl.load(z_ptr + token * z_stride_t, mask=mask, other=0.0)
    return u, delta, z


@triton.jit
def _save_due(saved_ptr, left, every, h, offsets, mask, channels, N: tl.constexpr):
    """Before a token: if none is left until a state is due, store it; ``(its next row, tokens left until then)``."""
    if left == 0:
        tl.store(saved_ptr + offsets, h, mask=mask)
        saved_ptr += channels.to(tl.int64) * N
        left = every
    return saved_ptr, left - 1


@jit_by_type
@no_type_check  # a Triton kernel's body is not Python
def _selective_scan_kernel(
    u_ptr,  # [B, D, L] or [D, T], any float, in
    delta_ptr,  # as u
    z_ptr,  # as u, or None
    out_ptr,  # as u, out
    A_ptr,  # [D, N]
    B_ptr,  # [B, G, N, L] or [G, N, T]
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
    group_size: tl.int32,  # channels that share one B and C
    pad_slot_id: tl.int64,
    u_stride_s: tl.int64, u_stride_t: tl.int64, u_stride_d: tl.int64,
    delta_stride_s: tl.int64, delta_stride_t: tl.int64, delta_stride_d: tl.int64,
    z_stride_s: tl.int64, z_stride_t: tl.int64, z_stride_d: tl.int64,
    out_stride_s: tl.int64, out_stride_t: tl.int64, out_stride_d: tl.int64,
    A_stride_d: tl.int64, A_stride_n: tl.int64,
    B_stride_s: tl.int64, B_stride_t: tl.int64, B_stride_g: tl.int64, B_stride_n: tl.int64,
    C_stride_s: tl.int64, C_stride_t: tl.int64, C_stride_g: tl.int64, C_stride_n: tl.int64,
    D_stride: tl.int64, bias_stride: tl.int64,
    state_stride_s: tl.int64, state_stride_d: tl.int64, state_stride_n: tl.int64,
    save_every: tl.int64,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,  # u, delta, z and out have channel stride 1, B and C state stride 1
    ONE_GROUP: tl.constexpr,
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
    i_s = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
    d_mask = d < channels
    nd_mask = (n < N) & d_mask[None, :]

    if VARLEN:
        first = tl.load(start_ptr + i_s).to(tl.int64)
        steps = (tl.load(start_ptr + i_s + 1).to(tl.int64) - first).to(tl.int32)
        row = first * 0
    else:
        first = i_s * 0
        steps = length
        row = i_s
    if TOKEN_MAJOR:
        u_stride_d, delta_stride_d, z_stride_d, out_stride_d, B_stride_n, C_stride_n = 1, 1, 1, 1, 1, 1
    u_ptr += row * u_stride_s + first * u_stride_t + d * u_stride_d
    delta_ptr += row * delta_stride_s + first * delta_stride_t + d * delta_stride_d
    out_ptr += row * out_stride_s + first * out_stride_t + d * out_stride_d
    if HAS_Z:
        z_ptr += row * z_stride_s + first * z_stride_t + d * z_stride_d
    B_ptr += row * B_stride_s + first * B_stride_t + n * B_stride_n
    C_ptr += row * C_stride_s + first * C_stride_t + n * C_stride_n
    bc_mask = n < N
    if not ONE_GROUP:
        B_ptr += (d // group_size)[None, :] * B_stride_g
        C_ptr += (d // group_size)[None, :] * C_stride_g
        bc_mask = nd_mask

    # Padded states and channels have A = B = C = 0: their state stays zero and adds nothing.
    a = (
        tl.load(A_ptr + d[None, :] * A_stride_d + n * A_stride_n, mask=nd_mask, other=0.0).to(tl.float32)
        * LOG2_E
    )
    skip = tl.full([BLOCK_D], 0.0, tl.float32)
    bias = skip
    if HAS_D:
        skip = tl.load(D_ptr + d * D_stride, mask=d_mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d * bias_stride, mask=d_mask, other=0.0).to(tl.float32)

    h = tl.full([BLOCK_N, BLOCK_D], 0.0, tl.float32)
    keeps = HAS_STATE
    if HAS_STATE:
        slot = i_s
        if HAS_SLOTS:
            slot = tl.load(slot_ptr + i_s).to(tl.int64)
            keeps = slot != pad_slot_id
        state_ptr += slot * state_stride_s + d[None, :] * state_stride_d + n * state_stride_n
        if HAS_INITIAL:
            starts = keeps & (tl.load(initial_ptr + i_s) != 0)
            h = tl.load(state_ptr, mask=nd_mask & starts, other=0.0).to(tl.float32)
    if HAS_SAVED:
        saved_ptr += first_saved_row(i_s, first, length, save_every, VARLEN) * channels * N
        saved_at = n * channels + d[None, :]
        every = tl.minimum(save_every, steps).to(tl.int32)
        left = every * 0

    # Whole groups of STEPS tokens, the rows of the next group loaded before this one's are used; then what is left.
    # (B and C, a few hundred bytes that all channel blocks share, come from the cache and would not fit beside.)
    grouped = steps // STEPS * STEPS
    rows = ()
    for i in tl.static_range(STEPS):
        rows = rows + (  # noqa: RUF005 - Triton has no unpacking
            _load_rows(
                u_ptr, delta_ptr, z_ptr, i, u_stride_t, delta_stride_t, z_stride_t, d_mask & (i < grouped), HAS_Z
            ),
        )  # fmt: skip
    for t in range(0, grouped, STEPS):
        ahead = ()
        for i in tl.static_range(STEPS):
            ahead = ahead + (  # noqa: RUF005
                _load_rows(
                    u_ptr, delta_ptr, z_ptr, t + STEPS + i, u_stride_t, delta_stride_t, z_stride_t,
                    d_mask & (t + STEPS < grouped), HAS_Z,
                ),
            )  # fmt: skip
        for i in tl.static_range(STEPS):
            u, delta, z = rows[i]
            b = tl.load(B_ptr + (t + i) * B_stride_t, mask=bc_mask, other=0.0)
            c = tl.load(C_ptr + (t + i) * C_stride_t, mask=bc_mask, other=0.0)
            if HAS_SAVED:
                saved_ptr, left = _save_due(saved_ptr, left, every, h, saved_at, nd_mask, channels, N)
            h, y = ssm_token(
                h, a, skip, bias, u, delta, z, b, c, BLOCK_N, BLOCK_D, HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS
            )
            tl.store(out_ptr + (t + i) * out_stride_t, y.to(out_ptr.dtype.element_ty), mask=d_mask)
        rows = ahead
    for t in range(grouped, steps):
        u, delta, z = _load_rows(
            u_ptr, delta_ptr, z_ptr, t, u_stride_t, delta_stride_t, z_stride_t, d_mask, HAS_Z
        )  # fmt: skip
        b = tl.load(B_ptr + t * B_stride_t, mask=bc_mask, other=0.0)
        c = tl.load(C_ptr + t * C_stride_t, mask=bc_mask, other=0.0)
        if HAS_SAVED:
            saved_ptr, left = _save_due(saved_ptr, left, every, h, saved_at, nd_mask, channels, N)
        h, y = ssm_token(
            h, a, skip, bias, u, delta, z, b, c, BLOCK_N, BLOCK_D, HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS
        )
        tl.store(out_ptr + t * out_stride_t, y.to(out_ptr.dtype.element_ty), mask=d_mask)

    if HAS_STATE:
        tl.store(state_ptr, h.to(state_ptr.dtype.element_ty), mask=nd_mask & keeps)
    if HAS_LAST:
        tl.store(last_ptr + (i_s * channels + d[None, :]) * N + n, h, mask=nd_mask)


@launcher(tensors=15)
def launch(*arguments: Any) -> Launch | None:
    """Launch the kernel over (sequences, channel blocks) for the call that ``arguments_of`` gave these of."""
    call = call_of(*arguments)
    strides, (channels, n) = strides_of(call), call.A.shape
    sequences, groups = call.sequences, call.B.shape[-3]
    if sequences == 0 or channels == 0:
        return None
    plan, packed = any_plan(sequences, channels, n), call.query_start_loc is not None
    values = (
        0 if packed else call.u.shape[-1], channels, channels // groups, call.pad_slot_id,
        *strides.u, *strides.delta, *strides.z, *strides.out, *strides.A, *strides.B, *strides.C, *strides.rest,
        call.save_states_every,
    )  # fmt: skip
    constants = {
        "N": n, "BLOCK_N": plan.block_n, "BLOCK_D": plan.block_d, "STEPS": plan.steps,
        "TOKEN_MAJOR": strides.token_major, "ONE_GROUP": groups == 1, "num_warps": plan.num_warps,
        "enable_fp_fusion": False, **flags_of(call),
    }  # fmt: skip
    return Launch(_selective_scan_kernel, plan.grid, values, constants)
