"""The one-step state update for the layout that a mixer has: channels contiguous, B and C one group.

A thread owns two adjacent channels with all their states as scalars in registers: nothing is exchanged, every state
is read and written once, two channels an access, and B and C arrive four states a load. A program takes a few rows
of the batch one after another, so that A, as large as a row's state, is read once for all of them. The next row's
slot is on its way while a row is computed.

The time is that of moving the states, so what counts is how many loads are on their way. All of a row's are issued
before the first value is used. Left to itself the compiler saves registers and puts the loads of later states behind
the exponentials of earlier ones. The branch over padded rows stops that: the loads stand before it, under a condition
that depends on the row. (What the compiler makes of it is no promise: a test reads the machine code.)

Bits are those of ``selective_state_update_triton``: the sum over states is cut and added in one order everywhere.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc"

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl

from tp_mamba.kernels.approx_triton import LOG2_E
from tp_mamba.kernels.dependent_launch_triton import early_start, let_next_start, wait_for_kernel_ahead
from tp_mamba.kernels.ssm_token_triton import jit_by_type, token_of_states

STATE_SIZES = (4, 8, 16, 32)
"""Whole loads of four states of B and C; the states of a thread's channels fit its registers."""
_PER_THREAD = 2
"""Channels: 8 bytes of float32 an access. With four, 16 states each would leave room for half the warps."""
_WARPS = 2
"""A program: few, so that a batch of one is spread over the GPU."""
_RESIDENT_STATES = 2**21
"""States that all multiprocessors of an H200 hold at once: 16 warps of 64 channels with 16 states, 128 registers."""
_MOST_ROWS = 2
"""A program: A then adds half of a row's state to what is read, from L2. On an H200 four rows take 1 to 4 % longer."""


@triton.jit
def _channels(ptr, offset, d, PER_THREAD: tl.constexpr):
    """Pointers to the channels ``d`` at ``ptr + offset``, which the launcher has seen to be a thread's whole word."""
    WORD: tl.constexpr = PER_THREAD * ptr.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(ptr + offset, WORD) + d


@triton.jit
def _load_states(ptr, offset, live, N: tl.constexpr, BLOCK_D: tl.constexpr, PER_THREAD: tl.constexpr):
    """A row's B or C: N tensors ``[BLOCK_D]`` float32, each of one value; four states, aligned as such, in a load."""
    FOUR: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 2  # in bytes
    THREADS: tl.constexpr = BLOCK_D // PER_THREAD
    four = tl.full([THREADS, 1], 0, tl.int32) + tl.arange(0, 4)[None, :]
    ptr = tl.multiple_of(ptr + offset, FOUR)
    states = ()
    for m in tl.static_range(N // 4):
        x = tl.load(tl.multiple_of(ptr + m * 4, FOUR) + four, mask=live).to(tl.float32)
        even, odd = tl.split(tl.reshape(x, [THREADS, 2, 2]))
        s0, s2 = tl.split(even)
        s1, s3 = tl.split(odd)
        for s in tl.static_range(4):
            x = (s0, s1, s2, s3)[s]
            # What a thread has loaded serves all its channels.
            x = tl.reshape(tl.broadcast_to(x[:, None], [THREADS, PER_THREAD]), [BLOCK_D])
            states = states + (x,)  # noqa: RUF005 - Triton has no unpacking
    return states


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
    bias_ptr,  # [D] contiguous, or None
    slot_ptr,  # [B] int, or None: slot b for row b
    batch: tl.int32,
    rows: tl.int32,  # a program
    channel_words: tl.int32,  # channels / PER_THREAD
    pad_slot_id: tl.int64,  # without slots -1, which is no row's
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
    PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    first_d = tl.program_id(0).to(tl.int64) * BLOCK_D
    d = tl.arange(0, BLOCK_D)
    # That a thread's channels are all inside or all outside shows in the product.
    inside = (d >= 0) if EVEN_D else (first_d + d < channel_words.to(tl.int64) * PER_THREAD)
    first = tl.program_id(1) * rows
    last = tl.minimum(first + rows, batch) - 1

    slot_ahead = first.to(tl.int64)
    if HAS_SLOTS:
        slot_ahead = tl.load(slot_ptr + first).to(tl.int64)
    p_a = _channels(A_ptr, first_d, d, PER_THREAD)
    a = ()
    for n in tl.static_range(N):
        a_n = tl.load(p_a + n * A_stride_n, mask=inside).to(tl.float32) * LOG2_E
        a = a + (a_n,)  # noqa: RUF005
    skip = tl.full([BLOCK_D], 0.0, tl.float32)
    bias = skip
    if HAS_D:
        skip = tl.load(D_ptr + first_d + d, mask=inside).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first_d + d, mask=inside).to(tl.float32)
    wait_for_kernel_ahead(PDL)

    for i in range(last + 1 - first):
        row = (first + i).to(tl.int64)
        slot = slot_ahead
        live = slot != pad_slot_id
        mask = inside & live
        p_state = _channels(state_ptr, slot * state_stride_s + first_d, d, PER_THREAD)
        h = ()
        for n in tl.static_range(N):
            h_n = tl.load(p_state + n * state_stride_n, mask=mask).to(tl.float32)
            h = h + (h_n,)  # noqa: RUF005
        x = tl.load(_channels(x_ptr, row * x_stride_b + first_d, d, PER_THREAD), mask=mask)
        dt = tl.load(_channels(dt_ptr, row * dt_stride_b + first_d, d, PER_THREAD), mask=mask)
        z = x
        if HAS_Z:
            z = tl.load(_channels(z_ptr, row * z_stride_b + first_d, d, PER_THREAD), mask=mask)
        b = _load_states(B_ptr, row * B_stride_b, live, N, BLOCK_D, PER_THREAD)
        c = _load_states(C_ptr, row * C_stride_b, live, N, BLOCK_D, PER_THREAD)
        slot_ahead = row + 1
        if HAS_SLOTS:
            slot_ahead = tl.load(slot_ptr + tl.minimum(first + i + 1, last)).to(tl.int64)

        p_out = _channels(out_ptr, row * out_stride_b + first_d, d, PER_THREAD)
        if live:
            after, y = token_of_states(h, a, skip, bias, x, dt, z, b, c, N, HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS)
            tl.store(p_out, y.to(out_ptr.dtype.element_ty), mask=inside)
            for n in tl.static_range(N):
                tl.store(p_state + n * state_stride_n, after[n].to(state_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(p_out, tl.full([BLOCK_D], 0.0, out_ptr.dtype.element_ty), mask=inside)


def rows_a_program(batch: int, channels: int, n: int) -> int:
    """How many rows of the batch a program of the kernel takes. Results do not depend on it.

    First as many programs as run at once, which is one row each up to half of the states that fit; then A is read for
    two rows. At D 8192 and N 16: one row a program below batch 32, two from there.
    """
    rows = min(_MOST_ROWS, max(1, batch * channels * n // _RESIDENT_STATES))
    return max(rows, triton.cdiv(batch, 65535))  # the most programs on the grid's second axis


def rows_launch(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    out: torch.Tensor,
) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, Any]] | None:
    """Grid, sizes and shape of the kernel's launch for these arguments; None where the kernel does not serve them.

    It wants no heads, one group, N of 4, 8, 16 or 32, contiguous channels of everything (of state and A too), B and C
    with contiguous states, and every row at a whole word: two channels, four states.
    """
    if x.dim() != 2 or (B.dim() == 3 and B.shape[1] != 1) or A.shape[-1] not in STATE_SIZES:
        return None
    by_channel = [y for y in (x, dt, z, out, state.mT, A.t()) if y is not None]
    vectors = [y for y in (D, dt_bias) if y is not None]
    if not (in_words(_PER_THREAD, *by_channel) and in_words(4, B, C) and in_words(1, *vectors)):
        return None
    (batch, channels), n = x.shape, A.shape[-1]
    if channels % _PER_THREAD:
        return None
    block_d = _PER_THREAD * 32 * _WARPS
    rows = rows_a_program(batch, channels, n)
    shape = {
        "N": n,
        "BLOCK_D": block_d,
        "PER_THREAD": _PER_THREAD,
        "EVEN_D": channels % block_d == 0,
        "num_warps": _WARPS,
        "enable_fp_fusion": False,
        **early_start(x.device),
    }
    grid = (triton.cdiv(channels, block_d), triton.cdiv(batch, rows))
    return grid, (batch, rows, channels // _PER_THREAD), shape


def in_words(size: int, *tensors: torch.Tensor) -> bool:
    """Whether the last dimension is contiguous and each of its rows begins at a multiple of ``size`` elements."""
    for x in tensors:
        strides = [x.stride(i) for i in range(x.dim() - 1) if x.shape[i] > 1]
        if x.stride(-1) != 1 or x.data_ptr() % (size * x.element_size()) or any(s % size for s in strides):
            return False
    return True
