"""The one-step state update for the layout that a mixer has: channels contiguous, B and C one group.

A thread owns four adjacent channels with four of their states, ``N / 4`` lanes per channel: every state is read and
written once, in words of four channels, and B and C arrive four states per load. Lanes exchange only their part of the
output's sum, by shuffles. A program takes one row of the batch. Addresses, A, D and the row's slot are loaded before
the previous kernel has ended.

The time is that of moving the states, so what counts is how many loads are in flight, and how soon after the wait.
ptxas would sink the later loads below the first exponential to save registers. OR-ing ``states & zero`` into the time
step, with ``zero`` == 0 known only at run time, makes every load a dependency of the first exponential and keeps all of
them in flight.

Bits are those of ``any.py``: the sum over states is cut and added in one order everywhere.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: RUF005 (Triton does not parse starred elements of a tuple)

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.common.alignment import strides_in_words
from tp_mamba.kernels.common.approximations import LOG2_E, silu, softplus
from tp_mamba.kernels.common.dependent_launch import early_start, let_next_start, wait_for_kernel_ahead
from tp_mamba.kernels.common.dialect import add, jit_by_type
from tp_mamba.kernels.common.launches import Launch, launcher
from tp_mamba.kernels.common.recurrence import recur
from tp_mamba.kernels.selective_state_update.launch import PER_THREAD, mixer_plan

STATE_SIZES = (4, 8, 16, 32)
"""Whole loads of four states of B and C, whose lanes fit a warp."""


@triton.jit
def _words(ptr, offset, PER_THREAD: tl.constexpr):
    """``ptr + offset``, which the launcher has seen to be a whole word of channels."""
    return tl.multiple_of(ptr + offset, PER_THREAD * ptr.dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def _four_states(ptr, offset, live, LANES: tl.constexpr, WARPS: tl.constexpr, PER_THREAD: tl.constexpr):
    """A row's B or C: the four states of a thread's lane, 4 tensors ``[WARPS * LANES, channels of a warp]`` float32."""
    THREADS: tl.constexpr = 32 * WARPS
    lane = tl.arange(0, THREADS) // (32 // LANES) % LANES
    ptr = _words(ptr, offset, 4)
    x = tl.load(ptr + (4 * lane[:, None] + tl.arange(0, 4)[None, :]), mask=live).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, [THREADS, 2, 2]))
    s0, s2 = tl.split(even)
    s1, s3 = tl.split(odd)
    states = ()
    for j in tl.static_range(4):
        x = (s0, s1, s2, s3)[j]
        # What a thread has loaded serves all its channels.
        x = tl.broadcast_to(x[:, None], [THREADS, PER_THREAD])
        states = states + (tl.reshape(x, [WARPS * LANES, 32 // LANES * PER_THREAD]),)
    return states


@triton.jit
def _over_lanes(y, LANES: tl.constexpr, WARPS: tl.constexpr):
    """The sum of each channel's lanes, in all of them; halves first, the order in which ``recur`` adds in a thread."""
    tile: tl.constexpr = [WARPS, LANES, y.shape[1]]
    y = tl.reduce(tl.reshape(y, tile), 1, add)[:, None, :]
    return tl.reshape(tl.broadcast_to(y, tile), [WARPS * LANES, tile[2]])


@jit_by_type
@no_type_check  # a Triton kernel's body is not Python
def state_update_rows_kernel(
    state_ptr,  # [slots, D, N], any float, in and out
    x_ptr,  # [B, D], any float, in
    dt_ptr,  # as x
    z_ptr,  # as x, or None
    out_ptr,  # as x, out
    A_ptr,  # [D, N]
    B_ptr,  # [B, N]
    C_ptr,  # [B, N]
    D_ptr,  # [D] contiguous, or None
    dt_bias_ptr,  # [D] contiguous, or None
    state_batch_indices_ptr,  # [B] int, or None: slot b for row b
    zero: tl.int32,  # which the compiler cannot know
    pad_slot_id: tl.int64,  # without slots -1, which is no row's
    state_stride_s: tl.int64,
    x_stride_b: tl.int64, dt_stride_b: tl.int64, z_stride_b: tl.int64, out_stride_b: tl.int64,
    B_stride_b: tl.int64, C_stride_b: tl.int64,
    # A model has one of each, whatever the batch: as constants they fold into the loads and stores.
    state_stride_n: tl.constexpr, A_stride_n: tl.constexpr,
    CHANNELS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PER_THREAD: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    LANES: tl.constexpr = N // 4
    OF_WARP: tl.constexpr = BLOCK_D // WARPS  # channels
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_D - 1) // BLOCK_D
    # Blocks of channels vary fastest: neighbouring programs move neighbouring states.
    first_d = tl.program_id(0) % BLOCKS * BLOCK_D
    i_b = (tl.program_id(0) // BLOCKS).to(tl.int64)
    # Tiles [WARPS * LANES, OF_WARP]: in this shape a warp's threads are the lanes of its own channels.
    of_tile = tl.arange(0, WARPS * LANES)[:, None]
    lane = of_tile % LANES
    d = of_tile // LANES * OF_WARP + tl.arange(0, OF_WARP)[None, :]
    d_mask = (d >= 0) if CHANNELS % BLOCK_D == 0 else (first_d + d < CHANNELS)

    slot = i_b
    if HAS_SLOTS:
        slot = tl.load(state_batch_indices_ptr + i_b).to(tl.int64)
    live = slot != pad_slot_id
    p_a = _words(A_ptr, first_d, PER_THREAD) + (4 * A_stride_n * lane + d)
    a = ()
    for j in tl.static_range(4):
        a = a + (tl.load(p_a + j * A_stride_n, mask=d_mask).to(tl.float32) * LOG2_E,)
    if HAS_D:
        skip = tl.load(D_ptr + first_d + d, mask=d_mask).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias_ptr + first_d + d, mask=d_mask).to(tl.float32)
    p_state = _words(state_ptr, slot * state_stride_s + first_d, PER_THREAD) + (4 * state_stride_n * lane + d)
    p_x = _words(x_ptr, i_b * x_stride_b + first_d, PER_THREAD) + d
    p_dt = _words(dt_ptr, i_b * dt_stride_b + first_d, PER_THREAD) + d
    p_out = _words(out_ptr, i_b * out_stride_b + first_d, PER_THREAD) + d
    wait_for_kernel_ahead(PDL)

    live_mask = d_mask & live
    h = ()
    for j in tl.static_range(4):
        h = h + (tl.load(p_state + j * state_stride_n, mask=live_mask).to(tl.float32),)
    dt = tl.load(p_dt, mask=live_mask).to(tl.float32)
    x = tl.load(p_x, mask=live_mask).to(tl.float32)
    b = _four_states(B_ptr, i_b * B_stride_b, live, LANES, WARPS, PER_THREAD)
    c = _four_states(C_ptr, i_b * C_stride_b, live, LANES, WARPS, PER_THREAD)
    if HAS_Z:
        z = tl.load(_words(z_ptr, i_b * z_stride_b + first_d, PER_THREAD) + d, mask=live_mask).to(tl.float32)

    seen = h[0].to(tl.int32, bitcast=True)
    for j in tl.static_range(1, 4):
        seen = seen | h[j].to(tl.int32, bitcast=True)
    dt = (dt.to(tl.int32, bitcast=True) | (seen & zero)).to(tl.float32, bitcast=True)
    if HAS_BIAS:
        dt = dt + bias
    if SOFTPLUS:
        dt = softplus(dt)
    h, y = recur(h, a, dt, dt * x, b, c, 4)
    for j in tl.static_range(4):
        tl.store(p_state + j * state_stride_n, h[j].to(state_ptr.dtype.element_ty), mask=live_mask)
    y = _over_lanes(y, LANES, WARPS)
    if HAS_D:
        y = tl.fma(x, skip, y)
    if HAS_Z:
        y = y * silu(z)
    tl.store(p_out, tl.where(live, y, 0.0).to(out_ptr.dtype.element_ty), mask=d_mask & (lane == 0))


@launcher(tensors=11)
def launch(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    z: torch.Tensor | None,
    out: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    slots: torch.Tensor | None,
    dt_softplus: bool,
    pad_slot_id: int,
) -> Launch | None:
    """Launch the kernel where it serves the call, whose arguments these are.

    It wants no heads, one group, N of 4, 8, 16 or 32, contiguous channels of everything (of state and A too), B and C
    with contiguous states, and every row at a whole word: four channels, four states.
    """
    if x.dim() != 2 or (B.dim() == 3 and B.shape[1] != 1):
        return None
    (channels, n), batch = A.shape, x.shape[0]
    if n not in STATE_SIZES or channels % PER_THREAD or batch == 0 or channels == 0:
        return None
    if (D is not None and D.stride(0) != 1) or (dt_bias is not None and dt_bias.stride(0) != 1):
        return None
    of_state, of_A = strides_in_words(state, PER_THREAD, -2), strides_in_words(A, PER_THREAD, -2)
    of_x, of_dt = strides_in_words(x, PER_THREAD), strides_in_words(dt, PER_THREAD)
    of_z = (0,) if z is None else strides_in_words(z, PER_THREAD)
    of_out = strides_in_words(out, PER_THREAD)
    of_B, of_C = strides_in_words(B, 4), strides_in_words(C, 4)
    if not (of_state and of_A and of_x and of_dt and of_z and of_out and of_B and of_C):
        return None
    plan = mixer_plan(batch, channels, n)
    strides = (of_state[0], of_x[0], of_dt[0], of_z[0], of_out[0], of_B[0], of_C[0], of_state[2], of_A[1])
    constants = {
        "CHANNELS": channels, "N": n, "BLOCK_D": plan.block_d, "PER_THREAD": PER_THREAD, "WARPS": plan.num_warps,
        "HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": dt_bias is not None, "SOFTPLUS": dt_softplus,
        "HAS_SLOTS": slots is not None, "num_warps": plan.num_warps, "enable_fp_fusion": False,
        **early_start(x.device),
    }  # fmt: skip
    values = (0, pad_slot_id if slots is not None else -1, *strides)
    return Launch(state_update_rows_kernel, plan.grid, values, constants)
