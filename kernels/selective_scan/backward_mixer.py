"""The backward of the selective scan for the layout that a mixer has, a segment of a sequence per program.

A program owns (segment, block of channels); what its last state gets from the segments behind is known before
(``backward_carry.py``). It walks its tokens backwards from one saved state to the one before it, STEPS at a time, with
what the states of the last token get in registers. It loads the state before the group, runs the recurrence forward
through it as the forward did, with the same bits, keeping the states of every token; then the recurrence of their
gradients backward. As in ``mixer.py``, LANES threads share a channel, and what is needed once per (token, channel) is
done on tiles. B and C every thread loads for itself, its own states' alone.

Sums over states, over a thread's own and then over lanes, come to the tiles by one change of layout per group. The
sums over channels, dB and dC, are taken over the block by one change of layout per PART tokens, in the order of a
binary tree, and stored as a partial sum; those over tokens, dA, dD and d(bias), stay in registers to the end of the
segment. ``partial_sums.py`` adds up the partial sums of blocks and of segments. No order depends on timing.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: RUF005 (Triton does not parse starred elements of a tuple)

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.approximations import LN_2, LOG2_E, sigmoid, softplus, softplus_slope
from tp_mamba.kernels.common.dialect import add, jit_by_type
from tp_mamba.kernels.common.integers import cdiv
from tp_mamba.kernels.selective_scan.arguments import ScanBackward, ScanGradients
from tp_mamba.kernels.selective_scan.backward_carry import carry_kernel, hand_on_kernel
from tp_mamba.kernels.selective_scan.backward_operands import flags_of, memory, strides_of, tensors_of
from tp_mamba.kernels.selective_scan.backward_tokens import (
    over_channels,
    over_lanes,
    state_forward,
    states_of,
    token_back,
    token_forward,
)
from tp_mamba.kernels.selective_scan.launch import STATE_SIZES, backward_plan
from tp_mamba.kernels.selective_scan.mixer import first_saved_row
from tp_mamba.kernels.selective_scan.operands import by_group, by_token, rows_aligned
from tp_mamba.kernels.selective_scan.segments import segment_of
from tp_mamba.kernels.selective_scan.tiles import computed_once, unstack, zero_tokens


@triton.jit
def _load(ptr, d_mask, ALL: tl.constexpr):
    return tl.load(ptr) if ALL else tl.load(ptr, mask=d_mask, other=0.0)


@jit_by_type
@no_type_check  # a Triton kernel's body is not Python
def selective_scan_backward_kernel(
    g_ptr,  # [B, L, D] or [T, D], any float, in: the gradient of the output
    u_ptr,  # as g
    delta_ptr,  # as g
    z_ptr,  # as g, or None
    A_ptr,  # [N, D] contiguous
    B_ptr,  # [B, L, N] or [T, N]
    C_ptr,  # as B
    D_ptr,  # [D] or None
    bias_ptr,  # [D] or None
    saved_ptr,  # [rows, N, D] float32 contiguous, in: the state before every GROUPS * STEPS-th token of a sequence
    scratch_ptr,  # [segments, GROUPS, N, D] float32 contiguous, for the states before the groups of a stretch
    final_ptr,  # [S, D, N] or None, in: the gradient of the final states
    start_ptr,  # [S + 1] int, or None: dense
    du_ptr,  # as u, out
    ddelta_ptr,  # as delta, out
    dz_ptr,  # as z, or None, out
    dbc_ptr,  # [blocks, B * L or T, 2, N] float32 contiguous, out: dB and dC of each block of channels
    sums_ptr,  # [segments, N + 2, D] float32 contiguous, out: dA by state, dD, d(bias) of each segment
    dh_ptr,  # [S, D, N] float32 or None, out: the gradient of the initial states
    carry_ptr,  # [segments, N + 1, D] float32 contiguous, in, or None: what the state before a segment gets
    length: tl.int32,  # of every sequence of a dense batch; of a packed one, T
    sequences: tl.int32,
    channels: tl.int32,
    g_stride_s: tl.int64, u_stride_s: tl.int64, delta_stride_s: tl.int64, z_stride_s: tl.int64,
    du_stride_s: tl.int64, ddelta_stride_s: tl.int64, dz_stride_s: tl.int64,
    B_stride_s: tl.int64, C_stride_s: tl.int64,
    D_stride: tl.int64, bias_stride: tl.int64,
    final_stride_s: tl.int64, final_stride_d: tl.int64, final_stride_n: tl.int64,
    dh_stride_s: tl.int64, dh_stride_d: tl.int64, dh_stride_n: tl.int64,
    # A model has one of each, whatever the batch: as constants they cost no instruction.
    g_stride_t: tl.constexpr, u_stride_t: tl.constexpr, delta_stride_t: tl.constexpr, z_stride_t: tl.constexpr,
    du_stride_t: tl.constexpr, ddelta_stride_t: tl.constexpr, dz_stride_t: tl.constexpr,
    B_stride_t: tl.constexpr, C_stride_t: tl.constexpr,
    N: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,  # BLOCK_D divides channels
    ALIGNED: tl.constexpr,  # every row that is read begins at a multiple of 16 bytes
    STEPS: tl.constexpr,
    GROUPS: tl.constexpr,  # of STEPS tokens, from one saved state to the next
    PART: tl.constexpr,
    STAGES: tl.constexpr,
    SEGMENT: tl.constexpr,  # tokens, a multiple of GROUPS * STEPS
    VARLEN: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_CARRY: tl.constexpr,
):  # fmt: skip
    PER_LANE: tl.constexpr = N // LANES
    BYTES: tl.constexpr = 16 if ALIGNED else 1
    COUNT: tl.constexpr = 2 * PART * PER_LANE
    blocks = (channels + BLOCK_D - 1) // BLOCK_D
    i_row = (tl.program_id(0) // blocks).to(tl.int64)
    i_d = (tl.program_id(0) % blocks).to(tl.int64)
    i_s, first, steps, first_row = segment_of(start_ptr, i_row, sequences, length, SEGMENT, VARLEN)
    first_token = ((i_row - first_row) * SEGMENT).to(tl.int32)
    end = tl.minimum(first_token + SEGMENT, steps)
    first_d = i_d * BLOCK_D
    d = first_d + tl.arange(0, BLOCK_D)[None, :]
    lane = tl.arange(0, LANES)[:, None]
    d_mask = d < channels
    t = tl.arange(0, STEPS)[:, None]
    d_tile = tl.arange(0, BLOCK_D)[None, :]

    if VARLEN:
        row = first * 0
        tokens = length.to(tl.int64)
        dbc_row = first
        if (i_s == 0) & (first_token == 0):
            zero_tokens(du_ptr + d, du_stride_t, first * 0, first, d_mask)
            zero_tokens(ddelta_ptr + d, ddelta_stride_t, first * 0, first, d_mask)
            if HAS_Z:
                zero_tokens(dz_ptr + d, dz_stride_t, first * 0, first, d_mask)
        if (i_s == sequences - 1) & (first_token == 0):
            zero_tokens(du_ptr + d, du_stride_t, first + steps, tokens, d_mask)
            zero_tokens(ddelta_ptr + d, ddelta_stride_t, first + steps, tokens, d_mask)
            if HAS_Z:
                zero_tokens(dz_ptr + d, dz_stride_t, first + steps, tokens, d_mask)
    else:
        row = i_s
        tokens = length.to(tl.int64) * sequences
        dbc_row = i_s * length
    g_ptr = tl.multiple_of(g_ptr + row * g_stride_s + first * g_stride_t + first_d, BYTES)
    u_ptr = tl.multiple_of(u_ptr + row * u_stride_s + first * u_stride_t + first_d, BYTES)
    delta_ptr = tl.multiple_of(delta_ptr + row * delta_stride_s + first * delta_stride_t + first_d, BYTES)
    du_ptr += row * du_stride_s + first * du_stride_t + first_d
    ddelta_ptr += row * ddelta_stride_s + first * ddelta_stride_t + first_d
    if HAS_Z:
        z_ptr = tl.multiple_of(z_ptr + row * z_stride_s + first * z_stride_t + first_d, BYTES)
        dz_ptr += row * dz_stride_s + first * dz_stride_t + first_d
    B_ptr += row * B_stride_s + first * B_stride_t
    C_ptr += row * C_stride_s + first * C_stride_t
    of_lane = 4 * (lane + tl.full([LANES, BLOCK_D], 0, tl.int32))
    dbc_ptr += (i_d * tokens + dbc_row) * (2 * N)
    saved_ptr += first_saved_row(i_s, first, length, GROUPS * STEPS, VARLEN) * channels * N
    scratch_ptr += i_row * GROUPS * channels * N

    a = ()
    carry = ()  # what the state before the tokens seen so far gets
    dA = ()
    for i in tl.static_range(PER_LANE):
        n = 4 * LANES * (i // 4) + 4 * lane + i % 4
        a_i = tl.load(A_ptr + (n * channels + d), mask=d_mask, other=0.0).to(tl.float32)
        carry_i = tl.full([LANES, BLOCK_D], 0.0, tl.float32)
        dA = dA + (carry_i,)
        if HAS_FINAL:
            p_final = final_ptr + i_s * final_stride_s + d * final_stride_d + n * final_stride_n
            carry_i = tl.load(p_final, mask=d_mask & (first_token + SEGMENT >= steps), other=0.0).to(
                tl.float32
            )
        if HAS_CARRY:
            p_carry = carry_ptr + ((i_row + 1) * (N + 1) + n) * channels + d
            carry_i += tl.load(p_carry, mask=d_mask & (first_token + SEGMENT < steps), other=0.0)
        a = a + (a_i * LOG2_E,)
        carry = carry + (carry_i,)
    skip = tl.full([1, BLOCK_D], 0.0, tl.float32)
    bias = skip
    if HAS_D:
        skip = tl.load(D_ptr + d * D_stride, mask=d_mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d * bias_stride, mask=d_mask, other=0.0).to(tl.float32)
    dD = tl.full([STEPS, BLOCK_D], 0.0, tl.float32)
    dbias = tl.full([STEPS, BLOCK_D], 0.0, tl.float32)

    # What a row of partial sums is of: lane, then token, B or C, and the lane's state.
    v = tl.arange(0, LANES * COUNT)
    v_state = v % PER_LANE
    v_n = 4 * LANES * (v_state // 4) + 4 * (v // COUNT) + v_state % 4
    v_t = v // (2 * PER_LANE) % PART
    v_tile = (v_t * 2 + v // PER_LANE % 2) * N + v_n

    zero = i_s * 0
    stretches = (tl.maximum(end - first_token, 0) + GROUPS * STEPS - 1) // (GROUPS * STEPS)
    for i_stretch in range(stretches):
        begin = first_token + (stretches - 1 - i_stretch) * (GROUPS * STEPS)
        groups = (tl.minimum(end - begin, GROUPS * STEPS) + STEPS - 1) // STEPS
        # Forward through the stretch, to the states before each of its groups.
        p_saved = saved_ptr + (zero + begin // (GROUPS * STEPS)) * channels * N
        h = ()
        for i in tl.static_range(PER_LANE):
            n = 4 * LANES * (i // 4) + 4 * lane + i % 4
            h_i = tl.load(p_saved + (n * channels + d), mask=d_mask, other=0.0)
            tl.store(scratch_ptr + (n * channels + d), h_i, mask=d_mask)
            h = h + (h_i,)
        for i_group in tl.range(groups - 1, num_stages=STAGES):
            at = zero + (begin + i_group * STEPS)
            p_u = tl.multiple_of(u_ptr + at * u_stride_t, BYTES)
            p_delta = tl.multiple_of(delta_ptr + at * delta_stride_t, BYTES)
            p_B = B_ptr + at * B_stride_t + of_lane
            u = _load(p_u + (t * u_stride_t + d_tile), d_mask, EVEN_D).to(tl.float32)
            delta = _load(p_delta + (t * delta_stride_t + d_tile), d_mask, EVEN_D).to(tl.float32)
            if HAS_BIAS:
                delta = delta + bias
            if SOFTPLUS:
                delta = softplus(delta)
            deltas = unstack(tl.trans(computed_once(delta, STEPS, BLOCK_D)), STEPS)
            dus = unstack(tl.trans(computed_once(delta * u, STEPS, BLOCK_D)), STEPS)
            for s in tl.static_range(STEPS):
                b = states_of(p_B, s, B_stride_t, LANES, PER_LANE)
                h = state_forward(h, a, b, deltas[s][None, :], dus[s][None, :], PER_LANE)
            p_scratch = scratch_ptr + (zero + (i_group + 1)) * channels * N
            for i in tl.static_range(PER_LANE):
                n = 4 * LANES * (i // 4) + 4 * lane + i % 4
                tl.store(p_scratch + (n * channels + d), h[i], mask=d_mask)
        tl.debug_barrier()

        for i_back_group in tl.range(groups, num_stages=STAGES):
            i_group = groups - 1 - i_back_group
            at = zero + (begin + i_group * STEPS)
            left = steps - begin - i_group * STEPS
            valid = t < left
            mask = valid if EVEN_D else valid & d_mask
            p_u = tl.multiple_of(u_ptr + at * u_stride_t, BYTES)
            p_delta = tl.multiple_of(delta_ptr + at * delta_stride_t, BYTES)
            p_g = tl.multiple_of(g_ptr + at * g_stride_t, BYTES)
            p_scratch = scratch_ptr + (zero + i_group) * channels * N
            u = tl.load(p_u + (t * u_stride_t + d_tile), mask=mask, other=0.0).to(tl.float32)
            delta = tl.load(p_delta + (t * delta_stride_t + d_tile), mask=mask, other=0.0).to(tl.float32)
            g = tl.load(p_g + (t * g_stride_t + d_tile), mask=mask, other=0.0).to(tl.float32)
            z = u
            if HAS_Z:
                p_z = tl.multiple_of(z_ptr + at * z_stride_t, BYTES)
                z = tl.load(p_z + (t * z_stride_t + d_tile), mask=mask, other=0.0).to(tl.float32)
            h = ()
            for i in tl.static_range(PER_LANE):
                n = 4 * LANES * (i // 4) + 4 * lane + i % 4
                h = h + (_load(p_scratch + (n * channels + d), d_mask, EVEN_D),)

            slope = delta
            if HAS_BIAS:
                delta = delta + bias
            if SOFTPLUS:
                slope = softplus_slope(delta)
                delta = softplus(delta)
            if HAS_BIAS or SOFTPLUS:
                delta = tl.where(valid, delta, 0.0)  # a step of no length: the decay is one, the input zero
            gated = g
            gate = g
            if HAS_Z:
                gate = sigmoid(z)
                gated = g * (z * gate)
            deltas = unstack(tl.trans(computed_once(delta, STEPS, BLOCK_D)), STEPS)
            dus = unstack(tl.trans(computed_once(delta * u, STEPS, BLOCK_D)), STEPS)
            gs = unstack(tl.trans(computed_once(gated, STEPS, BLOCK_D)), STEPS)

            # Forward through the group, with the arithmetic of ``common/recurrence.py``.
            states = h  # of token s those before it, from s * PER_LANE on
            decays = ()
            p_B = B_ptr + at * B_stride_t + of_lane
            p_C = C_ptr + at * C_stride_t + of_lane
            last = tl.minimum(left, STEPS) - 1  # what is behind the sequence gets no weight, and is not read
            for j in tl.static_range(STEPS):
                b = states_of(p_B, tl.minimum(last, j), B_stride_t, LANES, PER_LANE)
                states, decays = token_forward(
                    states, decays, a, b, deltas[j][None, :], dus[j][None, :], PER_LANE
                )

            # Back through it.
            dxs = ()
            dts = ()
            ys = ()
            for i_back in tl.static_range(STEPS // PART):
                products = ()
                for s in tl.static_range(STEPS - 1 - PART * i_back, STEPS - 1 - PART * (i_back + 1), -1):
                    b = states_of(p_B, tl.minimum(last, s), B_stride_t, LANES, PER_LANE)
                    c = states_of(p_C, tl.minimum(last, s), C_stride_t, LANES, PER_LANE)
                    delta_s = tl.broadcast_to(deltas[s][None, :], [LANES, BLOCK_D])
                    du_s = tl.broadcast_to(dus[s][None, :], [LANES, BLOCK_D])
                    g_s = tl.broadcast_to(gs[s][None, :], [LANES, BLOCK_D])
                    carry, dA, of_b, of_c, dx, dt, y = token_back(
                        carry, dA, a, states, decays, b, c, delta_s, du_s, g_s, s, PER_LANE
                    )
                    products = of_b + of_c + products
                    dxs = (dx,) + dxs
                    dts = (dt,) + dts
                    ys = (y,) + ys
                total = over_channels(products, COUNT, LANES, BLOCK_D)
                p_dbc = dbc_ptr + at * (2 * N) + (STEPS - PART * (i_back + 1)) * 2 * N + v_tile
                tl.store(p_dbc, total, mask=v_t + (STEPS - PART * (i_back + 1)) < left)
            dx = computed_once(over_lanes(dxs, STEPS, LANES, BLOCK_D), STEPS, BLOCK_D)
            dt = computed_once(over_lanes(dts, STEPS, LANES, BLOCK_D), STEPS, BLOCK_D)
            ddelta = tl.fma(dx, u, dt * LN_2)
            if SOFTPLUS:
                ddelta = ddelta * slope
            du = dx * delta
            if HAS_D:
                du = tl.fma(gated, tl.broadcast_to(skip, [STEPS, BLOCK_D]), du)
                dD = tl.fma(gated, u, dD)
            if HAS_BIAS:
                dbias += tl.where(valid, ddelta, 0.0)
            if HAS_Z:
                y = computed_once(over_lanes(ys, STEPS, LANES, BLOCK_D), STEPS, BLOCK_D)
                if HAS_D:
                    y = tl.fma(u, tl.broadcast_to(skip, [STEPS, BLOCK_D]), y)
                dz = g * y * (gate * tl.fma(z, 1.0 - gate, 1.0))
                p_dz = dz_ptr + at * dz_stride_t + (t * dz_stride_t + d_tile)
                tl.store(p_dz, dz.to(dz_ptr.dtype.element_ty), mask=mask)
            p_du = du_ptr + at * du_stride_t + (t * du_stride_t + d_tile)
            p_ddelta = ddelta_ptr + at * ddelta_stride_t + (t * ddelta_stride_t + d_tile)
            tl.store(p_du, du.to(du_ptr.dtype.element_ty), mask=mask)
            tl.store(p_ddelta, ddelta.to(ddelta_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()

    sums_ptr += i_row * (N + 2) * channels
    for i in tl.static_range(PER_LANE):
        n = 4 * LANES * (i // 4) + 4 * lane + i % 4
        tl.store(sums_ptr + n * channels + d, dA[i], mask=d_mask)
        if HAS_INITIAL:
            p_dh = dh_ptr + i_s * dh_stride_s + d * dh_stride_d + n * dh_stride_n
            tl.store(p_dh, carry[i], mask=d_mask & (first_token == 0))
    d = first_d + tl.arange(0, BLOCK_D)
    if HAS_D:
        tl.store(sums_ptr + N * channels + d, tl.reduce(dD, 0, add), mask=d < channels)
    if HAS_BIAS:
        tl.store(sums_ptr + (N + 1) * channels + d, tl.reduce(dbias, 0, add), mask=d < channels)


def serves(call: ScanBackward, grads: ScanGradients) -> bool:
    """Whether the kernel for a mixer's layout takes the call: contiguous channels, one group, B and C in fours."""
    by_channel = (call.u, call.delta, call.z, grads.u, grads.delta, grads.z)
    return (
        all(x is None or x.stride(-2) == 1 for x in by_channel)
        and call.B.shape[-3] == 1
        and call.A.shape[1] in STATE_SIZES
        and all(x.stride(-2) == 1 and rows_aligned(4 * x.element_size(), x) for x in (call.B, call.C))
    )


def launch(call: ScanBackward, grads: ScanGradients) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernels over (segments, blocks of channels): ``dbc`` and ``sums``, partial sums to be added up."""
    (channels, n), length = call.A.shape, call.u.shape[-1]
    packed = call.query_start_loc is not None
    plan = backward_plan(length, call.sequences, channels, n, call.save_every, packed)
    scratch, dbc, sums = memory(call, plan.segments, plan.groups, plan.blocks)
    grad_out = call.grad_out
    if grad_out.stride(-2) != 1:
        grad_out = torch.empty_like(call.u, dtype=grad_out.dtype).copy_(grad_out)
    call = call._replace(A=call.A.t().contiguous().t())  # read along channels, as states are
    tensors = (grad_out, call.u, call.delta, call.z, grads.u, grads.delta, grads.z)
    strides = [*(by_token(x, packed) for x in tensors), by_group(call.B, packed), by_group(call.C, packed)]
    of_sequence, of_token = [x[0] for x in strides], [x[1] for x in strides]
    flags = flags_of(call, grads)
    in_rows = [x for x in tensors[:4] if x is not None]
    of_call = {"N": n, "SEGMENT": plan.segment, "VARLEN": packed, "enable_fp_fusion": False}
    of_step = {name: flags[name] for name in ("HAS_Z", "HAS_BIAS", "SOFTPLUS")}
    sizes, carry = (length, call.sequences, channels), None
    if length > plan.segment:
        carry = call.u.new_empty(plan.segments, n + 1, channels, dtype=torch.float32)
        carry_kernel[(plan.segments * cdiv(channels, 32),)](
            grad_out, call.delta, call.z, call.A, call.C, call.delta_bias, call.query_start_loc, carry, *sizes,
            *(of_sequence[i] for i in (0, 2, 3, 8)), strides_of(call, grads)[1],
            *(of_token[i] for i in (0, 2, 3, 8)),
            LANES=max(1, n // 8), BLOCK_D=32, STEPS=4, num_warps=1, **of_call, **of_step,
        )  # fmt: skip
        hand_on_kernel[(call.sequences, cdiv(channels, 128), n)](
            call.A, call.grad_final, call.query_start_loc, carry, *sizes, *strides_of(call, grads)[2:5],
            BLOCK=128, HAS_FINAL=flags["HAS_FINAL"], **of_call,
        )  # fmt: skip
    selective_scan_backward_kernel[(plan.segments * plan.blocks,)](
        *tensors_of(call, grads, grad_out, scratch, dbc, sums), carry, *sizes,
        *of_sequence, *strides_of(call, grads), *of_token,
        LANES=plan.lanes, BLOCK_D=plan.block_d, EVEN_D=channels % plan.block_d == 0,
        ALIGNED=all(rows_aligned(16, x) for x in in_rows), STEPS=plan.steps, GROUPS=plan.groups, PART=plan.part,
        STAGES=plan.stages, HAS_CARRY=carry is not None, num_warps=plan.num_warps, maxnreg=plan.registers,
        **(flags | of_call),
    )  # fmt: skip
    return dbc, sums
