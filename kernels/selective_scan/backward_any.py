"""The backward of the selective scan for any layout: any strides, groups, any number of states up to 256.

One program runs one (sequence, block of channels of a group) from the last token to the first, a token at a time, with
the states of the block as a tile. The states within a stretch come from the saved state before it, in two steps, each
forward through memory of the program's own: first the state before every group of STEPS tokens, then that before every
token of a group. Sums over channels and tokens are partial sums, as in ``backward_mixer.py``.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc"

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.approximations import LN_2, LOG2_E, ex2, sigmoid, softplus, softplus_slope
from tp_mamba.kernels.common.dialect import add, jit_by_type
from tp_mamba.kernels.common.recurrence import sum_over_states
from tp_mamba.kernels.selective_scan.arguments import ScanBackward, ScanGradients
from tp_mamba.kernels.selective_scan.backward_operands import flags_of, memory, strides_of, tensors_of
from tp_mamba.kernels.selective_scan.launch import any_backward_plan
from tp_mamba.kernels.selective_scan.mixer import first_saved_row
from tp_mamba.kernels.selective_scan.operands import by_group, by_token
from tp_mamba.kernels.selective_scan.tiles import zero_tokens


@triton.jit
def _time_step(delta, bias, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    delta = delta.to(tl.float32)
    if HAS_BIAS:
        delta = delta + bias
    if SOFTPLUS:
        delta = softplus(delta)
    return delta


@triton.jit
def _advance(
    h, a, bias, u_ptr, delta_ptr, B_ptr, t, u_stride_t, delta_stride_t, B_stride_t, d_mask, b_mask,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """The states ``[BLOCK_N, BLOCK_D]`` after token t."""
    u = tl.load(u_ptr + t * u_stride_t, mask=d_mask, other=0.0).to(tl.float32)
    delta = _time_step(
        tl.load(delta_ptr + t * delta_stride_t, mask=d_mask, other=0.0), bias, HAS_BIAS, SOFTPLUS
    )
    b = tl.load(B_ptr + t * B_stride_t, mask=b_mask, other=0.0).to(tl.float32)
    return tl.fma(ex2(a * delta[None, :]), h, b * (delta * u)[None, :])


@jit_by_type
@no_type_check  # a Triton kernel's body is not Python
def selective_scan_backward_any_kernel(
    g_ptr,  # [B, D, L] or [D, T], any float, in: the gradient of the output
    u_ptr,  # as g
    delta_ptr,  # as g
    z_ptr,  # as g, or None
    A_ptr,  # [D, N]
    B_ptr,  # [B, G, N, L] or [G, N, T]
    C_ptr,  # as B
    D_ptr,  # [D] or None
    bias_ptr,  # [D] or None
    saved_ptr,  # [rows, N, D] float32 contiguous, in: the state before every GROUPS * STEPS-th token of a sequence
    scratch_ptr,  # [S, GROUPS + STEPS, N, D] float32 contiguous, for the states within a stretch
    final_ptr,  # [S, D, N] or None, in: the gradient of the final states
    start_ptr,  # [S + 1] int, or None: dense
    du_ptr,  # as u, out
    ddelta_ptr,  # as delta, out
    dz_ptr,  # as z, or None, out
    dbc_ptr,  # [blocks of a group, B * L or T, G, 2, N] float32 contiguous, out
    sums_ptr,  # [S, N + 2, D] float32 contiguous, out: dA by state, dD, d(bias) of each sequence
    dh_ptr,  # [S, D, N] float32 or None, out: the gradient of the initial states
    length: tl.int32,  # of every sequence of a dense batch; of a packed one, T
    sequences: tl.int32,
    channels: tl.int32,
    group_size: tl.int32,  # channels that share one B and C
    blocks: tl.int32,  # of a group
    g_stride_s: tl.int64, g_stride_t: tl.int64, g_stride_d: tl.int64,
    u_stride_s: tl.int64, u_stride_t: tl.int64, u_stride_d: tl.int64,
    delta_stride_s: tl.int64, delta_stride_t: tl.int64, delta_stride_d: tl.int64,
    z_stride_s: tl.int64, z_stride_t: tl.int64, z_stride_d: tl.int64,
    du_stride_s: tl.int64, du_stride_t: tl.int64, du_stride_d: tl.int64,
    ddelta_stride_s: tl.int64, ddelta_stride_t: tl.int64, ddelta_stride_d: tl.int64,
    dz_stride_s: tl.int64, dz_stride_t: tl.int64, dz_stride_d: tl.int64,
    A_stride_d: tl.int64, A_stride_n: tl.int64,
    B_stride_s: tl.int64, B_stride_t: tl.int64, B_stride_g: tl.int64, B_stride_n: tl.int64,
    C_stride_s: tl.int64, C_stride_t: tl.int64, C_stride_g: tl.int64, C_stride_n: tl.int64,
    D_stride: tl.int64, bias_stride: tl.int64,
    final_stride_s: tl.int64, final_stride_d: tl.int64, final_stride_n: tl.int64,
    dh_stride_s: tl.int64, dh_stride_d: tl.int64, dh_stride_n: tl.int64,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    GROUPS: tl.constexpr,  # of STEPS tokens, from one saved state to the next
    VARLEN: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    i_s = tl.program_id(0).to(tl.int64)
    i_g = (tl.program_id(1) // blocks).to(tl.int64)
    i_block = (tl.program_id(1) % blocks).to(tl.int64)
    d_group = i_block * BLOCK_D + tl.arange(0, BLOCK_D)
    d = i_g * group_size + d_group
    n = tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
    d_mask = d_group < group_size
    n_mask = n < N
    nd_mask = n_mask & d_mask[None, :]
    groups_of_channels = (channels // group_size).to(tl.int64)

    if VARLEN:
        first = tl.load(start_ptr + i_s).to(tl.int64)
        steps = (tl.load(start_ptr + i_s + 1).to(tl.int64) - first).to(tl.int32)
        row = first * 0
        tokens = length.to(tl.int64)
        dbc_row = first
    else:
        first = i_s * 0
        steps = length
        row = i_s
        tokens = length.to(tl.int64) * sequences
        dbc_row = i_s * length
    du_ptr += row * du_stride_s + d * du_stride_d
    ddelta_ptr += row * ddelta_stride_s + d * ddelta_stride_d
    if HAS_Z:
        dz_ptr += row * dz_stride_s + d * dz_stride_d
    if VARLEN:
        if i_s == 0:
            zero_tokens(du_ptr, du_stride_t, first * 0, first, d_mask)
            zero_tokens(ddelta_ptr, ddelta_stride_t, first * 0, first, d_mask)
            if HAS_Z:
                zero_tokens(dz_ptr, dz_stride_t, first * 0, first, d_mask)
        if i_s == sequences - 1:
            zero_tokens(du_ptr, du_stride_t, first + steps, tokens, d_mask)
            zero_tokens(ddelta_ptr, ddelta_stride_t, first + steps, tokens, d_mask)
            if HAS_Z:
                zero_tokens(dz_ptr, dz_stride_t, first + steps, tokens, d_mask)
    du_ptr += first * du_stride_t
    ddelta_ptr += first * ddelta_stride_t
    g_ptr += row * g_stride_s + first * g_stride_t + d * g_stride_d
    u_ptr += row * u_stride_s + first * u_stride_t + d * u_stride_d
    delta_ptr += row * delta_stride_s + first * delta_stride_t + d * delta_stride_d
    if HAS_Z:
        dz_ptr += first * dz_stride_t
        z_ptr += row * z_stride_s + first * z_stride_t + d * z_stride_d
    B_ptr += row * B_stride_s + first * B_stride_t + i_g * B_stride_g + n * B_stride_n
    C_ptr += row * C_stride_s + first * C_stride_t + i_g * C_stride_g + n * C_stride_n
    dbc_row_size = groups_of_channels * (2 * N)
    dbc_ptr += (i_block * tokens + dbc_row) * dbc_row_size + i_g * (2 * N) + tl.arange(0, BLOCK_N)
    row_size = channels.to(tl.int64) * N
    tile = n * channels + d[None, :]
    saved_ptr += first_saved_row(i_s, first, length, GROUPS * STEPS, VARLEN) * row_size + tile
    scratch_ptr += i_s * (GROUPS + STEPS) * row_size + tile
    of_token_ptr = scratch_ptr + GROUPS * row_size

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
    carry = tl.full([BLOCK_N, BLOCK_D], 0.0, tl.float32)  # what the state before the tokens seen so far gets
    dA = carry
    dD = tl.full([BLOCK_D], 0.0, tl.float32)
    dbias = dD
    if HAS_FINAL:
        p_final = final_ptr + i_s * final_stride_s + d[None, :] * final_stride_d + n * final_stride_n
        carry = tl.load(p_final, mask=nd_mask, other=0.0).to(tl.float32)

    stretches = (steps + GROUPS * STEPS - 1) // (GROUPS * STEPS)
    for i_stretch in range(stretches):
        begin = (stretches - 1 - i_stretch) * (GROUPS * STEPS)
        groups = (tl.minimum(steps - begin, GROUPS * STEPS) + STEPS - 1) // STEPS
        h = tl.load(saved_ptr + (stretches - 1 - i_stretch) * row_size, mask=nd_mask, other=0.0)
        tl.store(scratch_ptr, h, mask=nd_mask)
        for i in range(1, groups):
            for j in range(STEPS):
                h = _advance(
                    h, a, bias, u_ptr, delta_ptr, B_ptr, begin + (i - 1) * STEPS + j, u_stride_t, delta_stride_t,
                    B_stride_t, d_mask, n_mask, HAS_BIAS, SOFTPLUS,
                )  # fmt: skip
            tl.store(scratch_ptr + i * row_size, h, mask=nd_mask)
        for i_back in range(groups):
            i_group = groups - 1 - i_back
            tl.debug_barrier()
            h = tl.load(scratch_ptr + i_group * row_size, mask=nd_mask, other=0.0)
            at = begin + i_group * STEPS
            count = tl.minimum(steps - at, STEPS)
            tl.store(of_token_ptr, h, mask=nd_mask)
            for j in range(1, count):
                h = _advance(
                    h, a, bias, u_ptr, delta_ptr, B_ptr, at + j - 1, u_stride_t, delta_stride_t, B_stride_t, d_mask,
                    n_mask, HAS_BIAS, SOFTPLUS,
                )  # fmt: skip
                tl.store(of_token_ptr + j * row_size, h, mask=nd_mask)
            tl.debug_barrier()
            for j_back in range(count):
                t = at + count - 1 - j_back
                before = tl.load(of_token_ptr + (count - 1 - j_back) * row_size, mask=nd_mask, other=0.0)
                u = tl.load(u_ptr + t * u_stride_t, mask=d_mask, other=0.0).to(tl.float32)
                x = tl.load(delta_ptr + t * delta_stride_t, mask=d_mask, other=0.0)
                g = tl.load(g_ptr + t * g_stride_t, mask=d_mask, other=0.0).to(tl.float32)
                b = tl.load(B_ptr + t * B_stride_t, mask=n_mask, other=0.0).to(tl.float32)
                c = tl.load(C_ptr + t * C_stride_t, mask=n_mask, other=0.0).to(tl.float32)
                delta = _time_step(x, bias, HAS_BIAS, SOFTPLUS)
                du = delta * u
                decay = ex2(a * delta[None, :])
                h = tl.fma(decay, before, b * du[None, :])
                gated = g
                if HAS_Z:
                    z = tl.load(z_ptr + t * z_stride_t, mask=d_mask, other=0.0).to(tl.float32)
                    gate = sigmoid(z)
                    gated = g * (z * gate)
                    y = sum_over_states(h, tl.broadcast_to(c, [BLOCK_N, BLOCK_D]), BLOCK_N, BLOCK_D)
                    if HAS_D:
                        y = tl.fma(u, skip, y)
                    dz = g * y * (gate * tl.fma(z, 1.0 - gate, 1.0))
                    tl.store(dz_ptr + t * dz_stride_t, dz.to(dz_ptr.dtype.element_ty), mask=d_mask)
                lam = tl.fma(tl.broadcast_to(c, [BLOCK_N, BLOCK_D]), gated[None, :], carry)  # what h gets
                p_dbc = dbc_ptr + t * dbc_row_size
                of_n = tl.arange(0, BLOCK_N) < N
                tl.store(p_dbc, tl.reduce(lam * du[None, :], 1, add), mask=of_n)
                tl.store(p_dbc + N, tl.reduce(h * gated[None, :], 1, add), mask=of_n)
                dx = sum_over_states(lam, tl.broadcast_to(b, [BLOCK_N, BLOCK_D]), BLOCK_N, BLOCK_D)
                carry = lam * decay
                e = carry * before
                dA = tl.fma(e, tl.broadcast_to(delta[None, :], [BLOCK_N, BLOCK_D]), dA)
                d_dt = tl.fma(dx, u, sum_over_states(e, a, BLOCK_N, BLOCK_D) * LN_2)
                if SOFTPLUS:
                    x = x.to(tl.float32)
                    if HAS_BIAS:
                        x = x + bias
                    d_dt = d_dt * softplus_slope(x)
                grad_u = dx * delta
                if HAS_D:
                    grad_u = tl.fma(gated, skip, grad_u)
                    dD = tl.fma(gated, u, dD)
                if HAS_BIAS:
                    dbias += d_dt
                tl.store(du_ptr + t * du_stride_t, grad_u.to(du_ptr.dtype.element_ty), mask=d_mask)
                tl.store(ddelta_ptr + t * ddelta_stride_t, d_dt.to(ddelta_ptr.dtype.element_ty), mask=d_mask)
        tl.debug_barrier()

    sums_ptr += i_s * (N + 2) * channels
    tl.store(sums_ptr + tile, dA, mask=nd_mask)
    if HAS_D:
        tl.store(sums_ptr + N * channels + d, dD, mask=d_mask)
    if HAS_BIAS:
        tl.store(sums_ptr + (N + 1) * channels + d, dbias, mask=d_mask)
    if HAS_INITIAL:
        p_dh = dh_ptr + i_s * dh_stride_s + d[None, :] * dh_stride_d + n * dh_stride_n
        tl.store(p_dh, carry, mask=nd_mask)


def launch(call: ScanBackward, grads: ScanGradients) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel over (sequences, blocks of channels): ``dbc`` and ``sums``, partial sums to be added up."""
    (channels, n), groups = call.A.shape, call.B.shape[-3]
    plan = any_backward_plan(call.sequences, channels, n, groups, call.save_every)
    scratch, dbc, sums = memory(call, call.sequences, plan.groups + plan.steps, plan.blocks)
    packed = call.query_start_loc is not None
    tensors = (call.grad_out, call.u, call.delta, call.z, grads.u, grads.delta, grads.z)
    selective_scan_backward_any_kernel[plan.grid](
        *tensors_of(call, grads, call.grad_out, scratch, dbc, sums), call.u.shape[-1], call.sequences, channels,
        channels // groups, plan.blocks, *(stride for x in tensors for stride in by_token(x, packed)),
        *call.A.stride(), *by_group(call.B, packed), *by_group(call.C, packed), *strides_of(call, grads),
        N=n, BLOCK_N=plan.block_n, BLOCK_D=plan.block_d, STEPS=plan.steps, GROUPS=plan.groups,
        num_warps=plan.num_warps, enable_fp_fusion=False, **flags_of(call, grads),
    )  # fmt: skip
    return dbc, sums
