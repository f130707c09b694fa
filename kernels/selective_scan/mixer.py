"""The selective scan for the layout that a mixer has: channels contiguous, B and C one group, N a power of two.

One warp runs one (sequence, block of channels); ``LANES`` threads share a channel, each with ``N / LANES`` of its
states in registers. What is needed once per (token, channel), not once per state (conversion, softplus, gate, skip,
loads and the store), is done on tiles of ``STEPS`` tokens in which threads hold different elements. Between a tile and
the recurrence lie changes of layout, each a trip through shared memory within a warp.

Where a scheduler has one or two warps, nothing hides a wait for memory but distance: the next two groups' tiles are in
flight into shared memory while one is computed. The recurrence reads them from there in the layout that it needs.

Bits are those of ``any.py``: the sum over states is cut and added in one order everywhere.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: RUF005 (Triton does not parse starred elements of a tuple)

from __future__ import annotations

from typing import Any, no_type_check

import triton
import triton.language as tl

from tp_mamba.kernels.common.approximations import LOG2_E, silu, softplus
from tp_mamba.kernels.common.device import device_properties
from tp_mamba.kernels.common.dialect import add, jit_by_type
from tp_mamba.kernels.common.launches import Launch, launcher
from tp_mamba.kernels.common.recurrence import recur
from tp_mamba.kernels.selective_scan.launch import STATE_SIZES, mixer_plan
from tp_mamba.kernels.selective_scan.operands import call_of, flags_of, rows_aligned, strides_of
from tp_mamba.kernels.selective_scan.tiles import by_state, computed_once, of_token, stack, unstack

GROUPS_IN_FLIGHT = tl.constexpr(3)
"""Groups of tokens in registers: the present one and those that are being loaded."""


@triton.jit
def first_saved_row(i_s, first, length, every, VARLEN: tl.constexpr):
    """The row of ``saved_states`` with the initial state of sequence ``i_s``, which begins at token ``first``."""
    return first // every + i_s if VARLEN else i_s * ((length - 1) // every + 1)


@triton.jit
def _group(
    h, a, skip, bias, u, delta, z, b, c, valid,
    MASKED: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, PER_LANE: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """STEPS tokens: ``(states after them, output [STEPS, BLOCK_D] float32)``.

    With MASKED, tokens that are not ``valid`` were loaded as zeros and leave the states as they are.
    """
    u = u.to(tl.float32)
    delta = delta.to(tl.float32)
    if HAS_BIAS:
        delta = delta + bias
    if SOFTPLUS:
        delta = computed_once(softplus(delta), STEPS, BLOCK_D)
    if MASKED and (HAS_BIAS or SOFTPLUS):
        delta = tl.where(valid, delta, 0.0)  # a step of no length: the decay is one, the input zero
    deltas = unstack(tl.trans(delta), STEPS)
    dus = unstack(tl.trans(delta * u), STEPS)
    b = by_state(b, STEPS, LANES, PER_LANE)
    c = by_state(c, STEPS, LANES, PER_LANE)
    ys = ()
    for s in tl.static_range(STEPS):
        h, y = recur(
            h, a, deltas[s][None, :], dus[s][None, :],
            of_token(b, s, STEPS, PER_LANE), of_token(c, s, STEPS, PER_LANE), PER_LANE,
        )  # fmt: skip
        # A reduction over lanes exchanges the halves first: the order in which ``recur`` adds within a thread.
        ys = ys + (tl.reduce(y, 0, add),)
    y = computed_once(tl.trans(stack(ys, STEPS)), STEPS, BLOCK_D)
    if HAS_D:
        y = tl.fma(u, tl.broadcast_to(skip, [STEPS, BLOCK_D]), y)
    if HAS_Z:
        y = y * silu(z.to(tl.float32))
    return h, y


@triton.jit
def _load(ptr, d_mask, ALL: tl.constexpr):
    return tl.load(ptr) if ALL else tl.load(ptr, mask=d_mask, other=0.0)


@triton.jit
def _save(saved_ptr, h, d, lane, d_mask, channels, LANES: tl.constexpr, PER_LANE: tl.constexpr):
    for i in tl.static_range(PER_LANE):
        n = 4 * LANES * (i // 4) + 4 * lane + i % 4
        tl.store(saved_ptr + (n * channels + d), h[i], mask=d_mask)


@jit_by_type
@no_type_check  # a Triton kernel's body is not Python
def selective_scan_tiles_kernel(
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
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,  # BLOCK_D divides channels
    ALIGNED: tl.constexpr,  # every row of u, delta, z, out, B and C begins at a multiple of 16 bytes
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
    PER_LANE: tl.constexpr = N // LANES
    BYTES: tl.constexpr = 16 if ALIGNED else 1
    i_s = tl.program_id(0).to(tl.int64)
    first_d = tl.program_id(1).to(tl.int64) * BLOCK_D
    d = first_d + tl.arange(0, BLOCK_D)[None, :]
    lane = tl.arange(0, LANES)[:, None]
    d_mask = d < channels

    if VARLEN:
        first = tl.load(start_ptr + i_s).to(tl.int64)
        steps = (tl.load(start_ptr + i_s + 1).to(tl.int64) - first).to(tl.int32)
        row = first * 0
    else:
        first = i_s * 0
        steps = length
        row = i_s
    # One address per tile, kept once per warp, and offsets within the tile: the hints are lost on an argument.
    u_ptr = tl.multiple_of(u_ptr + row * u_stride_s + first * u_stride_t + first_d, BYTES)
    delta_ptr = tl.multiple_of(delta_ptr + row * delta_stride_s + first * delta_stride_t + first_d, BYTES)
    out_ptr = tl.multiple_of(out_ptr + row * out_stride_s + first * out_stride_t + first_d, BYTES)
    if HAS_Z:
        z_ptr = tl.multiple_of(z_ptr + row * z_stride_s + first * z_stride_t + first_d, BYTES)
    B_ptr = tl.multiple_of(B_ptr + row * B_stride_s + first * B_stride_t, BYTES)
    C_ptr = tl.multiple_of(C_ptr + row * C_stride_s + first * C_stride_t, BYTES)
    t = tl.arange(0, STEPS)[:, None]
    d_tile = tl.arange(0, BLOCK_D)[None, :]
    n_tile = tl.arange(0, N)[None, :]
    u_tile = t * u_stride_t + d_tile
    delta_tile = t * delta_stride_t + d_tile
    z_tile = t * z_stride_t + d_tile
    out_tile = t * out_stride_t + d_tile
    B_tile = t * B_stride_t + n_tile
    C_tile = t * C_stride_t + n_tile

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
    a = ()
    h = ()
    for i in tl.static_range(PER_LANE):
        n = 4 * LANES * (i // 4) + 4 * lane + i % 4
        a_i = tl.load(A_ptr + d * A_stride_d + n * A_stride_n, mask=d_mask, other=0.0).to(tl.float32)
        h_i = tl.full([LANES, BLOCK_D], 0.0, tl.float32)
        if HAS_INITIAL:
            h_i = tl.load(state_ptr + n * state_stride_n, mask=d_mask & starts, other=0.0).to(tl.float32)
        a = a + (a_i * LOG2_E,)
        h = h + (h_i,)
    skip = tl.full([1, BLOCK_D], 0.0, tl.float32)
    bias = skip
    if HAS_D:
        skip = tl.load(D_ptr + d * D_stride, mask=d_mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d * bias_stride, mask=d_mask, other=0.0).to(tl.float32)
    if HAS_SAVED:
        saved_ptr += first_saved_row(i_s, first, length, save_every, VARLEN) * channels * N
        every = tl.minimum(save_every, steps).to(tl.int32)
        due_in = every * 0

    # Whole groups of STEPS tokens, then what is left. The compiler turns the loads into copies to shared memory, under
    # way while the groups before are computed: they hold no register, and no other wait becomes a wait for them.
    groups = steps // STEPS
    for _ in tl.range(groups, num_stages=GROUPS_IN_FLIGHT):
        if HAS_SAVED:
            if due_in == 0:
                _save(saved_ptr, h, d, lane, d_mask, channels, LANES, PER_LANE)
                saved_ptr += channels.to(tl.int64) * N
                due_in = every
            due_in -= STEPS
        u = _load(u_ptr + u_tile, d_mask, EVEN_D)
        delta = _load(delta_ptr + delta_tile, d_mask, EVEN_D)
        z = u
        if HAS_Z:
            z = _load(z_ptr + z_tile, d_mask, EVEN_D)
            z_ptr = tl.multiple_of(z_ptr + STEPS * z_stride_t, BYTES)
        b = _load(B_ptr + B_tile, True, True)
        c = _load(C_ptr + C_tile, True, True)
        u_ptr = tl.multiple_of(u_ptr + STEPS * u_stride_t, BYTES)
        delta_ptr = tl.multiple_of(delta_ptr + STEPS * delta_stride_t, BYTES)
        B_ptr = tl.multiple_of(B_ptr + STEPS * B_stride_t, BYTES)
        C_ptr = tl.multiple_of(C_ptr + STEPS * C_stride_t, BYTES)
        h, y = _group(
            h, a, skip, bias, u, delta, z, b, c, d_mask,
            False, STEPS, LANES, PER_LANE, BLOCK_D, HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS,
        )  # fmt: skip
        tl.store(out_ptr + out_tile, y.to(out_ptr.dtype.element_ty), mask=None if EVEN_D else d_mask)
        out_ptr = tl.multiple_of(out_ptr + STEPS * out_stride_t, BYTES)
    left = steps - groups * STEPS
    if left > 0:
        if HAS_SAVED:  # noqa: SIM102 - due_in exists only then
            if due_in == 0:
                _save(saved_ptr, h, d, lane, d_mask, channels, LANES, PER_LANE)
        valid = t < left
        u = _load(u_ptr + u_tile, d_mask & valid, False)
        delta = _load(delta_ptr + delta_tile, d_mask & valid, False)
        z = u
        if HAS_Z:
            z = _load(z_ptr + z_tile, d_mask & valid, False)
        b = _load(B_ptr + B_tile, valid, False)
        c = _load(C_ptr + C_tile, valid, False)
        h, y = _group(
            h, a, skip, bias, u, delta, z, b, c, valid,
            True, STEPS, LANES, PER_LANE, BLOCK_D, HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS,
        )  # fmt: skip
        tl.store(out_ptr + out_tile, y.to(out_ptr.dtype.element_ty), mask=d_mask & valid)

    for i in tl.static_range(PER_LANE):
        n = 4 * LANES * (i // 4) + 4 * lane + i % 4
        if HAS_STATE:
            p_h = state_ptr + n * state_stride_n
            tl.store(p_h, h[i].to(state_ptr.dtype.element_ty), mask=d_mask & keeps)
        if HAS_LAST:
            tl.store(last_ptr + (i_s * channels + d) * N + n, h[i], mask=d_mask)


@launcher(tensors=15)
def launch(*arguments: Any) -> Launch | None:
    """Launch the kernel over (sequences, channel blocks) where it serves the call that ``arguments_of`` gave these of.

    It wants contiguous channels, one group, N of 4, 8, 16 or 32, and B and C in whole words of four.
    """
    call = call_of(*arguments)
    strides, (channels, n), sequences = strides_of(call), call.A.shape, call.sequences
    B, C = call.B, call.C
    served = strides.token_major and B.shape[-3] == 1 and n in STATE_SIZES
    if not (served and rows_aligned(4 * B.element_size(), B) and rows_aligned(4 * C.element_size(), C)):
        return None
    if sequences == 0 or channels == 0:
        return None
    every = None if call.saved_states is None else call.save_states_every
    plan = mixer_plan(sequences, channels, n, call.delta_softplus, every, device_properties(call.u.device))
    by_token = strides[:4]
    in_rows = [x for x in (call.u, call.delta, call.z, call.out, B, C) if x is not None]
    values = (
        0 if call.query_start_loc is not None else call.u.shape[-1], channels, call.pad_slot_id,
        *(of_x[0] for of_x in by_token), *strides.A, strides.B[0], strides.C[0], *strides.rest,
        call.save_states_every, *(of_x[1] for of_x in by_token), strides.B[1], strides.C[1],
    )  # fmt: skip
    constants = {
        "ALIGNED": all(rows_aligned(16, x) for x in in_rows), "N": n, "LANES": plan.lanes, "BLOCK_D": plan.block_d,
        "EVEN_D": channels % plan.block_d == 0, "STEPS": plan.steps, "num_warps": plan.num_warps,
        "enable_fp_fusion": False, **flags_of(call),
    }  # fmt: skip
    return Launch(selective_scan_tiles_kernel, plan.grid, values, constants)
